"""open_clip and timm: where an encoder's weights are, and how each library reads them.

Checkpoints are read with `weights_only=True`: no file can run code.
"""

import json
import logging
import re
import socket
import urllib.parse
import urllib.request
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lib.files import file_hash, find_path, nearest, one_line

OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
TIMM_KEYS = {"crop": "crop_pct", "mode": "crop_mode"} | {key: key for key in ("interpolation", "mean", "std")}
TIMM_FILES = ("model.safetensors", "pytorch_model.bin")
OPENAI_EXTRAS = ("input_resolution", "context_length", "vocab_size")  # numbers among OpenAI's weights
Tokenizer = Callable[[list[str]], Tensor]
Network = tuple[nn.Module, Tokenizer | None]  # a tokenizer comes with a text tower


@dataclass(frozen=True)
class EncoderSpec:
    """All that decides an encoder's features."""

    name: str
    build: Callable[["EncoderSpec"], Network]
    architecture: str
    weights: Path | None  # None: random ones
    preprocess: Mapping[str, Any]  # size in pixels, resizing, interpolation, mean and std
    settings: Mapping[str, Any] = field(default_factory=dict)  # of timm.create_model, or open_clip's configuration

    @property
    def weights_hash(self) -> str:
        return file_hash(self.weights) if self.weights else f"random weights of {self.architecture}, seed 0"


def open_clip_spec(name: str, rest: str) -> EncoderSpec:
    import open_clip

    if rest.startswith(("hf-hub:", "local-dir:")):
        return _open_clip_folder(name, *rest.split(":", 1))
    architecture, _, tag = rest.partition("/")
    config, card = open_clip.get_model_config(architecture), open_clip.get_pretrained_cfg(architecture, tag)
    if config is None:
        hint = nearest(architecture, open_clip.list_models())
        raise ValueError(f"{name}: open_clip has no architecture {architecture!r}; {hint}")
    if tag == "random":
        weights = None
    elif not card and ("/" in tag or Path(tag).suffix):
        weights = existing(name, tag)
    elif not card:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(architecture)) or "none"
        plain = architecture.removesuffix("-quickgelu")
        hint = f"; {plain} has it, without QuickGELU" if open_clip.get_pretrained_cfg(plain, tag) else ""
        raise ValueError(f"{name}: {architecture} has no tag or file {tag!r}{hint}. Its tags: {tags}")
    elif (matching := matching_gelu(architecture, card)) != architecture:
        trained, built = ("QuickGELU", "GELU") if card.get("quick_gelu") else ("GELU", "QuickGELU")
        gelus = f"these weights were trained with {trained}, the architecture has {built}"
        raise ValueError(f"{name}: {gelus}; the correct name is open_clip:{matching}/{tag}")
    else:
        repository, _, filename = card["hf_hub"].rpartition("/")
        names = (filename,) if filename else OPEN_CLIP_FILES
        weights = _hub_file(name, repository, names, f"open_clip:{architecture}/FILE")
    return EncoderSpec(name, build_open_clip, architecture, weights, _open_clip_preprocess(config, card), config)


def _open_clip_folder(name: str, schema: str, place: str) -> EncoderSpec:
    if schema == "hf-hub":
        folder = _hub_file(name, place, ("open_clip_config.json",), "open_clip:local-dir:FOLDER").parent
        weights = _hub_file(name, place, OPEN_CLIP_FILES, "open_clip:local-dir:FOLDER")
    else:
        folder = existing(name, f"{place}/open_clip_config.json").parent
        files = [path for ending in ("safetensors", "bin", "pt", "pth") for path in sorted(folder.glob(f"*.{ending}"))]
        weights = files[0] if files else existing(name, folder / OPEN_CLIP_FILES[0])
    card = json.loads((folder / "open_clip_config.json").read_text())
    preprocess = _open_clip_preprocess(card["model_cfg"], card.get("preprocess_cfg", {}))
    return EncoderSpec(name, build_open_clip, f"local-dir:{folder}", weights, preprocess, card["model_cfg"])


def _open_clip_preprocess(config: Mapping[str, Any], card: Mapping[str, Any]) -> dict[str, Any]:
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    merged = merge_preprocess_dict(PreprocessCfg(), card) | {"size": config["vision_cfg"].get("image_size", 224)}
    return {key: tuple(value) if isinstance(value, list) else value for key, value in merged.items()}


