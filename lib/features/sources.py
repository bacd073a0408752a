"""Image files on disk to lists: the few-shot benchmarks, ImageNet's variants, folders of one's own, CSV files.

Nothing is decoded here. `data/benchmarks.json` says where each benchmark lies and what its prompts are.
"""

import csv
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from lib.files import ROOT
from lib.features.images import ENDINGS, divide

SPLITS = ("train", "val", "test")
SHARES = (0.5, 0.2, 0.3)  # of train, val, test where nobody has divided a data set: CoOp's shares
HELD_OUT = 16  # images a class of ImageNet's train that are its val: the last ones by name
Items = list[tuple[str, int]]  # path below the root, class index


@dataclass(frozen=True)
class Listing:
    """A data set as lists of files.

    Attributes:
        root: the folder that paths are relative to.
        classnames: in label order, as a prompt needs them.
        splits: for each split, a function that lists it.
        made_by: who divided the images, and where the class names come from.
        codes: WordNet ids of the classes, where they have them.
    """

    root: Path
    classnames: tuple[str, ...]
    splits: Mapping[str, Callable[[], Items]]
    made_by: str
    codes: tuple[str, ...] = ()


@lru_cache(maxsize=1)
def cards() -> dict[str, dict[str, Any]]:
    """Return data/benchmarks.json as one mapping from a data set's name to its card."""
    table = json.loads((ROOT / "data" / "benchmarks.json").read_text(encoding="utf-8"))
    coop = table["coop"]
    return {
        **{name: {"get": coop, "family": "benchmark", **card} for name, card in table["benchmarks"].items()},
        **{name: {"family": "imagenet", **card} for name, card in table["imagenets"].items()},
    }


def benchmark(name: str, root: Path) -> Listing:
    """List one of the ten benchmarks with CoOp's split, or as torchvision divides it where that file is missing.

    Raises:
        ValueError: files are missing, with what to download and where to put it; a split file that cannot be right.
    """
    card = cards()[name]
    images = _first(root, card["images"])
    if images and card.get("lists"):
        return _aircraft(images, card)
    if images:
        for folder in (images, images.parent):
            if card["split"] and (folder / card["split"]).is_file():
                return _coop(images, folder / card["split"])
    found = _divided(name, card, root, images)
    if found:
        return found
    need = card["images"][0] if not images else f"{Path(card['images'][0]).parent}/{card['split']}"
    raise ValueError(f"{name}: no {need} in {root}; {how_to_get(name)}")


def imagenet(name: str, root: Path) -> Listing:
    """List ImageNet or a variant of it; class names are classnames.txt's beside the images, or open_clip's.

    ImageNet's `test` is its 50,000 validation images, as everywhere; its `val` is the last HELD_OUT images of each
    training class, which `train` then lacks, because the field's own `val` is the test set.

    Raises:
        ValueError: files are missing, or another number of classes than the data set has.
    """
    card = cards()[name]
    images = _first(root, card["images"])
    if not images:
        raise ValueError(f"{name}: no {card['images'][0]} in {root}; {how_to_get(name)}")
    part = images / "val" if name == "imagenet" else images
    folders = sorted(p.name for p in part.iterdir() if p.is_dir()) if part.is_dir() else []
    if len(folders) != card["classes"]:
        raise ValueError(f"{name} has {card['classes']} classes, {part} has {len(folders)} folders; {how_to_get(name)}")
    codes = _wordnet_ids()
    if name == "imagenetv2":  # its folders are called by the class index
        folders = [str(index) for index in range(len(folders))]
    else:
        codes = tuple(folders)
    names, made_by = _imagenet_names(images)
    unknown = [code for code in codes if code not in names]
    if unknown:
        raise ValueError(f"{name}: folder {unknown[0]} ({len(unknown)} in all) has no class name in {made_by}")

    def listed(folder: Path, keep: slice = slice(None)) -> Items:
        lost = [code for code in folders if not (folder / code).is_dir()]
        if lost:
            raise ValueError(f"{name}: {folder} lacks {len(lost)} of {len(folders)} class folders, first {lost[0]}")
        return [
            (str(path.relative_to(images)), label)
            for label, code in enumerate(folders)
            for path in _files(folder / code)[keep]
        ]

    splits: dict[str, Callable[[], Items]] = {"test": lambda: listed(part)}
    if name == "imagenet":
        splits["train"] = lambda: listed(images / "train", slice(None, -HELD_OUT))
        splits["val"] = lambda: listed(images / "train", slice(-HELD_OUT, None))
        made_by += f"; val is the last {HELD_OUT} images of each training class"
    return Listing(images, tuple(names[code] for code in codes), splits, made_by, codes)


