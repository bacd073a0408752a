"""Features that somebody already has: the workbook's own bank format.

A bank is a folder, named `features:PATH`:

    meta.json                 name (str), class_names (list of different str); optional: sha256 (file name to hash of
                              the file), backbones (a mapping or list whose order is the encoders'),
                              text.logit_scale, text.prompt, and whatever else says where it comes from
    clip_NAME.safetensors     one tensor per split (train, val, test), [n, D]; float16, float32 or uint8
    aux_NAME.safetensors      the same rows under an auxiliary encoder, [n, Da]; any number of files, or none
    labels.safetensors        one integer tensor per split, [n], in [0, number of class names)
    text.safetensors          `text` [C, D], or one tensor for each CLIP file, named like it; optional
    prompts.safetensors       `prompts` [C, P, D], or likewise: the rows of P prompts per class; optional, beside text

Row i of a split is the same image in every file. A CLIP file's name starts with `clip`, an auxiliary one's with
`aux`; the name without its ending is the encoder's name.
"""

import json
import os
import shutil
import uuid
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lib.features.images import SPLITS
from lib.files import file_hash, find_path, write_json

LOGIT_SCALE = 100.0  # the temperature CLIP converges to and every few-shot method of the field uses
Array = Tensor | np.ndarray
Arrays = Mapping[str, Mapping[str, Array]]  # encoder to split to features
TEXT_HELP = """encode prompts of the class names with the same CLIP and give them to save_bank(text=…), or to \
python data/import_cache.py --text FILE"""


