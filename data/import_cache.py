"""Other people's feature caches to banks: Tip-Adapter's folders, AMU-Tuning's, plain npz files.

Files written by torch.save are read with `weights_only=True`, on the CPU, and must hold one tensor: a pickle that
would run code is refused. Dimensions and labels are checked, names are not trusted. The result is a bank in the
format of `banks`, to be named `features:PATH`.
"""

import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64, Num
from torch import Tensor

from lib.features.banks import SHOT_INDEX, save_bank

NPZ_FEATURES = ("{}_features", "{}_x", "x_{}", "X_{}", "{}_f", "features_{}")
NPZ_LABELS = ("{}_labels", "{}_y", "y_{}", "Y_{}", "{}_l", "labels_{}")
SPLITS = ("train", "val", "test")


def import_tip_adapter(
    source: Path,
    target: Path,
    *,
    shots: int,
    class_names: Sequence[str],
    text: Float[Tensor, "C D"] | None = None,
) -> Path:
    """Write a bank from a cache folder of Tip-Adapter or a descendant of it.

    It holds keys_Kshots.pt [D, N], values_Kshots.pt [N, C] (one-hot), val_f.pt, val_l.pt, test_f.pt and test_l.pt; the
    folder of ImageNet has no val. Text features are not among them: without `text` the bank has no zero-shot logits.

    Raises:
        ValueError: a file is missing, is not a tensor, or disagrees with another one.
    """
    keys, values = (_tensor(source / f"{what}_{shots}shots.pt") for what in ("keys", "values"))
    splits, labels = _tested(source, "{}_f.pt", "{}_l.pt")
    if keys.ndim != 2 or values.ndim != 2 or keys.shape[1] != len(values):
        raise ValueError(
            f"{source}: keys are {tuple(keys.shape)}, values {tuple(values.shape)}; expected [D, N], [N, C]"
        )
    dim = splits["test"].shape[1]
    if keys.shape[0] != dim:
        raise ValueError(f"{source}: keys_{shots}shots.pt has {keys.shape[0]} dimensions, test_f.pt has {dim}")
    if not torch.equal(values.sum(dim=1), torch.ones(len(values), dtype=values.dtype)) or values.max() != 1:
        raise ValueError(f"{source}: values_{shots}shots.pt is not one-hot")
    splits["train"], labels["train"] = keys.T.contiguous(), values.argmax(dim=1)
    labels[SHOT_INDEX] = _shot_index(labels["train"], shots, source)
    texts = {} if text is None else {"clip": text}
    about = f"Tip-Adapter cache, {shots} shots; train rows are means over augmented views"
    return save_bank(
        target, clip={"clip": splits}, aux={}, text=texts, labels=labels, class_names=class_names, source=about
    )


def import_amu(
    source: Path,
    target: Path,
    *,
    shots: int,
    class_names: Sequence[str],
    clip_keys: Path | None = None,
    text: Float[Tensor, "C D"] | None = None,
) -> Path:
    """Write a bank from a cache folder of AMU-Tuning.

    It holds clip_test_f.pt, clip_test_l.pt, aux_test_f.pt, aux_test_l.pt, aux_feature_Kshots.pt and
    aux_labels_Kshots.pt, but no CLIP features of the support, which that code encodes anew at every step.

    Args:
        clip_keys: a Tip-Adapter keys_Kshots.pt of the same images in the same order, for the support's CLIP features;
            without it the bank has no CLIP train split.

    Raises:
        ValueError: a file is missing, is not a tensor, or disagrees with another one.
    """
    clip, labels = _tested(source, "clip_{}_f.pt", "clip_{}_l.pt")
    aux, same = _tested(source, "aux_{}_f.pt", "aux_{}_l.pt")
    for split in set(labels) & set(same):
        if not torch.equal(labels[split], same[split]):
            raise ValueError(f"{source}: clip_{split}_l.pt and aux_{split}_l.pt hold different labels")
    aux["train"] = _tensor(source / f"aux_feature_{shots}shots.pt")
    labels["train"] = _tensor(source / f"aux_labels_{shots}shots.pt").long()
    labels[SHOT_INDEX] = _shot_index(labels["train"], shots, source)
    if clip_keys is not None:
        clip["train"] = _tensor(clip_keys).T.contiguous()
    texts = {} if text is None else {"clip": text}
    about = f"AMU-Tuning cache, {shots} shots"
    return save_bank(
        target, clip={"clip": clip}, aux={"aux": aux}, text=texts, labels=labels, class_names=class_names, source=about
    )


