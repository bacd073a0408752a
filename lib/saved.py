"""A fitted method as a folder: `card.json`, and its tensors in one safetensors file. Nothing in it can run code.

Fitted attributes end in `_` (see `predictors.base`); `write` walks them, whatever the method. The card holds the
triple, the chosen settings, encoders, classes, prompts and commit, the sha256 of the tensors and its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from lib import predictors
from lib.features import identify
from lib.features.extraction import fingerprint
from lib.files import commit, replace_file, write_json

FORMAT = 1  # raise it when folders written before can no longer be read


def check(method: Any, folder: Path) -> None:
    """Raise a ValueError that says why a method cannot be saved, or not there; it need not be fitted yet."""
    entry = method.entry
    if entry.per_batch:
        part = entry.predictor.__name__ if entry.predictor.per_batch else f"the fusion {entry.fusion.name}"
        depends = f"under {part} the logits of an image depend on the other images of its batch"
        raise ValueError(f"{method.name} cannot be saved to classify new images: {depends}")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "card.json").is_file():
        raise ValueError(f"{folder} is not empty and holds no saved method; name a new folder")


def write(method: Any, folder: Path) -> Path:
    """Write a fitted `methods.Method` into a folder that is new, empty or holds a saved method, which is replaced."""
    check(method, folder)
    entry, fitted = method.entry, _fitted(method)
    if "predictor_" not in fitted:
        raise ValueError(f"{method.name} is not fitted; fit it before it is saved")
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    card = {"format": FORMAT, "method": method.name, "title": entry.title, "triple": triple(method)}
    card |= {"protocol": method.protocol, "fixed_params": dict(method.fixed_params), "commit": commit()}
    card["fitted"] = _pack(fitted, "", tensors)
    data = save(tensors)
    digest = hashlib.sha256(data).hexdigest()
    path = replace_file(folder / f"tensors-{digest[:12]}.safetensors", lambda stream: stream.write(data))
    card |= {"tensors": path.name, "sha256": digest}
    write_json(folder / "card.json", {**card, "card_sha256": fingerprint(card)})
    for older in set(folder.glob("tensors-*.safetensors")) - {path}:
        older.unlink()
    return folder


def triple(method: Any) -> dict[str, str]:
    """Features, predictor and fusion of a method by name."""
    entry = method.entry
    features = {**entry.arguments(), **method.fixed_params}["features"]
    return {"features": features, "predictor": entry.predictor.__name__, "fusion": entry.fusion.name}


def read(folder: Path, names: Sequence[str] = ()) -> tuple[dict, dict]:
    """Card and fitted attributes; a ValueError where a byte of the folder or an encoder has changed since the fit.

    `names`, CLIP's first, are the encoders' names now (none: those of the fit).
    """
    path = folder / "card.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no saved method: no card.json; `python -m lib fit` writes one")
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
        digest = card.pop("card_sha256")
        tensors, expected, version = card["tensors"], card["sha256"], card["format"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read ({type(error).__name__}: {error}); save the method again") from error
    if fingerprint(card) != digest:
        raise ValueError(f"{path} was changed after it was written; fit and save again, its numbers belong together")
    if version != FORMAT:
        raise ValueError(f"{path} has format {version}, this code reads {FORMAT}")
    if not (folder / tensors).is_file():
        raise ValueError(f"{folder} lacks {tensors}, which its card names")
    data = (folder / tensors).read_bytes()
    actual = hashlib.sha256(data).hexdigest()
    if actual != expected:
        raise ValueError(f"{folder / tensors} has sha256 {actual[:12]}…, its card says {expected[:12]}…: it is damaged")
    fitted = _unpack(card["fitted"], load(data))
    if "encoders" in fitted["facts_"]:  # fitted on images: neither on arrays nor on a bank
        fitted["facts_"]["encoders"] = check_encoders(fitted["facts_"]["encoders"], names)
    return card, fitted


def restore(method: Any, saved_triple: Mapping[str, str], fitted: Mapping[str, object]) -> Any:
    """The method with its fitted attributes, if its name still stands for the same triple."""
    if triple(method) != saved_triple:
        raise ValueError(f"{method.name} was {saved_triple} when it was saved, is {triple(method)} now; fit again")
    vars(method).update(fitted)
    return method


def check_encoders(saved: Sequence[Mapping[str, str]], names: Sequence[str]) -> list[dict[str, str]]:
    """The encoders of a card, CLIP's first, under the names they have now (none: the card's).

    A ValueError names both sides where weights, preprocessing or the code that reads them differ from the fit's.
    """
    then = [entry["name"] for entry in saved]
    if names and len(names) != len(then):
        raise ValueError(f"the method was fitted on {', '.join(then)}; named are {', '.join(names)}")
    try:
        now = [identify(name, entry["precision"]) for name, entry in zip(names or then, saved, strict=True)]
    except ValueError as error:
        raise ValueError(
            f"{error}; if its weights have moved, name all {len(then)} by --encoders, CLIP's first"
        ) from error
    for old, new in zip(saved, now, strict=True):
        if new["weights"] != old["weights"]:
            sides = f"{old['name']} with weights {old['weights'][:40]}, {new['name']} has {new['weights'][:40]}"
            raise ValueError(f"the method was fitted on {sides}: features of other weights mean something else")
        if new["fingerprint"] != old["fingerprint"]:
            sides = f"{old['fingerprint'][:12]}… at the fit, {new['fingerprint'][:12]}… now"
            raise ValueError(f"{new['name']} has the weights of the fit, but is read another way: {sides}; fit again")
    return now


def _fitted(fitted_object: object) -> dict[str, object]:
    return {name: value for name, value in vars(fitted_object).items() if name.endswith("_")}


def _pack(value: object, name: str, tensors: dict[str, Tensor]) -> object:
    """A value as JSON, its tensors put aside under their place in it."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().clone(memory_format=torch.contiguous_format)  # safetensors wants no views
        return {"$tensor": name}
    if isinstance(value, predictors.Predictor):
        params = {key: getattr(value, key) for key in predictors.hyper_parameters(type(value))}
        return {"$predictor": type(value).__name__, "params": params, "fitted": _pack(_fitted(value), name, tensors)}
    if isinstance(value, Mapping):
        return {key: _pack(item, f"{name}.{key}".strip("."), tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_pack(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    raise TypeError(f"{name} is a {type(value).__name__}, which a saved method cannot hold")


def _unpack(tree: object, tensors: Mapping[str, Tensor]) -> object:
    if isinstance(tree, list):
        return [_unpack(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if "$tensor" in tree:
        return tensors[tree["$tensor"]]
    if "$predictor" not in tree:
        return {key: _unpack(item, tensors) for key, item in tree.items()}
    cls = getattr(predictors, tree["$predictor"], None)
    if not (isinstance(cls, type) and issubclass(cls, predictors.Predictor)):
        raise ValueError(f"there is no predictor {tree['$predictor']!r} any more; fit again")
    predictor = cls(**tree["params"])
    vars(predictor).update(_unpack(tree["fitted"], tensors))
    return predictor