def folder(path: Path) -> Listing:
    """List `folder:PATH`: one sub-folder per class, or train, val and test above them.

    Without those, every class is divided 50 : 20 : 30; with train and test only, a fifth of train becomes val.

    Raises:
        ValueError: no such folder, a class without images, classes that differ between splits.
    """
    if not path.is_dir():
        raise ValueError(f"no folder {path}")
    parts = {split: path / split for split in SPLITS if (path / split).is_dir()} or {"all": path}
    classes = {split: _subfolders(place) for split, place in parts.items()}
    names = classes.get("train") or next(iter(classes.values()))
    for split, found in classes.items():
        extra = set(found) - set(names)
        if extra:
            raise ValueError(f"{path}: {split} has class {min(extra)!r}, train has not")
    if not names:
        raise ValueError(f"{path}: no class folders")
    items = {
        split: [
            (str(file.relative_to(path)), names.index(name)) for name in classes[split] for file in _files(place / name)
        ]
        for split, place in parts.items()
    }
    return _completed(path, tuple(_spoken(name) for name in names), items, "folders")


def csv_file(path: Path) -> Listing:
    """List `csv:PATH`: columns path (relative to the file), label (the class's name) and split.

    Raises:
        ValueError: a missing file or column, an empty field, an unknown split, an image in two splits.
    """
    if not path.is_file():
        raise ValueError(f"no file {path}")
    with open(path, newline="", encoding="utf-8-sig") as stream:
        reader = csv.DictReader(stream)
        lacking = {"path", "label", "split"} - set(reader.fieldnames or ())
        if lacking:
            has = ", ".join(reader.fieldnames or ()) or "none"
            raise ValueError(f"{path} has the columns {has}, but path, label, split are needed")
        rows = [(reader.line_num, row["path"], row["label"], row["split"]) for row in reader]
    seen: dict[str, tuple[str, int]] = {}
    for line, image, label, split in rows:
        if not (image and label and split in SPLITS):
            what = f"path {image!r}, label {label!r}, split {split!r}"
            raise ValueError(f"{path}, line {line}: {what}; a split is train, val or test, and nothing may be empty")
        before, place = seen.setdefault(image, (split, line))
        if before != split:
            raise ValueError(f"{path}: {image} is in {before} (line {place}) and in {split} (line {line})")
    names = sorted({row[2] for row in rows}, key=lambda name: (0, int(name), "") if name.isdigit() else (1, 0, name))
    items: dict[str, Items] = {}
    for _, image, label, split in rows:
        items.setdefault(split, []).append((image, names.index(label)))
    return _completed(path.parent, tuple(_spoken(name) for name in names), items, path.name)


def how_to_get(name: str) -> str:
    """Return one line: what to download, and which command does it where one can."""
    card = cards()[name]
    split = f" with {card['split']}" if card.get("split") else ""
    torchvision = card.get("torchvision") and not card.get("no_download")
    command = f"; images alone: python -m lib datasets --download {name}" if torchvision else ""
    return f"get it{split} from {card['get']}{command}"


