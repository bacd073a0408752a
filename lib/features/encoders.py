"""An encoder by name: images to features, and for CLIP also texts to features.

The names are those of `recipes`. Checkpoints are read by open_clip and timm with `weights_only=True`: no file
can run code. Features come out in the encoder's own scale; nothing is normalised here.
"""

import logging
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lib.features import recipes
from lib.features.recipes import Recipe, resolve
from lib.files import file_hash, one_line

PRECISIONS = ("fp32", "bf16")
TEXT_BATCH = 256
OPENAI_EXTRAS = ("input_resolution", "context_length", "vocab_size")  # numbers among OpenAI's weights


@dataclass(frozen=True)
class Encoder:
    """A network in evaluation mode with its preprocessing.

    Attributes:
        kind: `clip` (images and texts) or `image`.
        dim: length of a feature.
        transform: PIL image to a normalised tensor [3, h, w].
        augment: the same with a random crop and flip, drawn from torch's global generator.
        logit_scale: the learned temperature, exp(t); None for an image encoder.
    """

    name: str
    kind: str
    dim: int
    transform: Callable[..., Tensor]
    augment: Callable[..., Tensor]
    weights_hash: str
    device: torch.device
    precision: str
    logit_scale: float | None
    model: nn.Module = field(repr=False)
    tokenizer: Callable[[list[str]], Tensor] | None = field(repr=False)

    @torch.no_grad()
    def encode_images(self, batch: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b D"]:
        """Return features in the encoder's own scale: float32, on the CPU, not normalised."""
        batch = batch.to(self.device, memory_format=torch.channels_last, non_blocking=True)
        encode = self.model.encode_image if self.kind == "clip" else self.model
        with self._arithmetic():
            return encode(batch).float().cpu()

    @torch.no_grad()
    def encode_text(self, texts: list[str]) -> Float[Tensor, "n D"]:
        """Return text features in the encoder's own scale.

        Raises:
            ValueError: this encoder has no text tower.
        """
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


def load(name: str, device: str = "auto", precision: str = "fp32") -> Encoder:
    """Build an encoder and read its weights.

    Args:
        name: see `recipes`.
        device: `auto` takes CUDA, then Apple's MPS, then the CPU; or a name that torch knows.
        precision: `fp32`, or `bf16` for autocast; features are float32 either way.

    Raises:
        ValueError: an unknown name, device or precision; weights that are missing, unreachable or of another model.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {' or '.join(PRECISIONS)}, not {precision!r}")
    place, recipe = _device(device), resolve(name)
    try:
        model, tokenizer = _build(recipe)
    except Exception as error:  # a file of anybody's may fail in any way; its name matters
        what = recipe.weights.name if recipe.weights else "random weights"
        raise ValueError(f"{name}: cannot read {what} as {recipe.architecture}: {one_line(error)}") from error
    model = model.eval().requires_grad_(False).to(place, memory_format=torch.channels_last)
    transform, augment = _transforms(recipe.preprocess)
    kind = "image" if tokenizer is None else "clip"
    probe = torch.zeros(1, 3, *_height_width(recipe.preprocess["size"]), device=place)
    with torch.no_grad():
        dim = (model.encode_image if kind == "clip" else model)(probe).shape[-1]
    scale = float(model.logit_scale.exp()) if kind == "clip" else None
    return Encoder(name, kind, dim, transform, augment, recipe.weights_hash, place, precision, scale, model, tokenizer)


def _build(recipe: Recipe) -> tuple[nn.Module, Callable[[list[str]], Tensor] | None]:
    """Return the network with its weights, and a tokenizer if it has a text tower."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if recipe.library == "open_clip":
            return _build_open_clip(recipe)
        if recipe.library == "mocov3":
            return _build_mocov3(recipe), None
        return _build_timm(recipe), None


def _build_open_clip(recipe: Recipe) -> tuple[nn.Module, Callable[[list[str]], Tensor]]:
    import open_clip

    if open_clip.get_model_config(recipe.architecture) is None:
        open_clip.add_model_config(recipes.EMBEDDED_FOLDER)
    state = _openai_state(recipe.weights) if recipe.weights else None
    if state and not open_clip.get_model_config(recipe.architecture).get("quick_gelu"):
        raise RuntimeError(f"OpenAI's weights were trained with QuickGELU; use {recipe.architecture}-quickgelu")
    with _quiet():
        untrained = {"load_weights": False, "pretrained_image": False, "pretrained_text": False}
        model = open_clip.create_model(recipe.architecture, **untrained)
        if state:
            model.load_state_dict(state)
        elif recipe.weights:
            open_clip.load_checkpoint(model, str(recipe.weights), strict=True, weights_only=True)
    hub = recipe.name.removeprefix("open_clip:")  # a hub's own tokenizer does not lie beside its weights
    source = hub if hub.startswith("hf-hub:") and recipe.settings["text_cfg"].get("hf_tokenizer_name") else None
    return model, partial(_tokenize, recipe.name, source or recipe.architecture)


def _tokenize(name: str, source: str, texts: list[str]) -> Tensor:
    import open_clip

    try:
        tokenizer = _tokenizer(source)
    except (ImportError, OSError, RuntimeError) as error:
        raise ValueError(f"{name}: its tokenizer is not to be had ({one_line(error)})") from error
    tokens = tokenizer(texts)
    cut = int((tokens[:, -1] != 0).sum()) if isinstance(tokenizer, open_clip.SimpleTokenizer) else 0
    if cut:
        told = f"{name}: {cut} texts fill its context of {tokens.shape[1]} tokens and may be cut"
        warnings.warn(told, stacklevel=4)
    return tokens


@lru_cache(maxsize=8)
def _tokenizer(source: str) -> Callable[[list[str]], Tensor]:
    import open_clip

    return open_clip.get_tokenizer(source)


def _openai_state(path: Path) -> dict[str, Tensor] | None:
    """Return the weights of a file in OpenAI's format, a TorchScript archive or its state dict; None for others.

    Raises:
        RuntimeError: a TorchScript archive that OpenAI did not publish; such a file could hold any program.
    """
    state = None
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            scripted = any(member.endswith("/constants.pkl") for member in archive.namelist())
        if scripted and file_hash(path) not in _openai_hashes():
            raise RuntimeError("a TorchScript archive that is not one of OpenAI's; save its state_dict instead")
        state = torch.jit.load(path, map_location="cpu").state_dict() if scripted else None
    if state is None and path.suffix != ".safetensors":
        state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or "input_resolution" not in state:
        return None
    return {key: value for key, value in state.items() if key not in OPENAI_EXTRAS}


def _openai_hashes() -> set[str]:
    import open_clip

    urls = [open_clip.get_pretrained_url(model, "openai") for model in open_clip.list_openai_models()]
    return {url.split("/")[-2] for url in urls if "openaipublic" in url}


def _build_timm(recipe: Recipe) -> nn.Module:
    import timm

    card = timm.get_pretrained_cfg(recipe.architecture)
    if recipe.weights is None:
        return timm.create_model(recipe.architecture, pretrained=False, num_classes=0, **recipe.settings)
    # The model is built with as many classes as the file has, so that timm loads it strictly; then the head goes.
    overlay: dict[str, Any] = {"file": str(recipe.weights), "custom_load": recipe.weights.suffix == ".npz"}
    if not overlay["custom_load"]:
        state = timm.models.load_state_dict(str(recipe.weights))
        heads = [card.classifier] if isinstance(card.classifier, str) else list(card.classifier or ())
        sizes = [len(state[f"{head}.weight"]) for head in heads if f"{head}.weight" in state]
        overlay["num_classes"] = sizes[0] - (card.label_offset or 0) if sizes else 0
    model = timm.create_model(recipe.architecture, pretrained=True, pretrained_cfg_overlay=overlay, **recipe.settings)
    model.reset_classifier(0)
    return model


def _build_mocov3(recipe: Recipe) -> nn.Module:
    import timm

    state = timm.models.load_state_dict(str(recipe.weights))  # drops the prefix `module.`
    prefix = "base_encoder."
    backbone = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    if "conv1.weight" not in backbone:
        raise RuntimeError(
            f"no keys module.{prefix}conv1…, so it is not a MoCo v3 ResNet; it has {next(iter(state), None)!r}"
        )
    model = timm.create_model("resnet50", pretrained=False, num_classes=0)
    model.load_state_dict({key: value for key, value in backbone.items() if not key.startswith("fc.")})
    return model


def _transforms(preprocess: Mapping[str, Any]) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Return the plain transform, and the random crop and flip with which few-shot methods augment a support."""
    from torchvision import transforms as T

    size = _height_width(preprocess["size"])
    if "crop" in preprocess:
        from timm.data import create_transform

        plain = create_transform(
            (3, *size),
            crop_pct=preprocess["crop"],
            crop_mode=preprocess["mode"],
            interpolation=preprocess["interpolation"],
            mean=preprocess["mean"],
            std=preprocess["std"],
        )
    else:
        from open_clip.transform import PreprocessCfg, image_transform_v2

        plain = image_transform_v2(PreprocessCfg(**preprocess), is_train=False)
    crop = T.RandomResizedCrop(size, scale=(0.5, 1.0), interpolation=T.InterpolationMode.BICUBIC)
    normalise = T.Normalize(preprocess["mean"], preprocess["std"])
    return plain, T.Compose([crop, T.RandomHorizontalFlip(), T.ToTensor(), normalise])


def _height_width(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _device(name: str) -> torch.device:
    if name == "auto":
        mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        return torch.zeros(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used here: {one_line(error)}; `auto` picks one") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence open_clip's warning that weights are not loaded: they are, one line later, and strictly."""
    root, level = logging.getLogger(), logging.getLogger().level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)
