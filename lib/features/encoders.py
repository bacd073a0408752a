"""Encoders by name: images to features, and for CLIP also texts to features.

Names:

    embedded:NAME                     a small encoder of data/embedded; `embedded:clip` has a text tower
    open_clip:ARCHITECTURE/TAG        open_clip's own weights, such as open_clip:RN50-quickgelu/openai
    open_clip:ARCHITECTURE/FILE       a checkpoint on disk: open_clip's, or OpenAI's own archive
    open_clip:hf-hub:OWNER/MODEL      a model of the hub with open_clip_config.json
    open_clip:local-dir:FOLDER        the same two files in a folder
    timm:MODEL.TAG  timm:MODEL        timm's weights, such as timm:vit_small_patch16_224.dino
    timm:MODEL.TAG/FILE               a checkpoint on disk, with or without its classifier
    mocov3:FILE                       the MoCo v3 ResNet-50 as its authors publish it
    …/random                          in place of TAG or FILE: random weights of seed 0, the floor of a comparison

Features come out in the encoder's own scale; nothing is normalised here.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pickle import UnpicklingError
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lib.features import libraries
from lib.features.libraries import TIMM_KEYS, EncoderSpec, Tokenizer, existing, matching_gelu
from lib.files import ROOT, file_hash, nearest, one_line

EMBEDDED_FOLDER = ROOT / "data" / "embedded"
GRAMMAR = """embedded:NAME, open_clip:ARCHITECTURE/TAG-or-FILE, open_clip:hf-hub:OWNER/MODEL, \
open_clip:local-dir:FOLDER, timm:MODEL.TAG, timm:MODEL/FILE, mocov3:FILE"""
PRECISIONS = ("fp32", "bf16")
TEXT_BATCH = 256


@dataclass(frozen=True)
class Encoder:
    """A network in evaluation mode with its preprocessing."""

    name: str
    dim: int  # length of a feature
    transform: Callable[..., Tensor]  # PIL image to a normalised tensor [3, h, w]
    augment: Callable[..., Tensor]  # the same with a random crop and flip, drawn from torch's global generator
    device: torch.device
    precision: str
    logit_scale: float | None  # the learned temperature, exp(t); None for an image encoder
    model: nn.Module = field(repr=False)
    tokenizer: Tokenizer | None = field(repr=False)  # comes with a text tower

    @torch.no_grad()
    def encode_images(self, batch: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b D"]:
        """Features in the encoder's own scale: float32, on the CPU, not normalised."""
        batch = batch.to(self.device, memory_format=torch.channels_last, non_blocking=True)
        with self._arithmetic():
            return getattr(self.model, "encode_image", self.model)(batch).float().cpu()

    @torch.no_grad()
    def encode_text(self, texts: list[str]) -> Float[Tensor, "n D"]:
        """Text features in the encoder's own scale; ValueError without a text tower or its tokenizer."""
        if self.tokenizer is None:
            raise ValueError(f"{self.name} encodes images only; texts need a CLIP encoder (embedded:clip, open_clip:…)")
        parts = []
        for start in range(0, len(texts), TEXT_BATCH):
            tokens = self.tokenizer(texts[start : start + TEXT_BATCH])
            with self._arithmetic():
                parts.append(self.model.encode_text(tokens.to(self.device)).float().cpu())
        return torch.cat(parts)

    @contextmanager
    def _arithmetic(self) -> Iterator[None]:
        # cuDNN would otherwise round fp32 convolutions to TF32, and pick algorithms by their speed of the day.
        exact = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
        with exact, torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            yield


