"""Encoders of a few thousand random weights, in the layout of data/embedded, and image files to feed them."""

import hashlib
import json
from pathlib import Path

import numpy as np
import open_clip
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 2}
TINY = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def tiny_clip(folder: Path, name: str = "tiny-quickgelu", **changes: object) -> torch.nn.Module:
    """Register a small CLIP under `name` in open_clip and return it with random weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(TINY | changes))
    open_clip.add_model_config(folder)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return open_clip.create_model(name, pretrained_text=False).eval()


def write_embedded(folder: Path) -> Path:
    """Write index.json with a CLIP, a convolutional network and a vision transformer."""
    index = {}
    nets = {
        "clip": ("open_clip", "tiny-quickgelu", {}, tiny_clip(folder)),
        "conv": ("timm", "test_byobnet", {}, timm.create_model("test_byobnet", num_classes=0)),
        "vit": ("timm", "vit_tiny_patch16_224", VIT, timm.create_model("vit_tiny_patch16_224", num_classes=0, **VIT)),
    }
    for name, (kind, architecture, settings, net) in nets.items():
        path = folder / f"{name}.safetensors"
        save_file({key: value.contiguous() for key, value in net.state_dict().items()}, path)
        entry = {"file": path.name, "kind": kind, "architecture": architecture, "settings": settings}
        entry |= {"image_size": 32, "mean": MEAN, "std": STD, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        index[name] = entry
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def photo(seed: int, size: tuple[int, int] = (40, 36)) -> Image.Image:
    """A smooth random picture; no two seeds look alike."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def write_folder(
    root: Path, classes: int = 3, images: int = 4, splits: tuple[str, ...] = ("train", "val", "test")
) -> Path:
    """Write `root`/split/class/image.png, or `root`/class/image.png where `splits` is empty."""
    seed = 0
    for split in splits or ("",):
        for label in range(classes):
            place = root / split / f"class_{label}"
            place.mkdir(parents=True, exist_ok=True)
            for number in range(images):
                photo(seed).save(place / f"image_{number:03d}.png")
                seed += 1
    return root
