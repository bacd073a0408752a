"""Other people's feature caches to banks: Tip-Adapter's folders, AMU-Tuning's, plain npz files.

    python data/import_cache.py tip-adapter FOLDER TARGET --shots 16 --classes names.txt --text text.pt

Files written by torch.save are read with `weights_only=True`, on the CPU, and must hold one tensor: a pickle that
would run code is refused. Dimensions and labels are checked, names are not trusted. The result is a bank in the
format of `lib.features.banks`, to be named `features:TARGET`; what it lacks is printed, with the way to make it.
"""

import argparse
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64, Num
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lib.features.banks import TEXT_HELP, FeatureBank, save_bank
from lib.features.images import SPLITS

Names = Sequence[str]  # of the classes, in label order
Text = Float[Tensor, "C D"] | Float[Tensor, "D C"] | None  # CLIP's class texts
Splits = dict[str, Tensor]  # split to features, or to labels
NPZ_FEATURES = ("{}_features", "{}_x", "x_{}", "X_{}", "{}_f", "features_{}")
NPZ_LABELS = ("{}_labels", "{}_y", "y_{}", "Y_{}", "{}_l", "labels_{}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Import one cache and print the bank's name; the exit code."""
    parser = argparse.ArgumentParser(description="Turn somebody's cache into a bank, features:TARGET.")
    parser.add_argument("kind", choices=("tip-adapter", "amu", "npz"))
    parser.add_argument("source", type=Path, help="a folder, or an npz file")
    parser.add_argument("target", type=Path, help="a new folder")
    parser.add_argument("--shots", type=int, default=16, help="which keys_Kshots.pt (default: 16)")
    parser.add_argument("--classes", type=Path, help="a text file, one class name a line, in label order")
    parser.add_argument("--text", type=Path, help="CLIP's class texts, .pt or .npy: [C, D], or Tip-Adapter's [D, C]")
    parser.add_argument("--clip-keys", type=Path, help="amu: a Tip-Adapter keys_Kshots.pt of the same images")
    parser.add_argument("--aux", type=Path, help="npz: the auxiliary encoder's file")
    given = parser.parse_args(arguments)
    try:
        names = _lines(given.classes) if given.classes else None
        common = {"class_names": names, "text": _text(given.text) if given.text else None}
        if given.kind == "npz":
            import_npz(given.source, given.target, aux=given.aux, **common)
        elif names is None:
            raise ValueError(f"{given.kind} folders hold no class names: give --classes FILE")
        elif given.kind == "amu":
            import_amu(given.source, given.target, shots=given.shots, clip_keys=given.clip_keys, **common)
        else:
            import_tip_adapter(given.source, given.target, shots=given.shots, **common)
        print(f"features:{given.target}")
        for line in lacking(given.target):
            print(line, file=sys.stderr)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def lacking(bank_path: Path) -> list[str]:
    """What a bank has not, one line each: what cannot be done without it, and how it is made."""
    bank, lines = FeatureBank(bank_path), []
    clip = bank.clip_encoders[0]
    if not bank.has_text(clip):
        lines.append(f"no text.safetensors, so no zero-shot logits and no method that uses them: {TEXT_HELP}")
    if not bank.aux_encoders:
        lines.append("no aux_NAME.safetensors: CLIP's own features stand in for auxiliary ones (aux=clip)")
    for encoder in (clip, *bank.aux_encoders):
        missing = [split for split in bank.splits if not _has_rows(bank, split, encoder)]
        if missing:
            hint = "; --clip-keys FILE adds train" if "train" in missing and encoder == clip else ""
            lines.append(f"{encoder} has no {' and no '.join(missing)} features{hint}")
    if "val" not in bank.splits:
        lines.append("no val split: hyper-parameters cannot be chosen by protocol val, only fixed or oracle")
    return lines


def _has_rows(bank: FeatureBank, split: str, encoder: str) -> bool:
    try:
        return bank.rows(split, encoder) is not None
    except ValueError:
        return False


def import_tip_adapter(source: Path, target: Path, *, shots: int, class_names: Names, text: Text = None) -> Path:
    """Write a bank from a cache folder of Tip-Adapter or a descendant of it.

    It holds keys_Kshots.pt [D, N], values_Kshots.pt [N, C] (one-hot), val_f.pt, val_l.pt, test_f.pt and test_l.pt; the
    folder of ImageNet has no val. Text features are not among them: without `text` the bank has no zero-shot logits.
    """
    keys, values = (_tensor(source / f"{what}_{shots}shots.pt") for what in ("keys", "values"))
    splits, labels = _evaluation(source, "{}_f.pt", "{}_l.pt")
    if keys.ndim != 2 or values.ndim != 2 or keys.shape[1] != len(values):
        shapes = f"keys are {tuple(keys.shape)}, values {tuple(values.shape)}"
        raise ValueError(f"{source}: {shapes}; expected [D, N], [N, C]")
    dim = splits["test"].shape[1]
    if keys.shape[0] != dim:
        raise ValueError(f"{source}: keys_{shots}shots.pt has {keys.shape[0]} dimensions, test_f.pt has {dim}")
    if not torch.equal(values.sum(dim=1), torch.ones(len(values), dtype=values.dtype)) or values.max() != 1:
        raise ValueError(f"{source}: values_{shots}shots.pt is not one-hot")
    splits["train"], labels["train"] = keys.T.contiguous(), values.argmax(dim=1)
    _check_shots(labels["train"], shots, source)
    _check_names(class_names, values.shape[1], source)
    about = f"Tip-Adapter cache, {shots} shots; train rows are means over augmented views"
    texts = _oriented(text, values.shape[1], dim)
    return save_bank(target, clip={"clip": splits}, text=texts, labels=labels, class_names=class_names, source=about)


def import_amu(
    source: Path, target: Path, *, shots: int, class_names: Names, clip_keys: Path | None = None, text: Text = None
) -> Path:
    """Write a bank from a cache folder of AMU-Tuning.

    It holds clip_test_f.pt, clip_test_l.pt, aux_test_f.pt, aux_test_l.pt, aux_feature_Kshots.pt and
    aux_labels_Kshots.pt, but no CLIP features of the support, which that code encodes anew at every step: the bank has
    a CLIP train split only if `clip_keys` is a Tip-Adapter keys_Kshots.pt of the same images in the same order.
    """
    clip, labels = _evaluation(source, "clip_{}_f.pt", "clip_{}_l.pt")
    aux, aux_labels = _evaluation(source, "aux_{}_f.pt", "aux_{}_l.pt")
    for split in set(labels) & set(aux_labels):
        if not torch.equal(labels[split], aux_labels[split]):
            raise ValueError(f"{source}: clip_{split}_l.pt and aux_{split}_l.pt hold different labels")
    aux["train"] = _tensor(source / f"aux_feature_{shots}shots.pt")
    labels["train"] = _labels(source / f"aux_labels_{shots}shots.pt")
    _check_shots(labels["train"], shots, source)
    _check_names(class_names, 1 + int(labels["train"].max()), source)
    if clip_keys is not None:
        clip["train"] = _tensor(clip_keys).T.contiguous()
    parts = {"clip": {"clip": clip}, "aux": {"aux": aux}, "labels": labels}
    texts = _oriented(text, len(class_names), clip["test"].shape[1])
    return save_bank(target, **parts, text=texts, class_names=class_names, source=f"AMU-Tuning cache, {shots} shots")


def import_npz(
    clip: Path, target: Path, *, aux: Path | None = None, class_names: Names | None = None, text: Text = None
) -> Path:
    """Write a bank from npz files with arrays such as train_features and train_labels, for train, val and test.

    Other spellings are accepted (train_x, X_train, train_y, y_train, …). `text` [C, D] and `class_names` may be in the
    CLIP file; labels must be, those in the auxiliary file must agree.
    """
    arrays = _npz(clip)
    splits, labels = _npz_splits(clip, arrays)
    classes = 1 + max(int(y.max()) for y in labels.values() if len(y))
    names = class_names if class_names is not None else arrays.get("class_names", arrays.get("classnames"))
    names = [f"class {index}" for index in range(classes)] if names is None else [str(name) for name in names]
    _check_names(names, classes, clip)
    auxiliary = {}
    if aux is not None:
        rows, aux_labels = _npz_splits(aux, _npz(aux), labels_needed=False)
        for split, y in aux_labels.items():
            if split not in labels or not torch.equal(y, labels[split]):
                raise ValueError(f"labels of {split} differ between {clip.name} and {aux.name}")
        auxiliary = {"aux": rows}
    if text is None and "text" in arrays:
        text = torch.from_numpy(arrays["text"])
    texts = _oriented(text, classes, next(iter(splits.values())).shape[1])
    parts = {"clip": {"clip": splits}, "aux": auxiliary, "text": texts, "labels": labels}
    return save_bank(target, **parts, class_names=names, source=clip.name)


def _evaluation(source: Path, features: str, labels: str) -> tuple[Splits, Splits]:
    """Features and labels of test, and of val where it is there."""
    present = [split for split in ("val", "test") if split == "test" or (source / features.format(split)).is_file()]
    x = {split: _tensor(source / features.format(split)) for split in present}
    return x, {split: _labels(source / labels.format(split)) for split in present}


def _labels(path: Path) -> Int64[Tensor, " n"]:
    y = _tensor(path)
    if y.is_floating_point() or y.ndim != 1:
        raise ValueError(f"{path} holds {y.dtype} {tuple(y.shape)}, expected integer labels [n]")
    return y.long()


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the class names in {path}: {error}") from error


def _text(path: Path) -> Text:
    try:
        x = torch.from_numpy(np.load(path, allow_pickle=False)) if path.suffix == ".npy" else _tensor(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the class texts in {path}: {error}") from error
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(f"{path} holds {x.dtype} {tuple(x.shape)}, expected floating-point class texts [C, D]")
    return x


def _oriented(text: Text, classes: int, dim: int) -> dict[str, Tensor]:
    """`text` as [C, D], from that or from Tip-Adapter's clip_weights [D, C]."""
    if text is None:
        return {}
    return {"clip": text.T.contiguous() if tuple(text.shape) == (dim, classes) != (classes, dim) else text}


def _tensor(path: Path) -> Num[Tensor, "..."]:
    if not path.is_file():
        raise ValueError(f"no file {path}")
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, AttributeError) as error:
        raise ValueError(f"{path} is no plain tensor file and was not run: {str(error).splitlines()[0]}") from error
    if not isinstance(stored, Tensor):
        raise ValueError(f"{path} holds a {type(stored).__name__}, expected one tensor")
    return stored.detach().contiguous()


def _check_shots(y: Int64[Tensor, " n"], shots: int, source: Path) -> None:
    counts = torch.bincount(y)
    if not (counts == shots).all():
        odd = int((counts != shots).nonzero()[0])
        raise ValueError(f"{source}: {shots} shots by name, but class {odd} has {int(counts[odd])} rows")


def _check_names(names: Names, classes: int, source: Path) -> None:
    if len(names) != classes:
        raise ValueError(f"{len(names)} class names are given, {source} has {classes} classes")


def _npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {key: stored[key] for key in stored.files}
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read as npz: {error}") from error


def _npz_splits(path: Path, arrays: dict[str, np.ndarray], labels_needed: bool = True) -> tuple[Splits, Splits]:
    features, labels = {}, {}
    for split in SPLITS:
        x, y = (_pick(arrays, patterns, split) for patterns in (NPZ_FEATURES, NPZ_LABELS))
        if x is not None:
            features[split] = torch.from_numpy(x)
            if y is None and labels_needed:
                raise ValueError(f"{path}: features of {split} but no labels; it has {', '.join(sorted(arrays))}")
        if y is not None:
            labels[split] = torch.from_numpy(y.astype(np.int64))
            if not np.array_equal(y, labels[split]):
                raise ValueError(f"{path}: labels of {split} are not whole numbers")
    if not features:
        raise ValueError(f"{path}: no arrays such as train_features; it has {', '.join(sorted(arrays)) or 'nothing'}")
    return features, labels


def _pick(arrays: dict[str, np.ndarray], patterns: Sequence[str], split: str) -> np.ndarray | None:
    return next((arrays[p.format(split)] for p in patterns if p.format(split) in arrays), None)


if __name__ == "__main__":
    sys.exit(main())
