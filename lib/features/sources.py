"""Image files on disk to lists: the few-shot benchmarks, ImageNet's variants, generated sets, own folders, CSV files.

Nothing is decoded here. `data/benchmarks.json` says where each data set lies and what its prompts are; for a
generated set it names the script that writes it, which runs at the first use.
"""

import csv
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from lib.features.images import ENDINGS, SPLITS, ImageSplit, divide
from lib.files import ROOT

FRACTIONS = {"train": 0.5, "val": 0.2, "test": 0.3}  # where nobody has divided a data set: CoOp's
VAL_IMAGES = 16  # images a class of ImageNet's train that are its val: the last ones by name
VAL_NAMES = ("val", "valid", "validation", "dev")  # what a folder beside train or test may be called
Items = list[tuple[str, int]]  # path below the root, class index


@dataclass(frozen=True)
class Listing:
    """A data set as lists of files."""

    root: Path  # the folder that paths are relative to
    classnames: tuple[str, ...]  # in label order, as a prompt needs them
    splits: Mapping[str, Callable[[], Items]]  # for each split, a function that lists it
    made_by: str  # who divided the images, and where the class names come from
    codes: tuple[str, ...] = ()  # WordNet ids of the classes, where they have them
    exact: str = ""  # the version of the script that makes the images; see ImageSplit

    def images(self, split: str) -> ImageSplit:
        items = self.splits[split]()
        labels = torch.tensor([label for _, label in items], dtype=torch.int64)
        return ImageSplit(labels, tuple(path for path, _ in items), self.root, self.exact)


@lru_cache(maxsize=1)
def cards() -> dict[str, dict[str, Any]]:
    """data/benchmarks.json as one mapping from a data set's name to its card."""
    table = json.loads((ROOT / "data" / "benchmarks.json").read_text(encoding="utf-8"))
    generated = table["generated"]
    common = {"family": "generated", "script": table["script"], "version": table["version"]}
    return {
        **{name: {**common, **generated.get(card.get("like"), {}), **card} for name, card in generated.items()},
        **{name: {"family": "benchmark", "get": table["coop"], **card} for name, card in table["benchmarks"].items()},
        **{name: {"family": "imagenet", **card} for name, card in table["imagenets"].items()},
    }


def listing(name: str, root: Path) -> Listing:
    """The listing of a data set that has a card; where files are missing, an error says what to download and where."""
    families = {"generated": _generated, "benchmark": _benchmark, "imagenet": _imagenet}
    return families[cards()[name]["family"]](name, root)


def _generated(name: str, root: Path) -> Listing:
    """Class folders that a script makes when a split is first listed; their path carries the script's version."""
    card = cards()[name]
    folder, script = root / card["version"] / name, card["script"]
    labels = {spoken.replace(" ", "_"): label for label, spoken in enumerate(card["classnames"])}

    def listed(split: str) -> Items:
        if not folder.is_dir():
            command = [sys.executable, ROOT / script, name, "--root", root.resolve()]
            made = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)  # its bar goes to our stderr
            if made.returncode:
                reason = made.stdout.strip() or f"exit status {made.returncode}"
                raise ValueError(f"{name} could not be made: {reason}; try python {script} {name}")
        items = _items(folder, folder / split, labels)
        return sorted(items, key=lambda item: Path(item[0]).name)  # row i is the i-th image that was drawn

    splits = {split: partial(listed, split) for split in card["splits"]}
    return Listing(folder, tuple(card["classnames"]), splits, f"class names and splits: {script}", (), card["version"])


# ---- benchmarks ---------------------------------------------------------------------------------------------


def _benchmark(name: str, root: Path) -> Listing:
    """One of the ten benchmarks with CoOp's split; published numbers were measured on no other."""
    card, images = cards()[name], _image_folder(name, root)
    if "lists" in card:
        return _aircraft(images, card)
    for folder in (images, images.parent):
        if (folder / card["split"]).is_file():
            return _coop(images, folder / card["split"])
    place = Path(card["images"][0])
    need = (place.parent if len(place.parts) > 1 else place) / card["split"]
    raise ValueError(f"{name}: no {need} in {root}; {_how_to_get(card)}; numbers on another division do not compare")


def _image_folder(name: str, root: Path) -> Path:
    card = cards()[name]
    for place in card["images"]:
        if (root / place).is_dir():
            return root / place
    raise ValueError(f"{name}: no {card['images'][0]} in {root}; {_how_to_get(card)}")


def _how_to_get(card: Mapping[str, Any]) -> str:
    return f"get it{' with ' + card['split'] if 'split' in card else ''} from {card['get']}"


