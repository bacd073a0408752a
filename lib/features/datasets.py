"""A data set by name: images, labels, class names, prompt templates and splits.

Names:

    shapes, shapes-v2, shapes-sketch, shapes-corrupted-1 … -5, shapes-novel, shapes-spurious, digits
                    the embedded world, rendered from its seed
    caltech101, oxford_pets, stanford_cars, oxford_flowers, food101, fgvc_aircraft, sun397, dtd, eurosat, ucf101
                    the few-shot benchmarks, in the layout of CoOp's instructions or torchvision's
    imagenet, imagenetv2, imagenet-sketch, imagenet-a, imagenet-r
    folder:PATH     images of one's own: a sub-folder for each class, or train, val and test above them
    csv:PATH        a table with the columns path, label, split
    features:PATH   a bank of features that somebody already has; it holds no images, `features.load` reads it

`NAME@SHOTS/SEED`, such as `dtd@16/1`, is the same data set with the field's own draw: its train is the SHOTS images
of each class that CoOp and Tip-Adapter take under that seed (1 to 3 in papers), its val min(SHOTS, 4) of each. For
ImageNet it spares extracting 1.28 million images.

Data sets lie below data/downloads, or the folder that LOGIT_BIAS_DATA names.
"""

import difflib
import json
import importlib
import random
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import torch

from lib.features import sources
from lib.features.images import ImageSplit, draw, shared
from lib.features.sources import Listing
from lib.files import ROOT, data_root, find_path

__all__ = ["Dataset", "ImageSplit", "data_root", "find_path", "load", "names", "prompts", "shared"]
EMBEDDED = (
    "shapes",
    "shapes-v2",
    "shapes-sketch",
    *(f"shapes-corrupted-{severity}" for severity in range(1, 6)),
    "shapes-novel",
    "shapes-spurious",
    "digits",
)
VAL_SHOTS = 4  # CoOp tunes on min(shots, 4) validation images of each class
GRAMMAR = "folder:PATH, csv:PATH, features:PATH, or NAME@SHOTS/SEED for the field's own few-shot draw"
DRAW = re.compile(r"@([1-9]\d*)/(\d+)$")
Prompts = Sequence[str] | Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Dataset:
    """A data set; nothing is decoded or rendered before `images` is called.

    Attributes:
        classnames: as they enter a prompt, in label order.
        templates: prompts with one `{}` for the class name.
        splits: those that `images` accepts.
        source: where class names, splits and templates come from; it belongs in a run's record.
        codes: WordNet ids of the classes, where they have them.
    """

    name: str
    classnames: tuple[str, ...]
    templates: tuple[str, ...]
    splits: tuple[str, ...]
    source: str
    open_split: Callable[[str], ImageSplit] = field(repr=False)
    codes: tuple[str, ...] = field(default=(), repr=False)

    @property
    def base(self) -> str:
        """The name without a few-shot draw."""
        return DRAW.sub("", self.name)

    def images(self, split: str) -> ImageSplit:
        """Return one split.

        Raises:
            ValueError: the data set has no such split, or no such files.
        """
        if split not in self.splits:
            raise ValueError(f"{self.name} has no split {split!r}; it has {', '.join(self.splits)}")
        return self.open_split(split)


def names() -> tuple[str, ...]:
    """Return all names but those with a path or a draw in them."""
    return (*EMBEDDED, *sources.cards())


def load(name: str, root: Path | None = None) -> Dataset:
    """Return the data set of that name.

    Args:
        name: one of those in the module's docstring.
        root: the folder of downloaded data sets; see `data_root`.

    Raises:
        ValueError: an unknown name, a bank of features, or files that are missing.
    """
    drawn = DRAW.search(name)
    if drawn:
        return _drawn(load(DRAW.sub("", name), root), name, shots=int(drawn[1]), seed=int(drawn[2]))
    prefix, _, path = name.partition(":")
    if prefix in ("folder", "csv") and path:
        found = sources.folder(find_path(path)) if prefix == "folder" else sources.csv_file(find_path(path))
        return _from_listing(name, found, ("a photo of a {}.",), "templates: CLIP's default")
    if prefix == "features":
        raise ValueError(f"{name} is a bank of features and holds no images; features.load reads it")
    if name in EMBEDDED:
        return _embedded(name)
    card = sources.cards().get(name)
    if card is None:
        near = difflib.get_close_matches(name, names(), n=3, cutoff=0.5)
        hint = f"; near: {', '.join(near)}" if near else ""
        raise ValueError(f"unknown data set {name!r}{hint}. Known: {', '.join(names())}, {GRAMMAR}")
    if card["family"] == "imagenet":
        templates = ensemble("7")
        return _from_listing(name, sources.imagenet(name, data_root(root)), templates, "templates: Tip-Adapter's 7")
    found = sources.benchmark(name, data_root(root))
    return _from_listing(name, found, tuple(card["templates"]), "template: CoOp's and Tip-Adapter's")


