"""Features that somebody already has: the workbook's own bank format.

A bank is a folder, named `features:PATH`:

    meta.json                 name (str), class_names (list of str); optional: sha256 (file name to hash of the
                              file), backbones (a mapping whose order is the encoders'), text.logit_scale,
                              text.prompt, and whatever else tells where it comes from
    clip_NAME.safetensors     one tensor per split (train, val, test), [n, D]; float16, float32 or uint8
    aux_NAME.safetensors      the same rows under an auxiliary encoder, [n, Da]
    labels.safetensors        one int64 tensor per split, [n], in [0, number of class names); optional:
                              train_shot_index [n], each row's place in its class: the K-shot support is
                              train_shot_index < K
    text.safetensors          `text` [C, D], or one tensor for each CLIP file, named like it

Row i of a split is the same image in every file. A CLIP file's name starts with `clip`, an auxiliary one's with
`aux`; the name without its ending is the encoder's name.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64, Num
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lib.files import file_hash, find_path

SHOT_INDEX = "train_shot_index"


def folder(name: str) -> Path:
    """Return the folder of `features:PATH`.

    Raises:
        ValueError: it is not a bank.
    """
    path = find_path(name.removeprefix("features:"))
    if not (path / "meta.json").is_file():
        raise ValueError(f"{name}: no meta.json in {path}, so it is not a bank of features")
    return path


def meta(name: str) -> dict[str, Any]:
    """Return meta.json.

    Raises:
        ValueError: it cannot be read, or lacks `name` or `class_names`.
    """
    try:
        found = json.loads((folder(name) / "meta.json").read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{name}: meta.json cannot be read: {error}") from error
    missing = {"name", "class_names"} - set(found)
    if missing:
        raise ValueError(f"{name}: meta.json lacks {', '.join(sorted(missing))}")
    return found


def encoders(name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names of the CLIP files and of the auxiliary files.

    Those that meta.json lists under `backbones` come first and in its order, the rest by name.

    Raises:
        ValueError: there is no CLIP file.
    """
    path = folder(name)
    listed = list(meta(name).get("backbones", ()))
    found = sorted(p.stem for p in path.glob("*.safetensors"))
    found.sort(key=lambda stem: listed.index(stem) if stem in listed else len(listed))
    clip, aux = (tuple(stem for stem in found if stem.startswith(kind)) for kind in ("clip", "aux"))
    if not clip:
        raise ValueError(f"{name}: no file clip*.safetensors")
    return clip, aux


def rows(name: str, split: str, encoder: str) -> tuple[Float[Tensor, "n D"], Int64[Tensor, " n"]]:
    """Return features (float32, in the scale they were stored in) and labels of a split.

    Raises:
        ValueError: a missing file or split, or parts that disagree.
    """
    clip, aux = encoders(name)
    if encoder not in clip + aux:
        raise ValueError(f"{name} has no encoder {encoder!r}; it has {', '.join(clip + aux)}")
    stored, labels = _read(name, encoder), _read(name, "labels")
    for part in (stored, labels):
        if split not in part:
            raise ValueError(f"{name} has no split {split!r}; it has {', '.join(sorted(set(part) - {SHOT_INDEX}))}")
    dims = {part: tuple(x.shape[1:]) for part, x in stored.items()}
    if len(set(dims.values())) > 1:
        raise ValueError(f"{name}, {encoder}: dimensions differ between splits: {dims}")
    x, y = stored[split], labels[split]
    _check(f"{name}, {split}, {encoder}", x, y, len(meta(name)["class_names"]))
    return x.float(), y


def text(name: str, encoder: str) -> Float[Tensor, "C D"]:
    """Return the stored text features of a CLIP file, one row per class.

    Raises:
        ValueError: there are none, or their classes or dimensions disagree with the bank's.
    """
    if encoder not in encoders(name)[0]:
        raise ValueError(f"{name}: {encoder!r} has no text features; CLIP files are {', '.join(encoders(name)[0])}")
    stored = _read(name, "text")
    if encoder not in stored and "text" not in stored:
        raise ValueError(f"{name}: text.safetensors has no tensor {encoder!r} or 'text'; it has {', '.join(stored)}")
    x = stored.get(encoder, stored.get("text"))
    classes = len(meta(name)["class_names"])
    if x.ndim != 2 or len(x) != classes:
        raise ValueError(f"{name}: text features are {tuple(x.shape)}, meta.json names {classes} classes")
    dim = next(iter(_read(name, encoder).values())).shape[1]
    if x.shape[1] != dim:
        raise ValueError(f"{name}: text features have {x.shape[1]} dimensions, {encoder} has {dim}")
    if not torch.isfinite(x).all():
        raise ValueError(f"{name}: text features hold NaN or infinite values")
    return x.float()