def matching_gelu(architecture: str, card: Mapping[str, Any]) -> str:
    """The architecture with the activation that the weights were trained with; open_clip itself only warns.

    An architecture with QuickGELU under a plain name (roberta-ViT-B-32) has a card that does not mention it.
    """
    import open_clip

    quick = bool(open_clip.get_model_config(architecture).get("quick_gelu"))
    plain = architecture.removesuffix("-quickgelu")
    other = plain if quick else f"{plain}-quickgelu"
    same = bool(card.get("quick_gelu")) == quick
    return architecture if same or not open_clip.get_model_config(other) else other


def build_open_clip(spec: EncoderSpec) -> Network:
    import open_clip

    if open_clip.get_model_config(spec.architecture) is None:
        open_clip.add_model_config(spec.weights.parent)
    state = _openai_state(spec.weights) if spec.weights else None
    if state and not spec.settings.get("quick_gelu"):
        raise RuntimeError(f"OpenAI's weights were trained with QuickGELU; use {spec.architecture}-quickgelu")
    untrained = {"load_weights": False, "pretrained_image": False, "pretrained_text": False}
    logger, level = logging.getLogger(), logging.getLogger().level
    logger.setLevel(logging.ERROR)  # open_clip warns that weights are not loaded: they are, below, and strictly
    try:
        model = open_clip.create_model(spec.architecture, **untrained)
        if state:
            model.load_state_dict(state)
        elif spec.weights:
            open_clip.load_checkpoint(model, str(spec.weights), strict=True, weights_only=True)
    finally:
        logger.setLevel(level)
    hub = spec.name.removeprefix("open_clip:")  # a hub's own tokenizer does not lie beside its weights
    own = hub.startswith("hf-hub:") and spec.settings["text_cfg"].get("hf_tokenizer_name")
    return model, partial(_tokenize, spec.name, hub if own else spec.architecture)


def _tokenize(name: str, source: str, texts: list[str]) -> Tensor:
    try:
        tokenizer = _tokenizer(source)
    except (ImportError, OSError, RuntimeError) as error:
        raise ValueError(f"{name}: cannot load its tokenizer ({one_line(error)})") from error
    tokens = tokenizer(texts)
    full = int((tokens[:, -1] != 0).sum())
    if full and type(tokenizer).__name__ == "SimpleTokenizer":  # others may pad with another number
        warnings.warn(f"{name}: {full} texts fill its context of {tokens.shape[1]} tokens and may be cut", stacklevel=4)
    return tokens


@lru_cache(maxsize=8)
def _tokenizer(source: str) -> Tokenizer:
    import open_clip

    return open_clip.get_tokenizer(source)


def _openai_state(path: Path) -> dict[str, Tensor] | None:
    """Weights of a file in OpenAI's format, a TorchScript archive or its state dict; None for others.

    A TorchScript archive that OpenAI did not publish is refused: such a file could hold any program.
    """
    if path.suffix == ".safetensors":
        return None
    if zipfile.is_zipfile(path) and any(name.endswith("/constants.pkl") for name in zipfile.ZipFile(path).namelist()):
        if file_hash(path) not in _openai_hashes():
            raise RuntimeError("a TorchScript archive that is not one of OpenAI's; save its state_dict instead")
        state = torch.jit.load(path, map_location="cpu").state_dict()
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or "input_resolution" not in state:
        return None
    return {key: value for key, value in state.items() if key not in OPENAI_EXTRAS}


def _openai_hashes() -> set[str]:
    import open_clip

    urls = [open_clip.get_pretrained_url(model, "openai") for model in open_clip.list_openai_models()]
    return {url.split("/")[-2] for url in urls if "openaipublic" in url}


def timm_spec(name: str, rest: str) -> EncoderSpec:
    import timm
    from timm.data import resolve_data_config
    from timm.models._hub import download_cached_file

    model, _, place = rest.partition("/")
    bare, instead = model.partition(".")[0], f"timm:{model}/FILE"
    if not timm.is_model(bare):
        raise ValueError(f"{name}: timm has no model {bare!r}; {nearest(bare, timm.list_models())}")
    tags = timm.list_pretrained(f"{bare}.*")
    if model != bare and model not in tags:
        raise ValueError(f"{name}: timm has no weights {model!r}; it has {', '.join(tags) or 'none of this model'}")
    card = timm.get_pretrained_cfg(model).to_dict()
    if place:
        weights = None if place == "random" else existing(name, place)
    elif card.get("hf_hub_id"):
        weights = _hub_file(name, card["hf_hub_id"], TIMM_FILES, instead)
    elif not card.get("url"):
        raise ValueError(f"{name}: timm publishes no weights of it; give a file, {instead}, or timm:{model}/random")
    else:
        try:
            weights = Path(download_cached_file(card["url"]))
        except OSError as error:
            raise ValueError(f"{name}: {one_line(error)}; download {card['url']}, name it {instead}") from error
    data = resolve_data_config({}, pretrained_cfg=card)
    preprocess = {"size": tuple(data["input_size"][1:])} | {key: data[theirs] for key, theirs in TIMM_KEYS.items()}
    return EncoderSpec(name, build_timm, model, weights, preprocess)