def import_npz(clip: Path, target: Path, *, aux: Path | None = None, class_names: Sequence[str] | None = None) -> Path:
    """Write a bank from npz files with arrays such as train_features and train_labels, for train, val and test.

    Other spellings are known (train_x, X_train, train_y, y_train, …). `text` [C, D] and `class_names` may be in the
    CLIP file; labels must be, those in the auxiliary file must agree.

    Raises:
        ValueError: a file that is not npz, no such arrays, or parts that disagree.
    """
    found = _npz(clip)
    splits, labels = _npz_splits(clip, found)
    names = class_names if class_names is not None else found.get("class_names", found.get("classnames"))
    if names is None:
        names = [f"class {index}" for index in range(1 + max(int(y.max()) for y in labels.values()))]
    auxiliary = {}
    if aux is not None:
        rows, same = _npz_splits(aux, _npz(aux), labels_needed=False)
        for split, y in same.items():
            if split not in labels or not torch.equal(y, labels[split]):
                raise ValueError(f"labels of {split} differ between {clip.name} and {aux.name}")
        auxiliary = {"aux": rows}
    text = {"clip": torch.from_numpy(found["text"])} if "text" in found else {}
    names = [str(name) for name in names]
    return save_bank(
        target, clip={"clip": splits}, aux=auxiliary, text=text, labels=labels, class_names=names, source=clip.name
    )


def _tested(source: Path, features: str, labels: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the test split, and val where it is there."""
    present = [split for split in ("val", "test") if split == "test" or (source / features.format(split)).is_file()]
    return (
        {split: _tensor(source / features.format(split)) for split in present},
        {split: _tensor(source / labels.format(split)).long() for split in present},
    )


def _tensor(path: Path) -> Num[Tensor, "..."]:
    if not path.is_file():
        raise ValueError(f"no file {path}")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is no plain tensor file and was not run: {str(error).splitlines()[0]}") from error
    if not isinstance(found, Tensor):
        raise ValueError(f"{path} holds a {type(found).__name__}, expected one tensor")
    return found.detach().contiguous()


def _shot_index(y: Int64[Tensor, " n"], shots: int, source: Path) -> Int64[Tensor, " n"]:
    counts = torch.bincount(y)
    if not (counts == shots).all():
        odd = int((counts != shots).nonzero()[0])
        raise ValueError(f"{source}: {shots} shots by name, but class {odd} has {int(counts[odd])} rows")
    index = torch.empty_like(y)
    for label in y.unique():
        index[y == label] = torch.arange(shots)
    return index


def _npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {key: stored[key] for key in stored.files}
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read as npz: {error}") from error


def _npz_splits(
    path: Path, found: dict[str, np.ndarray], labels_needed: bool = True
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    features, labels = {}, {}
    for split in SPLITS:
        x, y = (_pick(found, patterns, split) for patterns in (NPZ_FEATURES, NPZ_LABELS))
        if x is not None:
            features[split] = torch.from_numpy(x)
            if y is None and labels_needed:
                raise ValueError(f"{path}: features of {split} but no labels; it has {', '.join(sorted(found))}")
        if y is not None:
            labels[split] = torch.from_numpy(y.astype(np.int64))
    if not features:
        raise ValueError(f"{path}: no arrays such as train_features; it has {', '.join(sorted(found)) or 'nothing'}")
    return features, labels


def _pick(found: dict[str, np.ndarray], patterns: Sequence[str], split: str) -> np.ndarray | None:
    return next((found[p.format(split)] for p in patterns if p.format(split) in found), None)