def shot_index(name: str) -> Int64[Tensor, " n"] | None:
    """Return each training row's place in its class, if the bank gives it.

    Raises:
        ValueError: it has another length than the training labels.
    """
    labels = _read(name, "labels")
    index = labels.get(SHOT_INDEX)
    if index is not None and len(index) != len(labels.get("train", ())):
        raise ValueError(f"{name}: {len(index)} shot indices for {len(labels.get('train', ()))} training labels")
    return index


def hashes(name: str, *parts: str) -> dict[str, str]:
    """Return the sha256 of some of the bank's files, `clip_x` meaning clip_x.safetensors."""
    return {part: file_hash(folder(name) / f"{part}.safetensors") for part in parts}


def save_bank(
    path: Path,
    *,
    clip: Mapping[str, Mapping[str, Num[Tensor, "_ _"]]],
    aux: Mapping[str, Mapping[str, Num[Tensor, "_ _"]]],
    text: Mapping[str, Float[Tensor, "_ _"]],
    labels: Mapping[str, Int64[Tensor, " _"]],
    class_names: Sequence[str],
    name: str = "",
    **meta: object,
) -> Path:
    """Write a bank; meta.json, with every file's sha256, comes last.

    Args:
        path: a folder that does not exist yet, or is empty.
        clip, aux: encoder name to split to features; names start with `clip` and `aux`.
        text: CLIP encoder name to text features; empty where there are none.
        labels: split to labels, and optionally `train_shot_index`.
        meta: further entries of meta.json.

    Raises:
        ValueError: the folder holds something, a name starts wrongly, or parts disagree.
    """
    if path.exists() and any(path.iterdir()):
        raise ValueError(f"{path} is not empty; a bank is written into a new folder")
    for kind, group in (("clip", clip), ("aux", aux)):
        for encoder, splits in group.items():
            if not encoder.startswith(kind):
                raise ValueError(f"{kind} features are named {kind}…, not {encoder!r}")
            for split, x in splits.items():
                if split not in labels:
                    raise ValueError(f"{encoder} has split {split!r}, labels have {', '.join(labels)}")
                _check(f"{encoder}, {split}", x, labels[split], len(class_names))
    for encoder, x in text.items():
        if encoder not in clip:
            raise ValueError(f"text features for {encoder!r}, CLIP features for {', '.join(clip)}")
        if len(x) != len(class_names):
            raise ValueError(f"text features of {encoder} have {len(x)} rows, there are {len(class_names)} class names")
    path.mkdir(parents=True, exist_ok=True)
    files = {**clip, **aux, "labels": labels} | ({"text": text} if text else {})
    for stem, tensors in files.items():
        save_file({key: x.contiguous() for key, x in tensors.items()}, path / f"{stem}.safetensors")
    sums = {f"{stem}.safetensors": file_hash(path / f"{stem}.safetensors") for stem in files}
    record = {"name": name or path.name, "class_names": list(class_names), **meta, "sha256": sums}
    partial = path / "meta.json.partial"
    partial.write_text(json.dumps(record, indent=1, ensure_ascii=False), encoding="utf-8")
    os.replace(partial, path / "meta.json")
    return path


def _read(name: str, stem: str) -> dict[str, Tensor]:
    """Return the tensors of one file, mapped into memory, after comparing its sha256 with the one in meta.json."""
    path = folder(name) / f"{stem}.safetensors"
    if not path.is_file():
        raise ValueError(f"{name}: no file {path.name}")
    expected = meta(name).get("sha256", {}).get(path.name)
    if expected and file_hash(path) != expected:
        raise ValueError(
            f"{name}: {path.name} has sha256 {file_hash(path)[:12]}…, meta.json says {expected[:12]}…; "
            "the file is damaged or was replaced, restore it from its source"
        )
    try:
        with safe_open(path, framework="pt") as stored:
            return {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{name}: {path.name} cannot be read: {error}") from error


def _check(what: str, x: Num[Tensor, "..."], y: Int64[Tensor, "..."], classes: int) -> None:
    if x.ndim != 2 or y.ndim != 1:
        raise ValueError(f"{what}: features must be [n, D] and labels [n], not {tuple(x.shape)} and {tuple(y.shape)}")
    if len(x) != len(y):
        raise ValueError(f"{what}: {len(x)} rows of features, {len(y)} labels")
    if len(y) and (int(y.min()) < 0 or int(y.max()) >= classes):
        raise ValueError(f"{what}: labels run from {int(y.min())} to {int(y.max())}, there are {classes} class names")
    if x.is_floating_point() and not torch.isfinite(x).all():
        bad = int((~torch.isfinite(x).all(dim=1)).sum())
        raise ValueError(f"{what}: {bad} of {len(x)} rows hold NaN or infinite values")
