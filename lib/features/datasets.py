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

import torch

from lib.features import sources
from lib.features.images import ImageSplit, draw, shared
from lib.features.sources import Listing
from lib.files import data_root, find_path, nearest

__all__ = ["Dataset", "ImageSplit", "load", "names", "prompts", "shared"]
VAL_SHOTS = 4  # CoOp tunes on min(shots, 4) validation images of each class
GRAMMAR = "folder:PATH, csv:PATH, features:PATH, or NAME@SHOTS/SEED for the field's own few-shot draw"
DRAW = re.compile(r"@([1-9]\d*)/(\d+)$")
TEMPLATES_FROM = {
    "generated": "templates: the embedded world's",
    "benchmark": "template: CoOp's and Tip-Adapter's",
    "imagenet": "templates: Tip-Adapter's 7",
}
Prompts = Sequence[str] | Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Dataset:
    """A data set; no file is listed or made before `images` is called, except where the splits need it.

    Attributes:
        classnames: as they enter a prompt, in label order.
        templates: prompts with one `{}` for the class name.
        splits: those that `images` accepts.
        source: where class names, splits and templates come from; it belongs in a run's record.
        codes: WordNet ids of the classes, where they have them.
        aux: the auxiliary encoders that are taken by default, where its card names some.
    """

    name: str
    classnames: tuple[str, ...]
    templates: tuple[str, ...]
    splits: tuple[str, ...]
    source: str
    open_split: Callable[[str], ImageSplit] = field(repr=False)
    codes: tuple[str, ...] = field(default=(), repr=False)
    aux: tuple[str, ...] = ()

    @property
    def base(self) -> str:
        """The name without a few-shot draw."""
        return DRAW.sub("", self.name)

    def images(self, split: str) -> ImageSplit:
        """The images of one split; a generated set is made at the first call.

        Raises:
            ValueError: the data set has no such split, or no such files.
        """
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
    """The data set of that name.

    Args:
        name: one of those in the module's docstring.
        root: the folder of downloaded and generated data sets; see `data_root`.

    Raises:
        ValueError: an unknown name, a bank of features, or files that are missing.
    """
    few_shot = DRAW.search(name)
    if few_shot:
        return _drawn(load(DRAW.sub("", name), root), name, shots=int(few_shot[1]), seed=int(few_shot[2]))
    prefix, _, path = name.partition(":")
    if prefix in ("folder", "csv") and path:
        listing = sources.folder(find_path(path)) if prefix == "folder" else sources.csv_file(find_path(path))
        return _from_listing(name, listing, ("a photo of a {}.",), "templates: CLIP's default")
    if prefix == "features":
        raise ValueError(f"{name} is a bank of features and holds no images; features.load reads it")
    card = sources.cards().get(name)
    if card is None:
        raise ValueError(f"unknown data set {name!r}; {nearest(name, names(), count=3)}, {GRAMMAR}")
    templates = tuple(card["templates"]) if "templates" in card else ensemble("7")
    listing = sources.listing(name, data_root(root))
    return _from_listing(name, listing, templates, TEMPLATES_FROM[card["family"]], tuple(card.get("aux", ())))


def prompts(choice: str | Prompts | None, dataset: Dataset) -> Prompts:
    """The prompts that a name stands for.

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


def _plain(name: str) -> str:
    return re.sub(r"[\s_]+", " ", name).strip().lower()


def _from_listing(
    name: str, listing: Listing, templates: tuple[str, ...], templates_from: str, aux: tuple[str, ...] = ()
) -> Dataset:
    def open_split(split: str) -> ImageSplit:
        items = listing.splits[split]()
        labels = torch.tensor([label for _, label in items], dtype=torch.int64)
        return ImageSplit(labels, tuple(path for path, _ in items), listing.root, listing.exact)

    source = f"{listing.made_by}; {templates_from}"
    splits = tuple(listing.splits)
    return Dataset(name, listing.classnames, templates, splits, source, open_split, listing.codes, aux)


def _drawn(data: Dataset, name: str, shots: int, seed: int) -> Dataset:
    """The data set with train and val replaced by the few-shot draw.

    One generator goes through train, then val, as in CoOp.
    """
    if not {"train", "val"} <= set(data.splits):
        raise ValueError(f"{name}: {data.name} has no train and val to draw from, only {', '.join(data.splits)}")

    def open_split(split: str) -> ImageSplit:
        if split == "test":
            return data.images(split)
        rng = random.Random(seed)
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
