"""Images of one split: decoding, identity, few-shot draws, and the same picture on both sides.

Decoding shows an image as a person sees it: turned upright by its EXIF orientation, transparency over white,
16-bit grey scaled to 8. Few-shot code of the field ignores the first two; its benchmarks hardly use them.
"""

import hashlib
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from PIL import Image, ImageOps
from torch import Tensor

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


@dataclass(frozen=True)
class ImageSplit:
    """The images of one split, in a fixed order; they lie below `root`, or in `pixels`.

    Attributes:
        labels: class index in [0, C).
        ids: what names each image: its path below `root`, or its index in the rendered split.
        pixels: RGB bytes, for images that live in memory.
    """

    labels: Int64[Tensor, " n"]
    ids: tuple[str, ...]
    root: Path | None = None
    pixels: UInt8[Tensor, "n 3 h w"] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Image.Image:
        if self.pixels is None:
            return decode(self.root / self.ids[index])
        return Image.fromarray(self.pixels[index].permute(1, 2, 0).numpy())

    @cached_property
    def manifest(self) -> str:
        """sha256 over ids, labels and what identifies the pixels: their bytes, or each file's size and time of change.

        Raises:
            ValueError: a file is missing.
        """
        digest = hashlib.sha256("\0".join(self.ids).encode())
        digest.update(self.labels.contiguous().numpy())
        if self.pixels is not None:
            digest.update(self.pixels.contiguous().numpy())
            return digest.hexdigest()
        missing = []
        for name in self.ids:
            try:
                stat = (self.root / name).stat()
                digest.update(f"{stat.st_size} {stat.st_mtime_ns}\n".encode())
            except OSError:
                missing.append(name)
        if missing:
            raise ValueError(f"{len(missing)} of {len(self)} images are not in {self.root}, first {missing[0]}")
        return digest.hexdigest()

    def rows(self, index: Int64[Tensor, " m"]) -> "ImageSplit":
        """Return the chosen images as a split of their own."""
        ids = tuple(self.ids[i] for i in index.tolist())
        return ImageSplit(self.labels[index], ids, self.root, None if self.pixels is None else self.pixels[index])


def decode(path: Path) -> Image.Image:
    """Read an image file as upright RGB.

    Raises:
        ValueError, OSError, SyntaxError: whatever the decoder finds wrong.
    """
    with Image.open(path) as image:
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would clip it at 255
        values = np.asarray(image, dtype=np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"grey values run from {values.min()} to {values.max()}, expected 0 to 65535")
        return Image.fromarray((values // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers).convert("RGB")
    return image.convert("RGB")


def draw(labels: Int64[Tensor, " n"], shots: int, rng: random.Random) -> Int64[Tensor, " m"]:
    """Draw `shots` images of each class as CoOp, Tip-Adapter and AMU-Tuning do; rows in the order of the draw.

    `random.sample` goes through the classes in order of appearance, after `random.seed(seed)` at the start of the
    run. Draws of different `shots` are not nested. (Dassl `generate_fewshot_dataset`, the base of CoOp's.)

    Raises:
        ValueError: a class has fewer images.
    """
    groups: dict[int, list[int]] = defaultdict(list)
    for row, label in enumerate(labels.tolist()):
        groups[label].append(row)
    poorest = min(groups, key=lambda label: len(groups[label]))
    if len(groups[poorest]) < shots:
        raise ValueError(f"{shots} shots asked for, but class {poorest} has {len(groups[poorest])} images")
    return torch.tensor([row for rows in groups.values() for row in rng.sample(rows, shots)])


def divide(labels: Int64[Tensor, " n"], shares: Sequence[float], seed: int = 1) -> list[Int64[Tensor, " m"]]:
    """Divide every class at random by `shares`, which sum to 1; each part keeps the order of the rows.

    Raises:
        ValueError: a class has fewer images than there are parts.
    """
    generator = torch.Generator().manual_seed(seed)
    parts: list[list[Tensor]] = [[] for _ in shares]
    for label in labels.unique().tolist():
        rows = torch.nonzero(labels == label)[:, 0]
        if len(rows) < len(shares):
            raise ValueError(f"class {label} has {len(rows)} images, too few to divide into {len(shares)} parts")
        sizes = [max(1, round(len(rows) * share)) for share in shares[1:]]
        shuffled = rows[torch.randperm(len(rows), generator=generator)]
        for part, chosen in zip(parts, shuffled.split([len(rows) - sum(sizes), *sizes]), strict=True):
            part.append(chosen)
    return [torch.cat(part).sort().values for part in parts]


def shared(first: ImageSplit, second: ImageSplit) -> list[tuple[str, str]]:
    """Return pairs of ids whose images are the same byte for byte: a leak, if the splits are support and test.

    The same picture saved twice in different files is not found.
    """
    sizes = [_sizes(split) for split in (first, second)]
    suspects = set(sizes[0]) & set(sizes[1])
    known: dict[str, str] = {}
    for row, size in enumerate(sizes[0]):
        if size in suspects:
            known.setdefault(_content(first, row), first.ids[row])
    rows = [row for row, size in enumerate(sizes[1]) if size in suspects]
    pairs = [(known.get(_content(second, row)), second.ids[row]) for row in rows]
    return [(one, other) for one, other in pairs if one is not None]


def _sizes(split: ImageSplit) -> list[int]:
    return [0] * len(split) if split.pixels is not None else [(split.root / name).stat().st_size for name in split.ids]


def _content(split: ImageSplit, row: int) -> str:
    if split.pixels is not None:
        return hashlib.sha256(split.pixels[row].contiguous().numpy()).hexdigest()
    with open(split.root / split.ids[row], "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