def download(name: str, root: Path) -> None:
    """Let torchvision download a benchmark's images into `root`.

    Raises:
        ValueError: torchvision does not have it, or the host cannot be reached.
    """
    from torchvision import datasets as tv

    card = cards().get(name, {})
    if not card.get("torchvision") or card.get("no_download"):
        raise ValueError(f"torchvision cannot download {name!r}" + (f"; {how_to_get(name)}" if card else ""))
    options = next(iter(card.get("splits", {}).values()), {})
    try:
        getattr(tv, card["torchvision"])(str(root), download=True, **options)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{name}: torchvision could not download it ({error}); {how_to_get(name)}") from error


# ---- one benchmark, three ways ------------------------------------------------------------------------------


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
            raise ValueError(f"no {path.name} in {images.parent}; {how_to_get('fgvc_aircraft')}")
    names = variants.read_text().splitlines()
    rows = {split: [line.split(" ", 1) for line in path.read_text().splitlines()] for split, path in lists.items()}
    items = {split: [(f"{image}.jpg", names.index(name)) for image, name in found] for split, found in rows.items()}
    return _listing(images, tuple(names), items, "the official lists")


def _divided(name: str, card: Mapping[str, Any], root: Path, images: Path | None) -> Listing | None:
    """List a benchmark without its split file: by class folder, or as torchvision's class divides it."""
    if card.get("by_folder") and images:
        names = [found for found in _subfolders(images) if found not in card.get("ignore", ())]
        items = [(str(file.relative_to(images)), i) for i, found in enumerate(names) for file in _files(images / found)]
        spoken = tuple(_spoken(card["rename"].get(found, found)) for found in names)
        return _completed(images, spoken, {"all": items}, f"folders, for want of {card['split']}")
    if not card.get("splits"):
        return None
    from torchvision import datasets as tv

    try:
        parts = {part: getattr(tv, card["torchvision"])(str(root), **args) for part, args in card["splits"].items()}
    except (RuntimeError, FileNotFoundError):
        return None
    items = {part: sorted(_torchvision_items(found, root)) for part, found in parts.items()}
    names = tuple(_spoken(found) for found in next(iter(parts.values())).classes)
    return _completed(root, names, items, f"torchvision, for want of {card['split']}")


def _torchvision_items(found: Any, root: Path) -> Items:
    files = getattr(found, "_image_files", None) or getattr(found, "_images", None)
    pairs: Iterable[tuple[Any, int]] = zip(files, found._labels, strict=True) if files else found._samples
    return [(str(Path(file).relative_to(root)), label) for file, label in pairs]


def _completed(root: Path, names: tuple[str, ...], items: dict[str, Items], made_by: str) -> Listing:
    """Make the splits that are missing: all from `all`, or val from train."""
    if "all" in items:
        items, made_by = _parted(items["all"], SPLITS, SHARES), f"{made_by}; each class divided 50 : 20 : 30, seed 1"
    elif "train" in items and "val" not in items:
        items = items | _parted(items["train"], ("train", "val"), (0.8, 0.2))
        made_by = f"{made_by}; val is a fifth of each training class, seed 1"
    return _listing(root, names, items, made_by)


def _parted(items: Items, splits: Sequence[str], shares: Sequence[float]) -> dict[str, Items]:
    rows = divide(torch.tensor([label for _, label in items]), shares)
    return {split: [items[row] for row in chosen.tolist()] for split, chosen in zip(splits, rows, strict=True)}


def _listing(root: Path, names: tuple[str, ...], items: Mapping[str, Items], made_by: str) -> Listing:
    made_by = f"class names and splits: {made_by}"
    return Listing(root, names, {s: lambda found=items[s]: found for s in SPLITS if s in items}, made_by)


# ---- small things -------------------------------------------------------------------------------------------


def _first(root: Path, places: Sequence[str]) -> Path | None:
    return next((root / place for place in places if (root / place).is_dir()), None)


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
