"""A first look at a folder of photographs: what is in it, what is broken or there twice, and the splits it gets."""

import csv
import hashlib
import io
import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from lib.features import sources
from lib.features.images import ENDINGS, decode
from lib.files import one_line, replace_file

KEPT_FIRST = ("test", "val", "train", "all")  # of equal pictures the one in the first of these stays


@dataclass(frozen=True)
class Survey:
    """What decoding every image of a folder has shown; images are named by their path below it."""

    sizes: Mapping[str, tuple[int, int]]  # width and height of each image that can be decoded
    broken: Mapping[str, str]  # the others, with the reason
    equal: Sequence[Sequence[tuple[str, str, int]]]  # groups of equal pixels: split, image, class; the first one stays

    @property
    def left_out(self) -> set[str]:
        """Broken images, and all but one of equal ones."""
        return {*self.broken, *(image for group in self.equal for _, image, _ in group[1:])}

    def doubles(self) -> dict[str, list]:
        """Groups of equal pictures by what is wrong with them; one under two classes counts there alone."""
        kinds = defaultdict(list)
        for group in self.equal:
            splits, classes = {split for split, _, _ in group}, {label for _, _, label in group}
            kind = "under two classes" if len(classes) > 1 else "in two splits" if len(splits) > 1 else "within a split"
            kinds[kind].append(group)
        return dict(kinds)


def look(root: Path, items: Mapping[str, sources.Items]) -> Survey:
    """Decode every image once, on all cores."""
    listed = [(split, image, label) for split in KEPT_FIRST for image, label in items.get(split, ())]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        outcomes = pool.map(lambda item: _pixels(root / item[1]), listed)
        outcomes = list(tqdm(outcomes, total=len(listed), unit="img", desc="decoding", disable=None))
    sizes, broken, groups = {}, {}, defaultdict(list)
    for item, (size, digest, reason) in zip(listed, outcomes, strict=True):
        if reason:
            broken[item[1]] = reason
        else:
            sizes[item[1]] = size
            groups[digest].append(item)
    return Survey(sizes, broken, [group for group in groups.values() if len(group) > 1])


def unused(root: Path, items: Mapping[str, sources.Items]) -> Counter:
    """Other files below a folder, counted by their ending; `images elsewhere` lie outside of the class folders."""
    listed = {root / image for part in items.values() for image, _ in part}
    files = (p for p in root.rglob("*") if p.is_file() and not p.name.startswith(".") and p not in listed)
    return Counter("images elsewhere" if p.suffix.lower() in ENDINGS else p.suffix.lower() or p.name for p in files)


def write_splits(path: Path, listing: sources.Listing) -> Path:
    """Write a table that `csv:PATH` reads: path (relative to the table), label, split."""
    rows = [["path", "label", "split"]]
    for split in listing.splits:
        for image, label in listing.splits[split]():
            rows.append([os.path.relpath(listing.root / image, path.parent), listing.classnames[label], split])
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return replace_file(path, lambda stream: stream.write(text.getvalue().encode("utf-8")))


def _pixels(path: Path) -> tuple[tuple[int, int], str, str]:
    try:
        image = decode(path)
        return image.size, hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest(), ""
    except Exception as error:  # decoders raise anything
        return (0, 0), "", f"{type(error).__name__}: {one_line(error)}"