def build_timm(spec: EncoderSpec) -> Network:
    import timm

    if spec.weights is None:
        return timm.create_model(spec.architecture, pretrained=False, num_classes=0, **spec.settings), None
    # The model is built with as many classes as the file has, so that timm loads it strictly; then the head goes.
    overlay: dict[str, Any] = {"file": str(spec.weights), "custom_load": spec.weights.suffix == ".npz"}
    if not overlay["custom_load"]:
        card, state = timm.get_pretrained_cfg(spec.architecture), timm.models.load_state_dict(str(spec.weights))
        heads = [card.classifier] if isinstance(card.classifier, str) else list(card.classifier or ())
        sizes = [len(state[f"{head}.weight"]) for head in heads if f"{head}.weight" in state]
        overlay["num_classes"] = sizes[0] - (card.label_offset or 0) if sizes else 0
    model = timm.create_model(spec.architecture, pretrained=True, pretrained_cfg_overlay=overlay, **spec.settings)
    model.reset_classifier(0)
    return model, None


def mocov3_spec(name: str, rest: str) -> EncoderSpec:
    # AMU-Tuning feeds MoCo the crop that CLIP gets (short side to 224, bicubic), with ImageNet's mean and std.
    preprocess = {"size": (224, 224), "crop": 1.0, "mode": "center", "interpolation": "bicubic"}
    preprocess |= {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    return EncoderSpec(name, _build_mocov3, "resnet50", existing(name, rest), preprocess)


def _build_mocov3(spec: EncoderSpec) -> Network:
    import timm

    state = timm.models.load_state_dict(str(spec.weights))  # drops the prefix `module.`
    prefix = "base_encoder."
    base = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    if "conv1.weight" not in base:
        first = next(iter(state), None)
        raise RuntimeError(f"no keys module.{prefix}conv1…, so it is not a MoCo v3 ResNet; it has {first!r}")
    model = timm.create_model("resnet50", pretrained=False, num_classes=0)
    model.load_state_dict({key: value for key, value in base.items() if not key.startswith("fc.")})
    return model, None


def existing(name: str, place: str | Path) -> Path:
    """The path of a file that encoder `name` asks for; ValueError where it is not."""
    path = find_path(place)
    if not path.is_file():
        raise ValueError(f"{name}: no file {path}")
    return path


def _hub_file(name: str, repository: str, filenames: Sequence[str], instead: str) -> Path:
    """The first of these files that a repository of the hub has, from its cache on this machine if it is there."""
    from huggingface_hub import constants, errors, hf_hub_download

    host, files = urllib.parse.urlsplit(constants.ENDPOINT).hostname, " or ".join(filenames)
    try:
        for local, missing in ((True, errors.LocalEntryNotFoundError), (False, errors.RemoteEntryNotFoundError)):
            if not local and not urllib.request.getproxies():
                socket.getaddrinfo(host, 443)  # without a proxy an unknown host is final: spare the hub's retries
            for filename in filenames:
                with suppress(missing):
                    return _undamaged(name, Path(hf_hub_download(repository, filename, local_files_only=local)))
    except (OSError, errors.HFValidationError) as error:
        get = f"download {files} from {constants.ENDPOINT}/{repository} on a machine that can"
        fault = f"{name}: {host} does not give {repository} ({one_line(error)})"
        raise ValueError(f"{fault}; {get}, copy it here and name it {instead}") from error
    raise ValueError(f"{name}: {repository} on {host} has no {files}")


def _undamaged(name: str, path: Path) -> Path:
    blob = path.resolve()  # the hub names large files by their sha256
    if re.fullmatch("[0-9a-f]{64}", blob.name) and file_hash(blob) != blob.name:
        raise ValueError(f"{name}: the hub's copy {blob} is damaged (sha256 {file_hash(blob)[:12]}…); delete it")
    return path


SPECS = {"open_clip": open_clip_spec, "timm": timm_spec, "mocov3": mocov3_spec}