class FeatureBank:
    """A folder of features, `features:PATH`; meta.json is read once, each file mapped and its sha256 compared once."""

    def __init__(self, path: str | Path):
        self.folder = find_path(str(path).removeprefix("features:"))
        self.card = _read_card(self.folder / "meta.json")
        self.name: str = self.card["name"]
        self.class_names: tuple[str, ...] = tuple(self.card["class_names"])
        order = list(self.card.get("backbones", ()))  # those first and in this order, the rest by name
        stems = sorted(file.stem for file in self.folder.glob("*.safetensors"))
        stems.sort(key=lambda stem: order.index(stem) if stem in order else len(order))
        self.clip_encoders = tuple(stem for stem in stems if stem.startswith("clip"))
        self.aux_encoders = tuple(stem for stem in stems if stem.startswith("aux"))
        if not self.clip_encoders:
            raise ValueError(f"{self.folder}: no file clip*.safetensors")
        self._mapped: dict[str, dict[str, Tensor]] = {}

    @property
    def splits(self) -> tuple[str, ...]:  # those that have labels
        return tuple(split for split in SPLITS if split in self._tensors("labels"))

    def rows(self, split: str, encoder: str) -> tuple[Float[Tensor, "n D"], Int64[Tensor, " n"]]:
        """Features (float32, in the scale they were stored in) and labels of a split; `val` may be empty."""
        encoders = self.clip_encoders + self.aux_encoders
        if encoder not in encoders:
            raise ValueError(f"{self.folder} has no encoder {encoder!r}; it has {', '.join(encoders)}")
        stored, labels, what = self._tensors(encoder), self._tensors("labels"), f"{self.folder}, {encoder}"
        for part in (stored, labels):
            if split not in part:
                has = ", ".join(name for name in SPLITS if name in part)
                raise ValueError(f"{what}: has no split {split!r}; it has {has}")
        dims = {part: tuple(x.shape[1:]) for part, x in stored.items()}
        if len(set(dims.values())) > 1:
            raise ValueError(f"{what}: dimensions differ between splits: {dims}")
        y = _integers(f"{what}, {split}", labels[split], len(self.class_names))
        if split == "test" and len(y) == 0:
            raise ValueError(f"{what}, test: no images to test on")
        return _numbers(f"{what}, {split}", stored[split], len(y), "labels"), y

    def has_text(self, encoder: str) -> bool:
        """Whether `text` has features for a CLIP file."""
        stored = self._tensors("text") if (self.folder / "text.safetensors").is_file() else {}
        return encoder in self.clip_encoders and bool({encoder, "text"} & set(stored))

    def text(self, encoder: str) -> Float[Tensor, "C D"]:
        """Stored text features of a CLIP file, one row per class, not normalised."""
        if encoder not in self.clip_encoders:
            has = ", ".join(self.clip_encoders)
            raise ValueError(f"{self.folder}: {encoder!r} has no text features; CLIP files are {has}")
        if not (self.folder / "text.safetensors").is_file():
            raise ValueError(f"{self.folder}: no file text.safetensors with the class texts of {encoder}; {TEXT_HELP}")
        stored = self._tensors("text")
        if not self.has_text(encoder):
            has = ", ".join(stored)
            raise ValueError(f"{self.folder}: text.safetensors has no tensor {encoder!r} or 'text'; it has {has}")
        x = stored[encoder if encoder in stored else "text"]
        x = _numbers(f"{self.folder}, text of {encoder}", x, len(self.class_names), "class names")
        for images in self._tensors(encoder).values():
            if images.shape[1:] != x.shape[1:]:
                has = ", ".join(map(str, images.shape[1:]))
                raise ValueError(f"{self.folder}: text features have {x.shape[1]} dimensions, {encoder} has {has}")
        return x

    def prompts(self, encoder: str) -> Float[Tensor, "C P D"] | None:
        """Stored features of each prompt of a CLIP file, not normalised; None where there are none."""
        if not (self.folder / "prompts.safetensors").is_file():
            return None
        stored, text = self._tensors("prompts"), self.text(encoder)
        x = stored.get(encoder, stored.get("prompts"))
        if x is not None and (x.ndim != 3 or not x.shape[1] or (x.shape[0], x.shape[2]) != text.shape):
            shape = f"[{text.shape[0]}, P, {text.shape[1]}] as its text has, P the same in every class"
            raise ValueError(f"{self.folder}: prompts of {encoder} are {list(x.shape)}, expected {shape}")
        what = f"{self.folder}, prompts of {encoder}"
        return None if x is None else torch.stack([_numbers(what, part, x.shape[1], "prompts") for part in x])

    def hashes(self, *stems: str) -> dict[str, str]:
        """sha256 of some of the files; `clip_x` means clip_x.safetensors."""
        return {stem: file_hash(self.folder / f"{stem}.safetensors") for stem in stems}

    def _tensors(self, stem: str) -> dict[str, Tensor]:
        """Tensors of one file, mapped into memory."""
        if stem in self._mapped:
            return self._mapped[stem]
        path = self.folder / f"{stem}.safetensors"
        if not path.is_file():
            raise ValueError(f"{self.folder}: no file {path.name}")
        expected = self.card.get("sha256", {}).get(path.name)
        if expected and file_hash(path) != expected:
            differs = f"{path.name} has sha256 {file_hash(path)[:12]}…, meta.json says {expected[:12]}…"
            raise ValueError(f"{self.folder}: {differs}; it is damaged or was replaced, restore it from its source")
        try:
            with safe_open(path, framework="pt") as stored:
                self._mapped[stem] = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.folder}: {path.name} cannot be read: {error}") from error
        return self._mapped[stem]


def open_bank(name: str) -> FeatureBank:
    """The bank `features:PATH`; the same object as long as no file in its folder has changed."""
    folder = find_path(name.removeprefix("features:"))
    stats = [(path.name, path.stat()) for path in sorted(folder.glob("*")) if path.is_file()]
    return _open_bank(folder, tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats))


@lru_cache(maxsize=4)
def _open_bank(folder: Path, _: tuple[tuple[str, int, int], ...]) -> FeatureBank:
    return FeatureBank(folder)