def prompts(choice: str | Prompts | None, dataset: Dataset) -> Prompts:
    """Return the prompts that a name stands for.

    Args:
        choice: None for the data set's own templates; `7` or `80` for the ensembles of OpenAI's ImageNet notebook; the
            path of a text file (a template a line) or a JSON file (a list of templates, or class name to sentences);
            or the templates or sentences themselves.

    Returns:
        Templates with one `{}`, or sentences for every class name of the data set.

    Raises:
        ValueError: no such file, a template without `{}`, classes without sentences.
    """
    if choice is None:
        return dataset.templates
    if isinstance(choice, str):
        choice = ensemble(choice) if choice in ("7", "80") else _prompt_file(find_path(choice))
    if isinstance(choice, Mapping):
        given = {_plain(name): tuple(sentences) for name, sentences in choice.items()}
        lacking = [name for name in dataset.classnames if not given.get(_plain(name))]
        if lacking:
            raise ValueError(
                f"sentences are given for {len(given)} classes, {dataset.name} has {len(dataset.classnames)}; "
                f"{len(lacking)} have none, first {lacking[0]!r}"
            )
        return {name: given[_plain(name)] for name in dataset.classnames}
    wrong = [template for template in choice if template.count("{}") != 1]
    if wrong or not choice:
        raise ValueError(f"a template has one {{}} for the class name; got {wrong[0]!r}" if wrong else "no templates")
    return tuple(choice)


def ensemble(which: str) -> tuple[str, ...]:
    """Return the 7 or the 80 templates of OpenAI's ImageNet notebook, from open_clip."""
    import open_clip

    templates = {"7": open_clip.SIMPLE_IMAGENET_TEMPLATES, "80": open_clip.OPENAI_IMAGENET_TEMPLATES}[which]
    return tuple(template("{}") for template in templates)


def _prompt_file(path: Path) -> Prompts:
    if not path.is_file():
        raise ValueError(f"no prompts {path}; give 7, 80, or a text or JSON file")
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".json":
        return tuple(line.strip() for line in text.splitlines() if line.strip())
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    lists = found.values() if isinstance(found, dict) else [found]
    if not all(isinstance(group, list) and all(isinstance(item, str) for item in group) for group in lists):
        raise ValueError(f"{path} holds neither a list of templates nor lists of sentences by class name")
    return found


def _plain(name: str) -> str:
    return re.sub(r"[\s_]+", " ", name).strip().lower()


def _from_listing(name: str, found: Listing, templates: tuple[str, ...], told: str) -> Dataset:
    def open_split(split: str) -> ImageSplit:
        items = found.splits[split]()
        labels = torch.tensor([label for _, label in items], dtype=torch.int64)
        return ImageSplit(labels, tuple(path for path, _ in items), root=found.root)

    source = f"{found.made_by}; {told}"
    return Dataset(name, found.classnames, templates, tuple(found.splits), source, open_split, found.codes)


def _drawn(data: Dataset, name: str, shots: int, seed: int) -> Dataset:
    """Replace train and val by the few-shot draw; one generator goes through train, then val, as in CoOp."""
    if not {"train", "val"} <= set(data.splits):
        raise ValueError(f"{name}: {data.name} has no train and val to draw from, only {', '.join(data.splits)}")

    def open_split(split: str) -> ImageSplit:
        if split not in ("train", "val"):
            return data.images(split)
        rng, parts = random.Random(seed), {}
        for part, count in (("train", shots), ("val", min(shots, VAL_SHOTS))):
            parts[part] = data.images(part)
            try:
                rows = draw(parts[part].labels, count, rng)
            except ValueError as error:
                raise ValueError(f"{name}, {part}: {error}") from error
            if part == split:
                return parts[part].rows(rows)
        raise AssertionError(split)

    source = f"{data.source}; train and val: the field's draw, seed {seed}"
    return replace(data, name=name, source=source, open_split=open_split)


def _embedded(name: str) -> Dataset:
    world = _world()

    if name == "digits":
        classnames, templates = world.DIGIT_CLASSNAMES, world.DIGIT_TEMPLATES
        splits: tuple[str, ...] = ("train", "val", "test")
    else:
        classnames = world.NOVEL_CLASSNAMES if name == "shapes-novel" else world.CLASSNAMES
        templates = world.TEMPLATES
        splits = ("train", "val", "test") if name in ("shapes", "shapes-spurious") else ("test",)
    source = "the embedded world (lib/world.py)"
    return Dataset(name, classnames, templates, splits, source, lambda split: _render(name, split))


@lru_cache(maxsize=4)
def _render(name: str, split: str) -> ImageSplit:
    world = _world()

    drawn = world.digits(split) if name == "digits" else world.render(name, split)
    ids = tuple(f"{split}/{index}" for index in range(len(drawn.labels)))
    return ImageSplit(drawn.labels, ids, pixels=drawn.images)


def _world():
    sys.path.insert(0, str(ROOT / "data" / "embedded"))
    return importlib.import_module("world")