def _coop(images: Path, split_file: Path) -> Listing:
    split = json.loads(split_file.read_text(encoding="utf-8"))
    names: dict[int, str] = {}
    for _, label, name in (row for rows in split.values() for row in rows):
        if names.setdefault(int(label), name) != name:
            raise ValueError(f"{split_file.name}: label {label} is both {names[int(label)]!r} and {name!r}")
    if sorted(names) != list(range(len(names))):
        raise ValueError(f"{split_file.name}: labels are not 0 to {len(names) - 1}: {min(names)} to {max(names)}")
    items = {part: [(path, int(label)) for path, label, _ in rows] for part, rows in split.items() if rows}
    return _listing(images, tuple(_spoken(names[label]) for label in range(len(names))), items, split_file.name)


def _aircraft(images: Path, card: Mapping[str, Any]) -> Listing:
    lists = {split: images.parent / card["lists"].format(split) for split in SPLITS}
    variants = images.parent / "variants.txt"
    for path in (variants, *lists.values()):
        if not path.is_file():
            raise ValueError(f"no {path.name} in {images.parent}; {_how_to_get(card)}")
    names = variants.read_text().splitlines()
    rows = {split: [line.split(" ", 1) for line in path.read_text().splitlines()] for split, path in lists.items()}
    items = {split: [(f"{image}.jpg", names.index(name)) for image, name in lines] for split, lines in rows.items()}
    return _listing(images, tuple(names), items, "the official lists")


def _imagenet(name: str, root: Path) -> Listing:
    """ImageNet or a variant of it; class names are classnames.txt's beside the images, or open_clip's.

    ImageNet's `test` is its 50,000 validation images, as everywhere; its `val` is the last VAL_IMAGES images of each
    training class, which `train` then lacks, because the field's own `val` is the test set.
    """
    card, images = cards()[name], _image_folder(name, root)
    part = images / "val" if name == "imagenet" else images
    folders = _subfolders(part) if part.is_dir() else []
    if len(folders) != card["classes"]:
        sizes = f"{name} has {card['classes']} classes, {part} has {len(folders)} folders"
        raise ValueError(f"{sizes}; {_how_to_get(card)}")
    codes = tuple(folders)
    if name == "imagenetv2":  # its folders are called by the class index
        codes, folders = _wordnet_ids(), [str(index) for index in range(len(folders))]
    names, made_by = _imagenet_names(images)
    unknown = [code for code in codes if code not in names]
    if unknown:
        raise ValueError(f"{name}: folder {unknown[0]} ({len(unknown)} in all) has no class name in {made_by}")

    labels = {folder: label for label, folder in enumerate(folders)}
    train = partial(_items, images, images / "train", labels)
    splits: dict[str, Callable[[], Items]] = {"test": partial(_items, images, part, labels)}
    if name == "imagenet":
        splits["train"] = partial(train, slice(None, -VAL_IMAGES))
        splits["val"] = partial(train, slice(-VAL_IMAGES, None))
        made_by += f"; val is the last {VAL_IMAGES} images of each training class"
    return Listing(images, tuple(names[code] for code in codes), splits, made_by, codes)


# ---- own images ---------------------------------------------------------------------------------------------


def folder(path: Path, without: Container[str] = ()) -> Listing:
    """The listing of `folder:PATH`: one sub-folder per class, or train, val and test above them.

    Without those, every class is divided 50 : 20 : 30; with train and test only, a fifth of train becomes val. Images
    in `without`, named by their path below the folder, are left out.
    """
    labels, items = folder_items(path)
    kept = {split: [item for item in part if item[0] not in without] for split, part in items.items()}
    return _completed(path, labels, kept, "folders")


def folder_items(path: Path) -> tuple[dict[str, int], dict[str, Items]]:
    """Classes of a folder and its images by split, `all` where it has none, before anything is divided."""
    if not path.is_dir():
        raise ValueError(f"no folder {path}")
    parts = _split_folders(path) or {"all": path}
    classes = {split: _subfolders(place) for split, place in parts.items()}
    labels = {name: c for c, name in enumerate(classes.get("train") or next(iter(classes.values())))}
    for split, names in classes.items():
        extra = set(names) - set(labels)
        if extra:
            raise ValueError(f"{path}: {split} has class {min(extra)!r}, train has not")
    if not labels:
        raise ValueError(f"{path}: no class folders; the images of a class lie in a sub-folder of its name")
    items = {split: _items(path, place, {n: labels[n] for n in classes[split]}) for split, place in parts.items()}
    return labels, items


def _split_folders(path: Path) -> dict[str, Path]:
    parts = {split: path / split for split in SPLITS if (path / split).is_dir()}
    if "train" in parts or "test" in parts:  # without those, a folder called dev is a class
        val = [path / name for name in VAL_NAMES if (path / name).is_dir()]
        if len(val) > 1:
            raise ValueError(f"{path} has both {val[0].name} and {val[1].name}; only one can be the validation images")
        parts.update(zip(("val",), val, strict=False))
    return parts


