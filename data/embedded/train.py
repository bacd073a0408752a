"""Train the embedded encoders, measure them and write their card: python data/embedded/train.py

    python data/embedded/train.py                       all six, about an hour on two shared cores
    python data/embedded/train.py clip vicreg           these; the others stay as they are
    python data/embedded/train.py supervised --steps 2 --images 64 --folder trial
    python data/embedded/train.py --measure             measure the weights that are there again
    python data/embedded/train.py --card                README.md from index.json alone

Every encoder is trained on the pretraining streams of `world` alone and sees no evaluation image. The architectures are
open_clip's and timm's own, so that the weights load through those libraries. Weights are stored as float16; index.json
says of each encoder how it is loaded, how it came about and what it does, and is written in one step.
"""

import argparse
import copy
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER.parents[1]), str(FOLDER)]

import objectives  # noqa: E402
import open_clip  # noqa: E402
import timm  # noqa: E402
import torch  # noqa: E402
import world  # noqa: E402
from card import card  # noqa: E402
from jaxtyping import Float, Int64, UInt8  # noqa: E402
from objectives import MEAN, STD, Schedule, seeded  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from sklearn.linear_model import LogisticRegression  # noqa: E402
from sklearn.pipeline import make_pipeline  # noqa: E402
from sklearn.preprocessing import StandardScaler  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from lib import methods, metrics, runs, tasks  # noqa: E402
from lib.files import replace_file  # noqa: E402

CLIP_NAME = "embedded-clip"  # the name of the open_clip configuration
CLIP_CONFIG = FOLDER / f"{CLIP_NAME}.json"
VIT = {
    "img_size": 48,
    "patch_size": 6,
    "embed_dim": 128,
    "depth": 4,
    "num_heads": 4,
    "global_pool": "avg",
    "fc_norm": False,
}


class Recipe(NamedTuple):
    """How an embedded encoder is made: its name in timm (or open_clip) and settings, what it is trained for and on."""

    architecture: str
    settings: dict[str, int | bool | str]
    objective: str
    schedule: Schedule
    images: int


class Trained(NamedTuple):
    """A trained encoder in evaluation mode, the loss of every step, seconds, and what else its index entry says."""

    model: nn.Module
    curve: list[float]
    seconds: float
    facts: dict[str, object]


RECIPES = {
    "clip": Recipe(CLIP_NAME, {}, "contrastive loss on captioned images", Schedule(2000, rate=3e-3), 60_000),
    "vicreg": Recipe(
        "test_byobnet",
        {},
        "VICReg between pictures and line drawings of the same things",
        Schedule(900, rate=3e-3),
        40_000,
    ),
    "mae": Recipe("vit_tiny_patch16_224", VIT, "masked autoencoding of unlabelled images", Schedule(500), 40_000),
    "supervised": Recipe("test_byobnet", {}, "cross-entropy on the texture", Schedule(400), 40_000),
    "supervised-colour": Recipe("test_byobnet", {}, "cross-entropy on both colours", Schedule(200), 40_000),
    "random": Recipe("test_byobnet", {}, "none: random weights", Schedule(0), 1),
}


# ---- encoders ----------------------------------------------------------------------------------------------


def clip_model(seed: int) -> nn.Module:
    """The untrained two-tower model that CLIP_CONFIG describes, in open_clip's own classes."""
    open_clip.add_model_config(CLIP_CONFIG)
    return seeded(lambda: open_clip.create_model(CLIP_NAME, pretrained=None), seed)


def encoder(name: str, seed: int) -> nn.Module:
    """An untrained auxiliary encoder of RECIPES, in timm's own classes and without a classifier.

    Raises:
        ValueError: a name that is not an auxiliary encoder's.
    """
    names = [each for each in RECIPES if each != "clip"]
    if name not in names:
        raise ValueError(f"unknown auxiliary encoder {name!r}; there are {', '.join(names)}")
    recipe = RECIPES[name]
    return seeded(lambda: timm.create_model(recipe.architecture, num_classes=0, **recipe.settings), seed)


def build(name: str, seed: int) -> nn.Module:
    """The untrained encoder of that name."""
    return clip_model(seed) if name == "clip" else encoder(name, seed)


def select(names: Sequence[str]) -> tuple[str, ...]:
    """Encoders to train, in the order of RECIPES; all where none is named.

    Raises:
        ValueError: a name without a recipe.
    """
    unknown = [name for name in names if name not in RECIPES]
    if unknown:
        raise ValueError(f"no recipe for {', '.join(unknown)}; there are {', '.join(RECIPES)}")
    return tuple(name for name in RECIPES if name in (names or RECIPES))