def load_encoder(name: str, device: str = "auto", precision: str = "fp32") -> Encoder:
    """An encoder with its weights, in `fp32`, or in `bf16` by autocast; features are float32 either way.

    A `device` of torch, or `auto`: CUDA, then Apple's MPS, then the CPU.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {' or '.join(PRECISIONS)}, not {precision!r}")
    place, spec = _device(device), resolve(name)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, tokenizer = spec.build(spec)
    except Exception as error:  # a file of anybody's may fail in any way; its name matters
        plain = isinstance(error, (RuntimeError, ValueError, OSError, UnpicklingError))
        why = one_line(error) if plain else f"it is not a checkpoint ({type(error).__name__}: {one_line(error)})"
        what = spec.weights or "random weights"
        raise ValueError(f"{name}: cannot read {what} as {spec.architecture}: {why}") from error
    model = model.eval().requires_grad_(False).to(place, memory_format=torch.channels_last)
    size = spec.preprocess["size"]
    size = (size, size) if isinstance(size, int) else size
    with torch.no_grad():
        dim = getattr(model, "encode_image", model)(torch.zeros(1, 3, *size, device=place)).shape[-1]
    scale = float(model.logit_scale.exp()) if tokenizer else None
    return Encoder(name, dim, *_transforms(size, spec.preprocess), place, precision, scale, model, tokenizer)


def resolve(name: str) -> EncoderSpec:
    """An encoder's weights and preprocessing; a hub is asked only for files that are not on this machine yet."""
    library, _, rest = name.partition(":")
    specs = {"embedded": _embedded_spec} | libraries.SPECS
    if library in specs and rest:
        return specs[library](name, rest)
    hint = nearest(name, [f"embedded:{key}" for key in embedded_index()] + [f"{key}:" for key in specs])
    raise ValueError(f"unknown encoder {name!r}; {hint}. Encoders are named {GRAMMAR}")


def listed() -> list[str]:
    """All names without a path: embedded, open_clip's tags and timm's, those with the wrong GELU left out."""
    import open_clip
    import timm

    tags = open_clip.list_pretrained()
    tags = [(net, tag) for net, tag in tags if matching_gelu(net, open_clip.get_pretrained_cfg(net, tag)) == net]
    names = [f"embedded:{key}" for key in embedded_index()] + [f"open_clip:{net}/{tag}" for net, tag in tags]
    return names + [f"timm:{key}" for key in timm.list_pretrained()]


def embedded_index() -> dict[str, dict[str, Any]]:
    """data/embedded/index.json; empty where the embedded models have not been trained."""
    path = EMBEDDED_FOLDER / "index.json"
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {one_line(error)}; restore the file") from error


def _embedded_spec(name: str, rest: str) -> EncoderSpec:
    index = embedded_index()
    if rest not in index:
        renamed = EMBEDDED_FOLDER / "renamed.json"
        now = json.loads(renamed.read_text()).get(rest) if renamed.is_file() else None
        hint = nearest(name, [f"embedded:{key}" for key in index]) if index else "run python data/embedded/train.py"
        if now:
            hint = f"it no longer ships, use {' or '.join(f'embedded:{key}' for key in now)}"
        raise ValueError(f"unknown encoder {name!r}; {hint}")
    entry = index[rest]
    weights = existing(name, EMBEDDED_FOLDER / entry["file"])
    if file_hash(weights) != entry["sha256"]:
        differs = f"has sha256 {file_hash(weights)[:12]}…, its index says {entry['sha256'][:12]}…"
        raise ValueError(f"{name}: {weights.name} {differs}; restore it or run python data/embedded/train.py")
    preprocess = {"size": entry["image_size"], "mode": "RGB", "interpolation": "bicubic", "resize_mode": "shortest"}
    preprocess |= {"mean": tuple(entry["mean"]), "std": tuple(entry["std"])}
    build, settings = libraries.build_timm, entry.get("settings", {})
    if entry["kind"] == "open_clip":
        config = existing(name, EMBEDDED_FOLDER / f"{entry['architecture']}.json")
        build, settings = libraries.build_open_clip, json.loads(config.read_text())
    return EncoderSpec(name, build, entry["architecture"], weights, preprocess, settings)


def _transforms(size: tuple[int, int], preprocess: Mapping[str, Any]) -> tuple[Callable[..., Tensor], ...]:
    """The plain transform, and the random crop and flip with which few-shot methods augment a support."""
    from torchvision import transforms as T

    if "crop" in preprocess:
        from timm.data import create_transform

        plain = create_transform((3, *size), **{theirs: preprocess[key] for key, theirs in TIMM_KEYS.items()})
    else:
        from open_clip.transform import PreprocessCfg, image_transform_v2

        plain = image_transform_v2(PreprocessCfg(**preprocess), is_train=False)
    crop = T.RandomResizedCrop(size, scale=(0.5, 1.0), interpolation=T.InterpolationMode.BICUBIC)
    normalise = T.Normalize(preprocess["mean"], preprocess["std"])
    return plain, T.Compose([crop, T.RandomHorizontalFlip(), T.ToTensor(), normalise])


def _device(name: str) -> torch.device:
    if name == "auto":
        mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        return torch.zeros(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used here: {one_line(error)}; `auto` picks one") from error
