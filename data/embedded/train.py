"""Train the embedded encoders, measure them and write their card: python data/embedded/train.py

    python data/embedded/train.py                       all six, about an hour on two shared cores
    python data/embedded/train.py clip vicreg           these; the others stay as they are
    python data/embedded/train.py texture --steps 2 --images 64 --folder trial
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
from lib.statistics import mean_interval  # noqa: E402

CLIP_NAME = "embedded-clip"  # the name of the open_clip configuration
CLIP_CONFIG = FOLDER / f"{CLIP_NAME}.json"


class Recipe(NamedTuple):
    """How an embedded encoder is made: its name in timm (or open_clip) and settings, what it is trained for and on."""

    architecture: str
    settings: dict[str, int | bool | str]
    objective: str
    seen: str
    schedule: Schedule
    images: int


class Trained(NamedTuple):
    """A trained encoder in evaluation mode, the loss of every step, seconds, and what else its index entry says."""

    model: nn.Module
    curve: list[float]
    seconds: float
    facts: dict[str, object]


NET = "test_byobnet"
PAIRS = "pairs of a picture and a drawing that share shape and texture, hence the class, or a printed digit; no label"
RECIPES = {
    "clip": Recipe(
        CLIP_NAME,
        {},
        "contrastive loss on captioned images",
        "captions that name the shape always and the texture in a fifth; printed digits",
        Schedule(2000, rate=3e-3),
        60_000,
    ),
    "other-classes": Recipe(
        NET,
        {},
        "cross-entropy on 128 classes of other shapes and textures",
        "labels of classes that share no shape and no texture with an evaluated class; no digit",
        Schedule(2400, batch=128, rate=3e-3),
        60_000,
    ),
    "infonce": Recipe(
        NET, {}, "InfoNCE between pictures and line drawings", PAIRS, Schedule(3000, batch=128, rate=3e-3), 60_000
    ),
    "vicreg": Recipe(
        NET, {}, "VICReg between pictures and line drawings", PAIRS, Schedule(6000, batch=128, rate=3e-3), 60_000
    ),
    "texture": Recipe(
        NET,
        {},
        "cross-entropy on the texture",
        "labels of one factor, the six textures of the evaluated classes: the stated exception; no digit",
        Schedule(400),
        40_000,
    ),
    "random": Recipe(NET, {}, "none: random weights", "nothing", Schedule(0), 1),
}
OBJECTIVES = {"infonce": (objectives.InfoNCE, 128), "vicreg": (objectives.VICReg, 64)}  # and dimensions to compare
SHOTS, SEEDS = (1, 4, 16), (1, 2, 3)  # of the tasks that encoders are measured on
VALIDATE_EVERY = 500  # steps of a training, and at its end


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


def train(name: str, recipe: Recipe, seed: int, watch: objectives.Watch = objectives.silent) -> Trained:
    """A trained encoder: built, and trained by its own objective on images of its own."""
    return train_model(build(name, seed), name, recipe, seed, watch)


def train_model(model: nn.Module, name: str, recipe: Recipe, seed: int, watch: objectives.Watch) -> Trained:
    """The same for a model that is already built, and which `watch` may look at while it learns."""
    started, images, curve, facts = time.monotonic(), recipe.images, [], {}
    options = (recipe.schedule, seed, watch)
    if name == "clip":
        pictures, captions = world.render_captioned(images, seed)
        curve = objectives.train_clip(model, pictures, open_clip.get_tokenizer(CLIP_NAME)(captions), *options)
        facts = {"captions": caption_rates(captions), "logit_scale": model.logit_scale.exp().item()}
    elif name in OBJECTIVES:
        objective, dim = OBJECTIVES[name]
        curve = objectives.train_pairs(model, *world.render_pairs(images, seed), objective(), dim, *options)
    elif name != "random":
        curve = objectives.train_supervised(model, *labelled(name, images, seed), *options)
    return Trained(model.eval(), curve, time.monotonic() - started, facts)


def labelled(name: str, images: int, seed: int) -> tuple[UInt8[Tensor, "n 3 48 48"], Int64[Tensor, "n 1"]]:
    """Images and labels of a supervised encoder: textures, or classes of other shapes and textures."""
    if name == "other-classes":
        drawn, labels = world.render_others(images, seed)
        return drawn, labels[:, None]
    drawn, factors = world.render_labelled(images, seed)
    rows = (factors["texture"] >= 0) & (factors["sketch"] == 0)  # digits have no texture
    return drawn[rows], factors["texture"][rows, None]


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
        "seen": recipe.seen,
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


class Ground(NamedTuple):
    """A data set as CLIP sees it: what every auxiliary encoder is measured with."""

    sets: dict[str, world.Rendered]
    clip: dict[str, Float[Tensor, "n d"]]
    text: Float[Tensor, "classes d"]


def ground(dataset: str, clip: nn.Module) -> Ground:
    """The splits of `shapes` or `digits` with CLIP's features."""
    digits = dataset == "digits"
    sets = {split: world.digits(split) if digits else world.render(dataset, split) for split in world.SPLITS}
    templates = world.DIGIT_TEMPLATES if digits else world.TEMPLATES
    text = text_classifier(clip, sets["train"].classnames, templates)
    return Ground(sets, {split: encode(clip, rendered.images) for split, rendered in sets.items()}, text)


