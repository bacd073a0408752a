"""Where an encoder comes from: a name to weights, architecture and preprocessing, without building a model.

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
"""

import difflib
import json
import re
import socket
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lib.files import ROOT, file_hash, find_path, one_line

EMBEDDED_FOLDER = ROOT / "data" / "embedded"
GRAMMAR = (
    "embedded:NAME, open_clip:ARCHITECTURE/TAG-or-FILE, open_clip:hf-hub:OWNER/MODEL, open_clip:local-dir:FOLDER, "
    "timm:MODEL.TAG, timm:MODEL/FILE, mocov3:FILE"
)
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
TIMM_FILES = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class Recipe:
    """All that decides an encoder's features, found without building it.

    Attributes:
        library: `open_clip`, `timm` or `mocov3`; it says how `weights` is read.
        architecture: the library's own name for it.
        weights: the checkpoint; None for random weights.
        preprocess: size in pixels, resizing, interpolation, mean and std.
        settings: further arguments of timm.create_model, or open_clip's configuration of the model.
        weights_hash: sha256 of the checkpoint.
    """

    name: str
    library: str
    architecture: str
    weights: Path | None
    preprocess: Mapping[str, Any]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def weights_hash(self) -> str:
        return file_hash(self.weights) if self.weights else f"random weights of {self.architecture}, seed 0"


def resolve(name: str) -> Recipe:
    """Find an encoder's weights and preprocessing; a hub is asked only for files that are not here yet.

    Raises:
        ValueError: an unknown name, a missing file, a QuickGELU mismatch, or a hub that cannot be reached.
    """
    prefix, _, rest = name.partition(":")
    finders = {"embedded": _embedded, "open_clip": _open_clip, "timm": _timm, "mocov3": _mocov3}
    if prefix in finders and rest:
        return finders[prefix](name, rest)
    known = [f"embedded:{key}" for key in embedded_index()]
    near = difflib.get_close_matches(name, known + [f"{key}:" for key in finders], n=3, cutoff=0.4)
    hint = f"; near: {', '.join(near)}" if near else ""
    raise ValueError(f"unknown encoder {name!r}{hint}. Encoders are named {GRAMMAR}")


def listed() -> list[str]:
    """Return all names without a path: embedded, open_clip's tags and timm's, those with the wrong GELU left out."""
    import open_clip
    import timm

    tags = []
    for architecture, tag in open_clip.list_pretrained():
        config, card = open_clip.get_model_config(architecture), open_clip.get_pretrained_cfg(architecture, tag)
        if _right_gelu(architecture, config, card) == architecture:
            tags.append(f"open_clip:{architecture}/{tag}")
    return [
        *(f"embedded:{key}" for key in embedded_index()),
        *tags,
        *(f"timm:{name}" for name in timm.list_pretrained()),
    ]


def embedded_index() -> dict[str, dict[str, Any]]:
    """Return data/embedded/index.json, or nothing where the embedded models have not been trained."""
    path = EMBEDDED_FOLDER / "index.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _embedded(name: str, rest: str) -> Recipe:
    index = embedded_index()
    if rest not in index:
        listed = ", ".join(f"embedded:{key}" for key in index) or "none: run notebook 90, which trains them"
        raise ValueError(f"unknown encoder {name!r}; embedded encoders are {listed}")
    entry = index[rest]
    weights = _existing(name, str(EMBEDDED_FOLDER / entry["file"]))
    if file_hash(weights) != entry["sha256"]:
        raise ValueError(
            f"{name}: {weights.name} has sha256 {file_hash(weights)[:12]}…, its index says {entry['sha256'][:12]}…; "
            "restore the file or run notebook 90"
        )
    size, colours = entry["image_size"], {"mean": tuple(entry["mean"]), "std": tuple(entry["std"])}
    preprocess = {"size": size, "mode": "RGB", "interpolation": "bicubic", "resize_mode": "shortest", **colours}
    settings, config = entry.get("settings", {}), EMBEDDED_FOLDER / f"{entry['architecture']}.json"
    if entry["kind"] == "open_clip":
        settings = json.loads(_existing(name, str(config)).read_text())
    return Recipe(name, entry["kind"], entry["architecture"], weights, preprocess, settings)