def csv_file(path: Path) -> Listing:
    """The listing of `csv:PATH`: columns path (relative to the file), label (the class's name) and split."""
    if not path.is_file():
        raise ValueError(f"no file {path}")
    try:
        with open(path, newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            columns = reader.fieldnames or ()
            rows = [(reader.line_num, row) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is not a CSV file in UTF-8: {error}") from error
    if not {"path", "label", "split"} <= set(columns):
        has = ", ".join(columns) or "none"
        raise ValueError(f"{path} has the columns {has}, but path, label, split are needed")
    if not rows:
        raise ValueError(f"{path} lists no images")
    names = {row["label"] for _, row in rows if row["label"]}
    in_order = sorted(names, key=lambda name: (0, int(name), name) if name.isdecimal() else (1, 0, name))
    labels = {name: c for c, name in enumerate(in_order)}
    items: dict[str, Items] = {}
    places: dict[str, str] = {}
    for line, row in rows:
        image, label, split = row["path"], row["label"], row["split"]
        if not (image and label and split in SPLITS):
            what = f"path {image!r}, label {label!r}, split {split!r}"
            raise ValueError(f"{path}, line {line}: {what}; a split is train, val or test, and nothing may be empty")
        if None in row:
            raise ValueError(f"{path}, line {line}: {len(columns)} fields are expected, {row[None][0]!r} is one more")
        place = f"in {split} as {label!r} (line {line})"
        first_place = places.setdefault(os.path.normpath(image), place)
        if first_place != place:
            raise ValueError(f"{path}: {image} is {first_place} and {place}")
        items.setdefault(split, []).append((image, labels[label]))
    return _completed(path, labels, items, path.name)


def _completed(path: Path, names: Iterable[str], items: dict[str, Items], made_by: str) -> Listing:
    """The listing of own images with the splits that are missing: all from `all`, or val from train."""
    spoken: dict[str, str] = {}
    for name in names:
        other = spoken.setdefault(_spoken(name), name)
        if other != name:
            raise ValueError(f"{path}: {other!r} and {name!r} are two classes of one name, {_spoken(name)!r}")
    whole, fractions = [], {}
    if "all" in items:
        whole, fractions = items["all"], FRACTIONS
        made_by += "; each class divided 50 : 20 : 30, seed 1"
    elif "train" in items and "val" not in items:
        whole, fractions = items["train"], {"train": 0.8, "val": 0.2}
        made_by += "; val is a fifth of each training class, seed 1"
    if whole:
        parts = divide(torch.tensor([label for _, label in whole]), list(fractions.values()), list(spoken))
        items |= {split: [whole[i] for i in rows.tolist()] for split, rows in zip(fractions, parts, strict=True)}
    return _listing(path if path.is_dir() else path.parent, tuple(spoken), items, made_by)


def _listing(root: Path, names: tuple[str, ...], items: Mapping[str, Items], made_by: str) -> Listing:
    splits = {split: lambda part=items[split]: part for split in SPLITS if split in items}
    return Listing(root, names, splits, f"class names and splits: {made_by}")


def _items(root: Path, place: Path, labels: Mapping[str, int], keep: slice = slice(None)) -> Items:
    """The images of class folders below `place`, paths relative to `root`; `labels` has a label for every folder."""
    lost = [name for name in labels if not (place / name).is_dir()]
    if lost:
        raise ValueError(f"{place} lacks {len(lost)} of {len(labels)} class folders, first {lost[0]}")
    return [(str(p.relative_to(root)), label) for name, label in labels.items() for p in _files(place / name)[keep]]


def _files(place: Path) -> list[Path]:
    files = [p for p in sorted(place.iterdir()) if p.suffix.lower() in ENDINGS and not p.name.startswith(".")]
    if not files:
        raise ValueError(f"no images in {place}")
    return files


def _subfolders(place: Path) -> list[str]:
    return sorted(p.name for p in place.iterdir() if p.is_dir() and not p.name.startswith("."))


def _spoken(name: str) -> str:
    """A class's name as it stands in a prompt: CoOp and Tip-Adapter put spaces for underscores."""
    return re.sub(r"\s+", " ", name.replace("_", " ")).strip()


def _wordnet_ids() -> tuple[str, ...]:
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    return tuple(info.index_to_label_name(index) for index in range(info.num_classes()))


def _imagenet_names(images: Path) -> tuple[dict[str, str], str]:
    for place in (images, images.parent):
        if (place / "classnames.txt").is_file():
            lines = (place / "classnames.txt").read_text(encoding="utf-8").splitlines()
            return dict(line.strip().split(" ", 1) for line in lines if line.strip()), "class names: classnames.txt"
    import open_clip

    return dict(zip(_wordnet_ids(), open_clip.IMAGENET_CLASSNAMES, strict=True)), "class names: open_clip's"
