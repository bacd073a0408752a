"""Images of one split: decoding, identity, few-shot draws, and the same picture in two splits.

Decoding shows an image as a person sees it: turned upright by its EXIF orientation, transparency over white,
16-bit grey scaled to 8. Few-shot code of the field ignores the first two; its benchmarks hardly use them.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64
from PIL import Image, ImageOps
from torch import Tensor

from lib.files import file_hash

SPLITS = ("train", "val", "test")
ENDINGS = (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".webp", ".avif", ".tif", ".tiff", ".ppm", ".pgm")
Rows = Int64[Tensor, " m"]
Stats = tuple[tuple[int, int], ...]  # of every file: its size in bytes and its time of change in ns


@dataclass(frozen=True)
class ImageSplit:
    """The images of one split, in a fixed order."""

    labels: Int64[Tensor, " n"]  # class index in [0, C)
    ids: tuple[str, ...]  # each image's path below `root`
    root: Path
    exact: str = ""  # version of the script that made the images: they are then compared by pixels across machines

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Image.Image:
        return decode(self.root / self.ids[index])

    @cached_property
    def manifest(self) -> str:
        """sha256 over ids, labels and what identifies the pixels: those of an exact set, else the files' `stats`."""
        digest = hashlib.sha256("\0".join(self.ids).encode())
        digest.update(self.labels.contiguous().numpy())
        stats = self.stats()
        if self.exact:
            digest.update(f"{self.exact}\n{_pixel_hash(self.root, self.ids, stats)}".encode())
        else:
            digest.update("".join(f"{size} {mtime}\n" for size, mtime in stats).encode())
        return digest.hexdigest()

    def stats(self) -> Stats:
        """Size and time of change of every file; ValueError where one is missing, or a link that leads nowhere."""
        stats, missing = [], []
        for name in self.ids:
            try:
                stat = (self.root / name).stat()
                stats.append((stat.st_size, stat.st_mtime_ns))
            except OSError:
                missing.append(name)
        if missing:
            raise ValueError(f"{len(missing)} of {len(self)} images are not in {self.root}, first {missing[0]}")
        return tuple(stats)

    def rows(self, index: Rows) -> "ImageSplit":
        """The chosen images as a split of their own."""
        return replace(self, labels=self.labels[index], ids=tuple(self.ids[i] for i in index.tolist()))


@lru_cache(maxsize=64)
def _pixel_hash(root: Path, ids: tuple[str, ...], _: Stats) -> str:
    """sha256 of all decoded pixels, computed again where a file has changed."""
    digest = hashlib.sha256()
    for name in ids:
        try:
            image = decode(root / name)
        except Exception as error:  # decoders raise anything
            raise ValueError(f"{root / name} cannot be decoded ({error}); delete {root}, it is made again") from error
        digest.update(f"{image.size}".encode() + image.tobytes())
    return digest.hexdigest()


def decode(path: Path) -> Image.Image:
    """An image file as upright RGB; whatever the decoder raises passes through."""
    with Image.open(path) as image:
        image.load()
        image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would clip it at 255
        values = np.asarray(image, dtype=np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"grey values run from {values.min()} to {values.max()}, expected 0 to 65535")
        return Image.fromarray((values // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers)
    return image.convert("RGB")


def draw(labels: Int64[Tensor, " n"], shots: int, rng: random.Random, classnames: Sequence[str] = ()) -> Rows:
    """Rows of `shots` images of each class, drawn as CoOp, Tip-Adapter and AMU-Tuning do, in the order of the draw.

    `random.sample` goes through the classes in order of appearance, after `random.seed(seed)` at the start of the
    run. Draws of different `shots` are not nested. (Dassl `generate_fewshot_dataset`, the base of CoOp's.)
    """
    groups: dict[int, list[int]] = {}
    for row, label in enumerate(labels.tolist()):
        groups.setdefault(label, []).append(row)
    for label, rows in groups.items():
        if len(rows) < shots:
            raise ValueError(f"{shots} shots asked for, but {_class(label, classnames)} has {len(rows)} images")
    return torch.tensor([row for rows in groups.values() for row in rng.sample(rows, shots)], dtype=torch.int64)


def divide(labels: Int64[Tensor, " n"], fractions: Sequence[float], classnames: Sequence[str]) -> list[Rows]:
    """Rows of each part when every class is divided by `fractions`, which sum to 1, with seed 1; rows stay in order."""
    generator = torch.Generator().manual_seed(1)
    parts: list[list[Tensor]] = [[] for _ in fractions]
    for label in labels.unique().tolist():
        rows = torch.nonzero(labels == label)[:, 0]
        if len(rows) < len(fractions):
            few = f"{_class(label, classnames)} has {len(rows)} images"
            raise ValueError(f"{few}, too few to divide into {len(fractions)} parts")
        sizes = [max(1, round(len(rows) * fraction)) for fraction in fractions[1:]]
        shuffled = rows[torch.randperm(len(rows), generator=generator)]
        for part, chosen in zip(parts, shuffled.split([len(rows) - sum(sizes), *sizes]), strict=True):
            part.append(chosen)
    return [torch.cat(part).sort().values for part in parts]


def _class(label: int, classnames: Sequence[str]) -> str:
    return f"class {classnames[label]!r}" if classnames else f"class {label}"


def shared(first: ImageSplit, second: ImageSplit) -> list[tuple[str, str]]:
    """Pairs of ids whose files are the same byte for byte: a leak, if the splits are support and test.

    The same picture saved twice in different files is not detected.
    """
    sizes = [[size for size, _ in split.stats()] for split in (first, second)]
    suspects = set(sizes[0]) & set(sizes[1])
    ones, others = (
        [(file_hash(split.root / name), name) for name, size in zip(split.ids, listed, strict=True) if size in suspects]
        for split, listed in zip((first, second), sizes, strict=True)
    )
    names = dict(reversed(ones))  # of equal images in `first` the first is named
    return [(names[digest], name) for digest, name in others if digest in names]