def plan(name: str, steps: int = 0, images: int = 0) -> Recipe:
    """The recipe of an encoder, with another number of steps or images where one is given.

    Raises:
        ValueError: a negative number, or images for less than one batch of two.
    """
    if steps < 0 or images < 0 or images == 1:
        raise ValueError(f"{name} cannot be trained for {steps} steps on {images} images")
    recipe = RECIPES[name]
    if name == "random":
        return recipe
    steps = steps or recipe.schedule.steps
    images = images or min(recipe.images, steps * recipe.schedule.batch)  # what is never drawn is not rendered
    schedule = recipe.schedule._replace(steps=steps, batch=min(recipe.schedule.batch, images))
    return recipe._replace(schedule=schedule, images=images)


def train(name: str, recipe: Recipe, seed: int, show: bool = False) -> Trained:
    """A trained encoder: built, and trained by its own objective on images of its own."""
    started, schedule, images = time.monotonic(), recipe.schedule, recipe.images
    model, curve, facts = build(name, seed), [], {}
    options = (schedule, seed, show)
    if name == "clip":
        pictures, captions = world.render_captioned(images, seed)
        curve = objectives.train_clip(model, pictures, open_clip.get_tokenizer(CLIP_NAME)(captions), *options)
        facts = {"captions": caption_rates(captions), "logit_scale": model.logit_scale.exp().item()}
    elif name == "vicreg":
        curve = objectives.train_vicreg(model, *world.render_pairs(images, seed), *options)
    elif name == "mae":
        curve = objectives.train_mae(model, world.render_unlabelled(images, seed), *options)
    elif name != "random":
        curve = objectives.train_supervised(model, *labelled(name, images, seed), *options)
    return Trained(model.eval(), curve, time.monotonic() - started, facts)


def labelled(name: str, images: int, seed: int) -> tuple[UInt8[Tensor, "n 3 48 48"], Int64[Tensor, "n factors"]]:
    """Images and label columns of a supervised encoder: texture alone, or object and background colour."""
    drawn, factors = world.render_labelled(images, seed)
    columns = ["texture"] if name == "supervised" else ["colour", "background"]
    rows = (factors["texture"] >= 0) & (factors["sketch"] == 0)  # digits have no texture, sketches no colour
    return drawn[rows], torch.stack([factors[column][rows] for column in columns], 1)


# ---- on disk ---------------------------------------------------------------------------------------------


