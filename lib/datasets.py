"""A data set by name: images, labels, class names, prompt templates and splits.

Names:

    shapes, shapes-v2, shapes-sketch, shapes-corrupted-1 … -5, shapes-novel, shapes-spurious, digits
                    the embedded world, rendered from its seed
    features:PATH   a bank of features that somebody already has; it holds no images, `features.load` reads it
"""

import difflib
import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from jaxtyping import Int64, UInt8
from PIL import Image
from torch import Tensor

PACKAGE_ROOT = Path(__file__).resolve().parents[1]
EMBEDDED = (
    "shapes",
    "shapes-v2",
    "shapes-sketch",
    *(f"shapes-corrupted-{severity}" for severity in range(1, 6)),
    "shapes-novel",
    "shapes-spurious",
    "digits",
)
GRAMMAR = "features:PATH"


@dataclass(frozen=True)
class ImageSplit:
    """The images of one split, in a fixed order.

    Attributes:
        labels: class index in [0, C).
        ids: what names each image: its path below the data folder, or its index in the rendered split.
        manifest: sha256 over ids, labels and what identifies the pixels.
        pixels: RGB bytes, for images that live in memory.
    """

    labels: Int64[Tensor, " n"]
    ids: tuple[str, ...]
    manifest: str
    pixels: UInt8[Tensor, "n 3 h w"] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index].permute(1, 2, 0).numpy())


@dataclass(frozen=True)
class Dataset:
    """A data set; nothing is decoded or rendered before `images` is called.

    Attributes:
        classnames: as they enter a prompt, in label order.
        templates: prompts with one `{}` for the class name.
        splits: those that `images` accepts.
        source: where class names, templates and splits come from; it belongs in a run's record.
    """

    name: str
    classnames: tuple[str, ...]
    templates: tuple[str, ...]
    splits: tuple[str, ...]
    source: str
    open_split: Callable[[str], ImageSplit] = field(repr=False)

    def images(self, split: str) -> ImageSplit:
        """Return one split.

        Raises:
            ValueError: the data set has no such split.
        """
        if split not in self.splits:
            raise ValueError(f"{self.name} has no split {split!r}; it has {', '.join(self.splits)}")
        return self.open_split(split)


def data_root(root: Path | None = None) -> Path:
    """Return the folder that holds data sets: the argument, else LOGIT_BIAS_DATA, else data/downloads."""
    return Path(root or os.environ.get("LOGIT_BIAS_DATA") or PACKAGE_ROOT / "data" / "downloads")


def find_path(text: str) -> Path:
    """Return a path a user typed: relative ones are looked for here, then below the package root."""
    path = Path(text).expanduser()
    return path if path.is_absolute() or path.exists() else PACKAGE_ROOT / path


def load(name: str, root: Path | None = None) -> Dataset:
    """Return the data set of that name.

    Args:
        name: one of those in the module's docstring.
        root: the folder of downloaded data sets; see `data_root`.

    Raises:
        ValueError: an unknown name, or a bank of features.
    """
    if name in EMBEDDED:
        return _embedded(name)
    if name.startswith("features:"):
        raise ValueError(f"{name} is a bank of features and holds no images; features.load reads it")
    near = difflib.get_close_matches(name, EMBEDDED, n=3, cutoff=0.5)
    hint = f"; near: {', '.join(near)}" if near else ""
    raise ValueError(f"unknown data set {name!r}{hint}. Known: {', '.join(EMBEDDED)}, {GRAMMAR}")


def manifest(ids: Iterable[str], labels: Int64[Tensor, " n"], evidence: Iterable[bytes]) -> str:
    """Return the sha256 over ids, labels and the evidence of the pixels, all in order."""
    digest = hashlib.sha256("\0".join(ids).encode())
    digest.update(labels.contiguous().numpy())
    for part in evidence:
        digest.update(part)
    return digest.hexdigest()


def _embedded(name: str) -> Dataset:
    from lib import world  # here, because it pulls in scipy, scikit-learn and matplotlib

    if name == "digits":
        classnames, templates = world.DIGIT_CLASSNAMES, world.DIGIT_TEMPLATES
        splits = ("train", "val", "test")
    else:
        classnames = world.NOVEL_CLASSNAMES if name == "shapes-novel" else world.CLASSNAMES
        templates = world.TEMPLATES
        splits = ("train", "val", "test") if name in ("shapes", "shapes-spurious") else ("test",)
    source = "the embedded world (lib/world.py)"
    return Dataset(name, classnames, templates, splits, source, lambda split: _render(name, split))


@lru_cache(maxsize=4)
def _render(name: str, split: str) -> ImageSplit:
    from lib import world

    drawn = world.digits(split) if name == "digits" else world.render(name, split)
    ids = tuple(f"{split}/{index}" for index in range(len(drawn.labels)))
    digest = manifest(ids, drawn.labels, [drawn.images.contiguous().numpy().tobytes()])
    return ImageSplit(drawn.labels, ids, digest, drawn.images)