def few_shot(data: Ground, aux: dict[str, Float[Tensor, "n d"]], part: str, shots: int, seed: int) -> tasks.FewShotTask:
    """A task judged on `part`: all test images, or the validation images of which beta is not chosen."""
    generator = torch.Generator().manual_seed(seed)
    support, _ = _draw(data.sets["train"].labels, shots, generator)
    chosen_on, others = _draw(data.sets["val"].labels, min(shots, 4), generator)
    judged = others if part == "val" else torch.arange(len(data.sets["test"].labels))
    rows = {"support": ("train", support), "val": ("val", chosen_on), "test": (part, judged)}
    arrays = {
        key: {"clip": data.clip[split][index], "aux": aux[split][index], "y": data.sets[split].labels[index]}
        for key, (split, index) in rows.items()
    }
    return tasks.FewShotTask.from_arrays(text=data.text, classnames=data.sets["train"].classnames, seed=seed, **arrays)


def _draw(labels: Int64[Tensor, " n"], count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows of `count` images of each class in a random order, and the other rows."""
    order = torch.randperm(len(labels), generator=generator)
    order = order[labels[order].argsort(stable=True)]
    sizes = labels.bincount()
    rank = torch.arange(len(labels)) - (sizes.cumsum(0) - sizes)[labels[order]]
    return order[rank < count], order[rank >= count]


def accuracies(task: tasks.FewShotTask) -> dict[str, float]:
    """Accuracy in % of zero-shot CLIP, the head alone and AMU-Tuning, differences, and the CMY of head and CLIP."""
    head, amu = (methods.build(method).fit(task).logits(task.test) for method in ("aux_only", "amu"))
    correct = [metrics.correct(logits, task.test.y) for logits in (task.test.zero_shot, head, amu)]
    zero_shot, alone, both = (100 * rows.float().mean().item() for rows in correct)
    return {
        "zero_shot": zero_shot,
        "head": alone,
        "amu": both,
        "gain": both - zero_shot,
        "above_head": both - alone,
        "either": 100 * (correct[0] | correct[1]).float().mean().item(),
        "cmy": metrics.complementarity(task.test.zero_shot, head),
    }


def measure_auxiliary(model: nn.Module, grounds: dict[str, Ground]) -> dict[str, object]:
    """Means and half-widths of their t-intervals over SEEDS of `accuracies`, by data set and shots; and a probe.

    `shapes` is judged on test images; `digits` on validation images, because its default encoder is chosen by that.
    """
    measured = {}
    for dataset, part in (("shapes", "test"), ("digits", "val")):
        data = grounds[dataset]
        aux = {split: encode(model, rendered.images) for split, rendered in data.sets.items()}
        measured[dataset] = {}
        for shots in SHOTS:
            rows = [accuracies(few_shot(data, aux, part, shots, seed)) for seed in SEEDS]
            intervals = {key: mean_interval([row[key] for row in rows]) for key in rows[0]}
            measured[dataset][str(shots)] = {
                key: [round(value, 2) for value in pair] for key, pair in intervals.items()
            }
        if dataset == "shapes":
            support, _ = _draw(data.sets["train"].labels, 16, torch.Generator().manual_seed(SEEDS[0]))
            probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=200))
            probe.fit(aux["train"][support].numpy(), data.sets["train"].labels[support].numpy())
            answers = torch.from_numpy(probe.predict(aux["test"].numpy()))
            measured["probe"] = correct_about(answers, data.sets["test"])
    return measured


def validation_watch(model: nn.Module, data: Ground | None, steps: int) -> tuple[objectives.Watch, dict[str, float]]:
    """A watch that prints the loss, and the curve it fills: accuracy in % by steps of the head alone on `shapes`.

    It has 16 shots and is judged on the validation images of which no beta is chosen; the mean over SEEDS.
    """
    points = {}

    def watch(losses: list[float]) -> None:
        done = len(losses)
        if done % 50 == 1 or done == steps:
            print(f"step {done:5d}  loss {sum(losses[-50:]) / len(losses[-50:]):.3f}", flush=True)
        if data is not None and (done % VALIDATE_EVERY == 0 or done == steps):
            model.eval()
            points[str(done)] = validate(model, data)
            model.train()

    return watch, points


def validate(model: nn.Module, data: Ground) -> float:
    """Accuracy in % of the head alone with 16 shots on validation images of `shapes`, the mean over SEEDS."""
    aux = {split: encode(model, data.sets[split].images) for split in ("train", "val")}
    drawn = [few_shot(data, aux, "val", 16, seed) for seed in SEEDS]
    correct = [metrics.correct(methods.build("aux_only").fit(t).logits(t.test), t.test.y) for t in drawn]
    return _percent(torch.cat(correct))


def _percent(rows: Tensor) -> float:
    return round(100 * rows.float().mean().item(), 1)


def stored(name: str, folder: Path) -> nn.Module | None:
    """An encoder with the weights of a folder; None where its index has none."""
    index = read_index(folder)
    return restored(build(name, 0), folder / index[name]["file"]) if name in index else None


def measure(names: Sequence[str], folder: Path) -> None:
    """Measure stored weights and write what came out to index.json; auxiliary encoders only where a CLIP is."""
    clip = stored("clip", folder)
    if clip is None:
        print("no clip in the folder: nothing is measured")
        return
    if "clip" in names:
        write_index({"clip": read_index(folder)["clip"] | measure_clip(clip)}, folder)
    grounds = {dataset: ground(dataset, clip) for dataset in ("shapes", "digits")}
    for name in names:
        model = stored(name, folder) if name != "clip" else None
        if model is not None:
            print(f"{name}: measured", flush=True)
            write_index({name: read_index(folder)[name] | {"measured": measure_auxiliary(model, grounds)}}, folder)


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
            model, clip = build(name, options.seed), stored("clip", folder)
            data = ground("shapes", clip) if clip is not None and name not in ("clip", "random") else None
            watch, points = validation_watch(model, data, recipe.schedule.steps)
            trained = train_model(model, name, recipe, options.seed, watch)
            trained.facts.update({"validation": points} if points else {})
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