def save_encoder(model: nn.Module, path: Path) -> str:
    """Write the weights, matrices and kernels as float16, vectors and counts as they are; their sha256."""
    state = {name: value.half() if value.ndim > 1 and value.is_floating_point() else value
             for name, value in model.state_dict().items()}  # fmt: skip
    save_file({name: value.contiguous() for name, value in state.items()}, path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def restored(model: nn.Module, path: Path) -> nn.Module:
    """A copy of `model` with the weights of `path`, ready to encode: what a reader of the file gets."""
    model = copy.deepcopy(model)
    model.load_state_dict(load_file(path))
    return model.eval()


def index_entry(name: str, trained: Trained, path: Path, recipe: Recipe, seed: int) -> dict[str, object]:
    """What index.json says of an encoder: how it is loaded, and how it came about."""
    clip, schedule = name == "clip", recipe.schedule
    return {
        "file": path.name,
        "sha256": save_encoder(trained.model, path),
        "bytes": path.stat().st_size,
        "kind": "open_clip" if clip else "timm",
        "architecture": recipe.architecture,
        "settings": recipe.settings,
        "image_size": world.IMAGE_SIZE,
        "mean": MEAN,
        "std": STD,
        "feature_dim": trained.model.text_projection.shape[1] if clip else trained.model.num_features,
        "objective": recipe.objective,
        "images": recipe.images,
        "steps": schedule.steps,
        "batch": schedule.batch,
        "learning_rate": schedule.rate,
        "seed": seed,
        "seconds": round(trained.seconds),
        "commit": runs.commit()[:7],
        "curve": curve_points(trained.curve),
        **trained.facts,
    }


def curve_points(curve: Sequence[float]) -> dict[str, float]:
    """Mean loss around nine steps from the first to the last, by step."""
    each, around = len(curve) // 8, len(curve) // 80
    steps = sorted({min(place * each, len(curve) - 1) for place in range(9)}) if curve else []
    parts = {step: curve[max(0, step - around) : step + around + 1] for step in steps}
    return {str(step): round(sum(part) / len(part), 3) for step, part in parts.items()}


def read_index(folder: Path) -> dict[str, dict]:
    """index.json of a folder; empty where there is none."""
    path = folder / "index.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write_index(entries: dict[str, dict], folder: Path) -> None:
    """Write index.json in one step, then the card; encoders that were not trained again stay in it."""
    merged = read_index(folder) | entries
    text = json.dumps({name: merged[name] for name in RECIPES if name in merged}, indent=2) + "\n"
    replace_file(folder / "index.json", lambda stream: stream.write(text.encode()))


def write_card(folder: Path) -> None:
    """Write README.md, which says nothing that is not in index.json or a constant."""
    text = card(read_index(folder))
    replace_file(folder / "README.md", lambda stream: stream.write(text.encode()))


# ---- measurements ------------------------------------------------------------------------------------------


@torch.inference_mode()
def encode(model: nn.Module, images: UInt8[Tensor, "n 3 48 48"], batch: int = 256) -> Float[Tensor, "n d"]:
    """Image features in the encoder's own scale."""
    features = getattr(model, "encode_image", model)
    return torch.cat([features(objectives.normalise(part)) for part in images.split(batch)]).float()


@torch.inference_mode()
def text_classifier(
    model: nn.Module, classnames: Sequence[str], templates: Sequence[str]
) -> Float[Tensor, "classes d"]:
    """Text features of the classes: the normalised mean over the templates of normalised features."""
    tokenizer = open_clip.get_tokenizer(CLIP_NAME)
    parts = [model.encode_text(tokenizer([t.format(name) for name in classnames]), normalize=True) for t in templates]
    return F.normalize(torch.stack(parts).mean(0), dim=1)


def caption_rates(captions: Sequence[str]) -> dict[str, float]:
    """How often captions are about a digit or a sketch, and how often the others name each factor, in %."""
    words = [caption.strip(".").split() for caption in captions]
    things = [w for w in words if not set(w) & set(world.DIGIT_CLASSNAMES)]
    pictures = [w for w in things if "sketch" not in w]
    ahead = [w[: w.index("on")] if "on" in w else w for w in pictures]  # what comes before the background
    named = {
        "shape": [w[-1] in world.SHAPES for w in ahead],
        "colour": [not set(w).isdisjoint(world.COLOURS) for w in ahead],
        "background": ["background" in w for w in pictures],
        "texture": [not set(w).isdisjoint(world.TEXTURES) for w in ahead],
    }
    rates = {"digit": 1 - len(things) / len(words), "sketch": (len(things) - len(pictures)) / len(words)}
    rates |= {name: sum(hits) / max(1, len(hits)) for name, hits in named.items()}
    return {name: round(100 * rate, 1) for name, rate in rates.items()}


def correct_about(answers: Int64[Tensor, " n"], rendered: world.Rendered) -> dict[str, float]:
    """Accuracy in % of answers (indices of CLASSNAMES) about the class, its shape and its texture."""
    texture, shape = answers // len(world.SHAPES), answers % len(world.SHAPES)
    correct = {
        "class": answers == rendered.labels,
        "shape": shape == rendered.attributes["shape"],
        "texture": texture == rendered.attributes["texture"],
    }
    return {name: _percent(rows) for name, rows in correct.items()}


def measure_clip(clip: nn.Module) -> dict[str, object]:
    """Zero-shot accuracy in % on every version of the world, on real digits, and in each group of shapes-spurious."""
    text = text_classifier(clip, world.CLASSNAMES, world.TEMPLATES)
    sets = [("shapes", "val"), *((version, "test") for version in world.VERSIONS if version != "shapes-novel")]
    accuracy = {}
    for version, split in sets:
        rendered = world.render(version, split)
        answers = (encode(clip, rendered.images) @ text.T).argmax(1)
        accuracy[f"{version} {split}" if version == "shapes" else version] = correct_about(answers, rendered)
    groups = rendered.attributes["group"]  # of shapes-spurious, the last version
    by_group = [_percent((answers == rendered.labels)[groups == group]) for group in range(4)]
    text, digits = text_classifier(clip, world.DIGIT_CLASSNAMES, world.DIGIT_TEMPLATES), {}
    for split in ("val", "test"):
        rendered = world.digits(split)
        digits[split] = _percent((encode(clip, rendered.images) @ text.T).argmax(1) == rendered.labels)
    return {"zero_shot": accuracy, "groups": by_group, "digits": digits}


def measure_auxiliary(models: dict[str, nn.Module], clip: nn.Module) -> dict[str, dict[str, float]]:
    """Accuracy in % with 16 shots of shapes of a probe, the head alone and AMU-Tuning, and the CMY of head and CLIP.

    Support and validation images are the first of their class.
    """
    text = text_classifier(clip, world.CLASSNAMES, world.TEMPLATES)
    rendered = {split: world.render("shapes", split) for split in world.SPLITS}
    rows = {split: _first_of_class(rendered[split].labels, count) for split, count in (("train", 16), ("val", 4))}
    rows["test"] = torch.arange(len(rendered["test"].labels))
    images = {split: rendered[split].images[rows[split]] for split in rows}
    clip_features = {split: encode(clip, images[split]) for split in rows}
    measured = {}
    for name, model in models.items():
        train, val, test = (
            {
                "clip": clip_features[split],
                "aux": encode(model, images[split]),
                "y": rendered[split].labels[rows[split]],
            }
            for split in rows
        )
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=200))
        answers = torch.from_numpy(probe.fit(train["aux"].numpy(), train["y"].numpy()).predict(test["aux"].numpy()))
        arrays = {"support": train, "val": val, "test": test}
        task = tasks.FewShotTask.from_arrays(text=text, classnames=world.CLASSNAMES, name=name, **arrays)
        head, amu = (methods.build(method).fit(task).logits(task.test) for method in ("aux_only", "amu"))
        zero_shot = task.test.zero_shot
        correct = [metrics.correct(logits, task.test.y) for logits in (zero_shot, head, amu)]
        measured[name] = {
            **{f"probe_{key}": value for key, value in correct_about(answers, rendered["test"]).items()},
            "head": _percent(correct[1]),
            "amu": _percent(correct[2]),
            "gain": round(100 * (correct[2].float().mean() - correct[0].float().mean()).item(), 1),
            "either": _percent(correct[0] | correct[1]),
            "cmy": round(metrics.complementarity(zero_shot, head), 2),
        }
    return measured