def save_bank(
    path: str | Path,
    *,
    clip: Arrays,  # names start with `clip`, those of `aux` with `aux`
    labels: Mapping[str, Array],  # split to labels, integers of any width
    class_names: Iterable[str],
    aux: Arrays | None = None,
    text: Mapping[str, Array] | None = None,  # CLIP encoder name to text features
    prompts: Mapping[str, Array] | None = None,  # likewise [C, P, D], the rows of P prompts per class
    name: str = "",
    **meta: object,  # further entries of meta.json
) -> Path:
    """Write a bank from tensors or numpy arrays into a new folder, read it back, and only then give it its name."""
    path, aux, text, prompts = Path(path).absolute(), aux or {}, text or {}, prompts or {}
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"{path} is not empty; a bank is written into a new folder")
    for kind, encoders in {"clip": clip, "aux": aux, "labels": {"labels": labels}}.items():
        for stem, splits in encoders.items():
            if not stem.startswith(kind) or Path(stem).name != stem:
                named = f"{kind} features are named {kind}…, not {stem!r}"
                raise ValueError(f"{named}; that becomes a file's name, without '/'")
            wrong = [split for split in splits if split not in SPLITS or split not in labels]
            if wrong:
                has = f"splits are {', '.join(SPLITS)}, labels have {', '.join(labels)}"
                raise ValueError(f"{stem} has split {wrong[0]!r}; {has}")
    optional = {stem: arrays for stem, arrays in {"text": text, "prompts": prompts}.items() if arrays}
    files = {**clip, **aux, "labels": labels, **optional}
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    partial.mkdir(parents=True)
    try:
        for stem, arrays in files.items():
            tensors = {key: _tensor(f"{stem}, {key}", x) for key, x in arrays.items()}
            save_file(tensors, partial / f"{stem}.safetensors")
        sums = {f"{stem}.safetensors": file_hash(partial / f"{stem}.safetensors") for stem in files}
        names = class_names if isinstance(class_names, str) else list(class_names)
        write_json(partial / "meta.json", {"name": name or path.name, "class_names": names, **meta, "sha256": sums})
        bank = FeatureBank(partial)
        for encoder in (*clip, *aux):
            for split in files[encoder]:
                bank.rows(split, encoder)
        for encoder in (*text, *prompts):
            bank.text(encoder)
            bank.prompts(encoder)
        os.replace(partial, path)
    except ValueError as error:
        raise ValueError(str(error).replace(str(partial), str(path))) from error
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return path


def _read_card(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"no meta.json in {path.parent}, so it is not a bank of features")
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(card, dict):
        raise ValueError(f"{path} must hold a mapping, not {card!r:.40}")
    for field, (what, fits) in FIELDS.items():
        if field not in card and field in ("name", "class_names"):
            raise ValueError(f"{path} lacks {field}")
        if field in card and not fits(card[field]):
            raise ValueError(f"{path}: {field} must be {what}, not {card[field]!r:.60}")
    names = card["class_names"]
    if len(set(names)) < len(names):
        repeated = max(names, key=names.count)
        raise ValueError(f"{path}: class_names must differ, {repeated!r} is there more than once")
    return card


def _is_text(value: object) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("prompt") or "", str):
        return False
    return isinstance(value.get("logit_scale", LOGIT_SCALE), (int, float))


FIELDS = {  # of meta.json: what each holds, and a test of it
    "name": ("a string", lambda value: isinstance(value, str)),
    "class_names": ("a list of strings", lambda value: isinstance(value, list) and {*map(type, value)} == {str}),
    "sha256": ("a mapping to strings", lambda value: isinstance(value, dict) and {*map(type, value.values())} <= {str}),
    "backbones": ("a list or a mapping", lambda value: isinstance(value, (list, dict))),
    "text": ("a mapping with prompt (a string) and logit_scale (a number)", _is_text),
}


def _tensor(what: str, values: Array) -> Tensor:
    try:
        x = torch.from_numpy(np.require(values, requirements="CW")) if isinstance(values, np.ndarray) else values
    except TypeError as error:
        raise ValueError(f"{what}: {error}") from error
    return x.contiguous()


def _integers(what: str, y: Tensor, classes: int) -> Int64[Tensor, " n"]:
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool or y.ndim != 1:
        kind = str(y.dtype).removeprefix("torch.")
        raise ValueError(f"{what}: labels must be integers [n], not {kind} {tuple(y.shape)}")
    y = y.long()
    if len(y) and (int(y.min()) < 0 or int(y.max()) >= classes):
        raise ValueError(f"{what}: labels run from {int(y.min())} to {int(y.max())}, there are {classes} class names")
    return y


def _numbers(what: str, x: Tensor, rows: int, of: str) -> Float[Tensor, "n D"]:
    if x.ndim != 2 or len(x) != rows:
        raise ValueError(f"{what}: features are {tuple(x.shape)}, expected one row for each of {rows} {of}")
    x = x.float()
    if not torch.isfinite(x).all():
        bad = int((~torch.isfinite(x).all(dim=1)).sum())
        raise ValueError(f"{what}: {bad} of {len(x)} rows hold NaN or infinite values")
    return x