def _open_clip(name: str, rest: str) -> Recipe:
    import open_clip

    if rest.startswith(("hf-hub:", "local-dir:")):
        schema, _, place = rest.partition(":")
        if schema == "hf-hub":
            folder = _hub_file(name, place, ("open_clip_config.json",), "open_clip:local-dir:FOLDER").parent
            weights = _hub_file(name, place, OPEN_CLIP_FILES, "open_clip:local-dir:FOLDER")
        else:
            folder = _existing(name, f"{place}/open_clip_config.json").parent
            found = [p for ending in ("safetensors", "bin", "pt", "pth") for p in sorted(folder.glob(f"*.{ending}"))]
            weights = found[0] if found else _existing(name, f"{folder}/{OPEN_CLIP_FILES[0]}")
        config = json.loads((folder / "open_clip_config.json").read_text())
        preprocess = _clip_preprocess(config["model_cfg"], config.get("preprocess_cfg", {}))
        return Recipe(name, "open_clip", f"local-dir:{folder}", weights, preprocess, config["model_cfg"])

    architecture, _, tag = rest.partition("/")
    config = open_clip.get_model_config(architecture)
    if config is None:
        near = difflib.get_close_matches(architecture, open_clip.list_models(), n=3, cutoff=0.3)
        raise ValueError(f"{name}: open_clip has no architecture {architecture!r}; near: {', '.join(near)}")
    card = open_clip.get_pretrained_cfg(architecture, tag)
    preprocess = _clip_preprocess(config, card)
    if tag == "random":
        return Recipe(name, "open_clip", architecture, None, preprocess, config)
    if not card and ("/" in tag or Path(tag).suffix):
        return Recipe(name, "open_clip", architecture, _existing(name, tag), preprocess, config)
    plain = architecture.removesuffix("-quickgelu")
    if not card:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(architecture)) or "none"
        hint = f"; {plain} has it, without QuickGELU" if open_clip.get_pretrained_cfg(plain, tag) else ""
        raise ValueError(f"{name}: {architecture} has no tag or file {tag!r}{hint}. Its tags: {tags}")
    right = _right_gelu(architecture, config, card)
    if right != architecture:
        raise ValueError(
            f"{name}: these weights were trained with {_gelu(card)}, the architecture has {_gelu(config)}; "
            f"the right name is open_clip:{right}/{tag}"
        )
    owner, model, filename = [*card["hf_hub"].split("/"), ""][:3]
    names = (filename,) if filename else OPEN_CLIP_FILES
    weights = _hub_file(name, f"{owner}/{model}", names, f"open_clip:{architecture}/FILE")
    return Recipe(name, "open_clip", architecture, weights, preprocess, config)


def _timm(name: str, rest: str) -> Recipe:
    import timm
    from timm.data import resolve_data_config
    from timm.models._hub import download_cached_file

    model, _, place = rest.partition("/")
    bare = model.partition(".")[0]
    if not timm.is_model(bare):
        near = difflib.get_close_matches(bare, timm.list_models(), n=3, cutoff=0.4)
        raise ValueError(f"{name}: timm has no model {bare!r}; near: {', '.join(near)}")
    tags = timm.list_pretrained(f"{bare}.*")
    if model != bare and model not in tags:
        raise ValueError(f"{name}: timm has no weights {model!r}; it has {', '.join(tags) or 'none of this model'}")
    card = timm.get_pretrained_cfg(model).to_dict()
    data = resolve_data_config({}, pretrained_cfg=card)
    preprocess = {
        "size": tuple(data["input_size"][1:]),
        "crop": data["crop_pct"],
        "mode": data["crop_mode"],
        "interpolation": data["interpolation"],
        "mean": tuple(data["mean"]),
        "std": tuple(data["std"]),
    }
    if place:
        return Recipe(name, "timm", model, None if place == "random" else _existing(name, place), preprocess)
    instead = f"timm:{model}/FILE"
    if card.get("hf_hub_id"):
        weights = _hub_file(name, card["hf_hub_id"], TIMM_FILES, instead)
    elif card.get("url"):
        try:
            weights = Path(download_cached_file(card["url"]))
        except OSError as error:
            raise ValueError(
                f"{name}: {one_line(error)}. Download {card['url']} elsewhere; name it {instead}"
            ) from error
    else:
        raise ValueError(f"{name}: timm publishes no weights of it; give a file, {instead}, or timm:{model}/random")
    return Recipe(name, "timm", model, weights, preprocess)