def _first_of_class(labels: Int64[Tensor, " n"], count: int) -> Int64[Tensor, " m"]:
    return labels.argsort(stable=True).reshape(len(labels.unique()), -1)[:, :count].flatten()


def _percent(rows: Tensor) -> float:
    return round(100 * rows.float().mean().item(), 1)


def measure(names: Sequence[str], folder: Path) -> None:
    """Measure stored weights and write what came out to index.json; auxiliary encoders only where a CLIP is."""
    index = read_index(folder)
    models = {name: restored(build(name, 0), folder / index[name]["file"]) for name in {*names, "clip"} & set(index)}
    clip = models.pop("clip", None)
    if clip is None:
        print("no clip in the folder: nothing is measured")
        return
    if "clip" in names:
        write_index({"clip": index["clip"] | measure_clip(clip)}, folder)
    for name, measured in measure_auxiliary({name: models[name] for name in names if name in models}, clip).items():
        write_index({name: index[name] | {"measured": measured}}, folder)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train the embedded encoders, measure them and write their card.")
    parser.add_argument("encoders", nargs="*", help=f"default: all of {', '.join(RECIPES)}")
    parser.add_argument("--steps", type=int, default=0, help="0: as many as the recipe says")
    parser.add_argument("--images", type=int, default=0, help="0: as many as the recipe says")
    parser.add_argument("--seed", type=int, default=0, help="of images, weights and batches")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of the weights, index.json and README.md")
    parser.add_argument("--measure", action="store_true", help="train nothing, measure the weights that are there")
    parser.add_argument("--card", action="store_true", help="write README.md from index.json, nothing else")
    options = parser.parse_args(arguments)
    folder = options.folder.resolve()
    try:
        names = select(options.encoders)
        plans = {name: plan(name, options.steps, options.images) for name in names}
    except ValueError as error:
        parser.error(str(error))
    if folder == FOLDER and (options.steps or options.images):
        parser.error("a trial does not replace the weights that ship; name another --folder")
    torch.set_num_threads(options.threads)
    folder.mkdir(parents=True, exist_ok=True)
    if not options.card and not options.measure:
        if folder != FOLDER:
            shutil.copy(CLIP_CONFIG, folder)
        for name, recipe in plans.items():
            print(f"{name}: {recipe.schedule.steps} steps on {recipe.images} images", flush=True)
            trained = train(name, recipe, options.seed, show=True)
            path = folder / f"{name}.safetensors"
            write_index({name: index_entry(name, trained, path, recipe, options.seed)}, folder)
            back, images = restored(trained.model, path), world.render("shapes", "val").images
            pair = [encode(model, images) for model in (trained.model, back)]
            print(
                f"{name}: stored; the least cosine with the features before is {F.cosine_similarity(*pair).min():.5f}"
            )
    if not options.card:
        measure(names, folder)
    write_card(folder)
    size = sum(entry["bytes"] for entry in read_index(folder).values()) / 2**20
    print(f"{folder}: {size:.1f} MiB of weights, index.json, README.md")
    return 0 if size <= 16 else 1


if __name__ == "__main__":
    sys.exit(main())
