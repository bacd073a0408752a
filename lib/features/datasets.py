"""A data set by name: images, labels, class names, prompt templates and splits.

Names:

    shapes, shapes-v2, shapes-sketch, shapes-corrupted-1 … -5, shapes-novel, shapes-spurious, digits
                    the embedded world, written by data/embedded/render.py at the first use
    caltech101, oxford_pets, stanford_cars, oxford_flowers, food101, fgvc_aircraft, sun397, dtd, eurosat, ucf101
                    the few-shot benchmarks, in the layout of CoOp's instructions and with CoOp's splits
    imagenet, imagenetv2, imagenet-sketch, imagenet-a, imagenet-r
    folder:PATH     images of one's own: a sub-folder for each class, or train, val and test above them
    csv:PATH        a table with the columns path, label, split
    features:PATH   a bank of features that somebody already has; it holds no images, `features.load` reads it

`NAME@SHOTS/SEED`, such as `dtd@16/1`, is the same data set with the field's own draw: its train is the SHOTS images
of each class that CoOp and Tip-Adapter take under that seed (1 to 3 in papers), its val min(SHOTS, 4) of each. For
ImageNet it spares extracting 1.28 million images.

Data sets lie below data/downloads, or the folder that LOGIT_BIAS_DATA names.
"""

import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from lib.features import sources
from lib.features.images import ImageSplit, draw, shared
from lib.files import data_root, find_path, nearest

__all__ = ["Dataset", "ImageSplit", "load", "names", "prompts", "shared"]
VAL_SHOTS = 4  # CoOp tunes on min(shots, 4) validation images of each class
GRAMMAR = "folder:PATH, csv:PATH, features:PATH, or NAME@SHOTS/SEED for the field's own few-shot draw"
DRAW = re.compile(r"@([1-9]\d*)/(\d+)$")
OWN = {"family": "own", "templates": ["a photo of a {}."]}  # the card of folders and tables
TEMPLATES_FROM = {
    "own": "templates: CLIP's default",
    "generated": "templates: the embedded world's",
    "benchmark": "template: CoOp's and Tip-Adapter's",
    "imagenet": "templates: Tip-Adapter's 7",
}
Prompts = Sequence[str] | Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Dataset:
    """A data set; no file is listed or made before `images` is called, except where the splits need it."""

    name: str
    classnames: tuple[str, ...]  # as they enter a prompt, in label order
    templates: tuple[str, ...]  # prompts with one `{}` for the class name
    splits: tuple[str, ...]  # those that `images` accepts
    source: str  # where class names, splits and templates come from; it belongs in a run's record
    open_split: Callable[[str], ImageSplit] = field(repr=False)
    codes: tuple[str, ...] = field(default=(), repr=False)  # WordNet ids of the classes, where they have them
    aux: tuple[str, ...] = ()  # auxiliary encoders taken by default, where its card names some

    @property
    def base(self) -> str:
        """The name without a few-shot draw."""
        return DRAW.sub("", self.name)

    def images(self, split: str) -> ImageSplit:
        """The images of one split; a generated set is made at the first call."""
        if split in self.splits:
            return self.open_split(split)
        if split == "train" and self.splits == ("test",):
            only = f"it can be tested on (test={self.name!r}), not learned from"
            raise ValueError(f"{self.name} has no split 'train', only test: {only}")
        raise ValueError(f"{self.name} has no split {split!r}; it has {', '.join(self.splits)}")


def names() -> tuple[str, ...]:
    """All names but those with a path or a draw in them."""
    return tuple(sources.cards())


def load(name: str, root: Path | None = None) -> Dataset:
    """The data set of a name that the module's docstring lists; see `data_root` for `root`."""
    few_shot = DRAW.search(name)
    if few_shot:
        return _drawn(load(DRAW.sub("", name), root), name, shots=int(few_shot[1]), seed=int(few_shot[2]))
    prefix, _, path = name.partition(":")
    card = sources.cards().get(name)
    if prefix in ("folder", "csv") and path:
        card, listing = OWN, (sources.folder if prefix == "folder" else sources.csv_file)(find_path(path))
    elif prefix == "features":
        raise ValueError(f"{name} is a bank of features and holds no images; features.load reads it")
    elif card is None:
        raise ValueError(f"unknown data set {name!r}; {nearest(name, names(), count=3)}, {GRAMMAR}")
    else:
        listing = sources.listing(name, data_root(root))
    templates = tuple(card["templates"]) if "templates" in card else ensemble("7")
    source, aux = f"{listing.made_by}; {TEMPLATES_FROM[card['family']]}", tuple(card.get("aux", ()))
    splits = tuple(listing.splits)
    return Dataset(name, listing.classnames, templates, splits, source, listing.images, listing.codes, aux)


def prompts(choice: str | Prompts | None, dataset: Dataset) -> Prompts:
    """Templates with one `{}`, or sentences for every class name of the data set.

    `choice` is None for the data set's own templates; `7` or `80` for the ensembles of OpenAI's ImageNet notebook; the
    path of a text file (a template a line) or a JSON file (a list of templates, or class name to sentences); or the
    templates or sentences themselves.
    """
    if choice is None:
        return dataset.templates
    if isinstance(choice, str):
        choice = ensemble(choice) if choice in ("7", "80") else _prompt_file(find_path(choice))
    if isinstance(choice, Mapping):
        texts = {plain_name(name): tuple(sentences) for name, sentences in choice.items()}
        lacking = [name for name in dataset.classnames if not texts.get(plain_name(name))]
        if lacking:
            sizes = f"sentences are given for {len(texts)} classes, {dataset.name} has {len(dataset.classnames)}"
            raise ValueError(f"{sizes}; {len(lacking)} have none, first {lacking[0]!r}")
        return {name: texts[plain_name(name)] for name in dataset.classnames}
    wrong = [template for template in choice if template.count("{}") != 1]
    if wrong or not choice:
        raise ValueError(f"a template has one {{}} for the class name; got {wrong[0]!r}" if wrong else "no templates")
    return tuple(choice)


def ensemble(which: str) -> tuple[str, ...]:
    """The 7 or the 80 templates of OpenAI's ImageNet notebook, from open_clip."""
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
        prompts = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    lists = prompts.values() if isinstance(prompts, dict) else [prompts]
    if not all(isinstance(group, list) and all(isinstance(item, str) for item in group) for group in lists):
        raise ValueError(f"{path} holds neither a list of templates nor lists of sentences by class name")
    return prompts


def plain_name(name: str) -> str:
    """A class's name as two spellings of it are compared: lower case, one space between words."""
    return re.sub(r"[\s_]+", " ", name).strip().lower()


def _drawn(data: Dataset, name: str, shots: int, seed: int) -> Dataset:
    """The data set with train and val replaced by the few-shot draw."""
    if not {"train", "val"} <= set(data.splits):
        raise ValueError(f"{name}: {data.name} has no train and val to draw from, only {', '.join(data.splits)}")

    def open_split(split: str) -> ImageSplit:
        if split == "test":
            return data.images(split)
        rng = random.Random(seed)  # goes through train, then val, as in CoOp
        for part, count in (("train", shots), ("val", min(shots, VAL_SHOTS))):
            images = data.images(part)
            try:
                rows = draw(images.labels, count, rng, data.classnames)
            except ValueError as error:
                raise ValueError(f"{name}, {part}: {error}") from error
            if part == split:
                break
        return images.rows(rows)

    source = f"{data.source}; train and val: the field's draw, seed {seed}"
    return replace(data, name=name, source=source, open_split=open_split)