def _mocov3(name: str, rest: str) -> Recipe:
    # AMU-Tuning feeds MoCo the crop that CLIP gets (short side to 224, bicubic), with ImageNet's mean and std.
    preprocess = {"size": (224, 224), "crop": 1.0, "mode": "center", "interpolation": "bicubic", **IMAGENET}
    return Recipe(name, "mocov3", "resnet50", _existing(name, rest), preprocess)


def _clip_preprocess(config: Mapping[str, Any], card: Mapping[str, Any]) -> dict[str, Any]:
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    merged = merge_preprocess_dict(PreprocessCfg(), card) | {"size": config["vision_cfg"].get("image_size", 224)}
    return {key: tuple(value) if isinstance(value, list) else value for key, value in merged.items()}


def _right_gelu(architecture: str, config: Mapping[str, Any], card: Mapping[str, Any]) -> str:
    """Return the architecture with the activation that the weights were trained with.

    An architecture with QuickGELU under a plain name (roberta-ViT-B-32) has a card that does not mention it.
    """
    import open_clip

    plain = architecture.removesuffix("-quickgelu")
    right = plain if config.get("quick_gelu") else f"{plain}-quickgelu"
    return architecture if _gelu(card) == _gelu(config) or not open_clip.get_model_config(right) else right


def _gelu(config: Mapping[str, Any]) -> str:
    return "QuickGELU" if config.get("quick_gelu") else "GELU"


def _existing(name: str, place: str) -> Path:
    path = find_path(place)
    if not path.is_file():
        raise ValueError(f"{name}: no file {path}")
    return path


def _hub_file(name: str, repository: str, filenames: Sequence[str], instead: str) -> Path:
    """Return a file of the hub, from its cache on this machine if it is there."""
    from huggingface_hub import constants, errors, hf_hub_download, try_to_load_from_cache

    for filename in filenames:
        cached = try_to_load_from_cache(repository, filename)
        if isinstance(cached, str):
            blob = Path(cached).resolve()
            if re.fullmatch("[0-9a-f]{64}", blob.name) and file_hash(blob) != blob.name:
                raise ValueError(
                    f"{name}: the hub's copy {blob} is damaged (sha256 {file_hash(blob)[:12]}…); delete it"
                )
            return Path(cached)
    host = urllib.parse.urlsplit(constants.ENDPOINT).hostname
    say = (
        f"download {' or '.join(filenames)} from {constants.ENDPOINT}/{repository} on a machine that can, "
        f"copy it here and name it {instead}"
    )
    try:
        if not urllib.request.getproxies():  # without a proxy an unknown host is final: spare the hub's retries
            socket.getaddrinfo(host, 443)
        for filename in filenames:
            try:
                return Path(hf_hub_download(repository, filename))
            except errors.RemoteEntryNotFoundError:
                continue
    except (OSError, errors.HfHubHTTPError, ValueError) as error:
        raise ValueError(f"{name}: {host} does not give {repository} ({one_line(error)}); {say}") from error
    raise ValueError(f"{name}: {repository} on {host} has no {' or '.join(filenames)}")
