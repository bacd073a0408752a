"""Few-shot tasks: K labelled images per class, and everything a logit bias may look at.

A task holds three parts with the same fields. The `support` is what a method learns from, `val` is what it
may choose hyper-parameters on, and `test` is what it is judged by. Rows are L2-normalised here, once, so that
every module below works on unit rows; the features on disk keep their encoder's own scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from lib import features

LOGIT_SCALE = 100.0  # the temperature CLIP converges to and every few-shot method of the field uses
PROTOCOLS = ("val", "fixed", "oracle")
EMBEDDED_AUX = tuple(f"embedded:{name}" for name in ("supervised", "vicreg", "mae", "supervised-colour", "random"))


@dataclass(frozen=True)
class Split:
    """One part of a task; row i of every field is the same image.

    Attributes:
        clip: unit rows from CLIP's image tower.
        aux: unit rows from the auxiliary encoder.
        y: class index in [0, C).
        zero_shot: 100 x cosine to the class texts, `s0` in the formulas.
    """

    clip: Float[Tensor, "n D"]
    aux: Float[Tensor, "n Da"]
    y: Int64[Tensor, " n"]
    zero_shot: Float[Tensor, "n C"]

    def __len__(self) -> int:
        return len(self.y)

    def features(self, kind: str) -> Float[Tensor, "n d"]:
        """Return the rows a predictor is fed: `clip`, `aux` or `clip+aux` (both, each weighing one half)."""
        if kind == "clip+aux":
            return torch.cat([self.clip, self.aux], dim=1) * 0.5**0.5
        if kind not in ("clip", "aux"):
            raise ValueError(f"features are 'clip', 'aux' or 'clip+aux', not {kind!r}")
        return getattr(self, kind)

    def rows(self, index: Int64[Tensor, " m"]) -> Split:
        """Return the chosen rows as a split of their own."""
        return Split(self.clip[index], self.aux[index], self.y[index], self.zero_shot[index])


@dataclass(frozen=True)
class FewShotTask:
    """A K-shot classification task with zero-shot logits.

    Attributes:
        support: `shots` images of each class, class by class.
        val: images for choosing hyper-parameters; None under the protocol that chooses nothing.
        test: images for the verdict; None in the copy that tuning gets.
        text: unit class texts.
        shots: images per class in the support.
        seed: the seed that drew the support and the validation images.
        views: augmented renderings of the support, row for row; empty when only plain images were encoded.
    """

    support: Split
    val: Split | None
    test: Split | None
    text: Float[Tensor, "C D"]
    classnames: tuple[str, ...]
    shots: int
    seed: int
    name: str = "arrays"
    views: tuple[Split, ...] = ()

    @property
    def num_classes(self) -> int:
        return len(self.text)

    @classmethod
    def from_arrays(
        cls,
        *,
        text: Float[Tensor, "C D"],
        support: Mapping[str, Tensor],
        val: Mapping[str, Tensor],
        test: Mapping[str, Tensor],
        classnames: Sequence[str] | None = None,
        seed: int = 0,
        name: str = "arrays",
        views: Sequence[Mapping[str, Tensor]] = (),
    ) -> FewShotTask:
        """Build a task from plain arrays: features of any scale, labels as integers.

        Args:
            text: one row per class.
            support, val, test: each a mapping with `clip [n, D]`, `aux [n, Da]` and `y [n]`.
            views: augmented renderings of the support, in its row order.

        Raises:
            ValueError: shapes, label ranges or class counts disagree, a class has another number of support
                images than the rest, a feature is NaN or infinite, or a row is all zeros.
        """
        names = tuple(classnames) if classnames is not None else tuple(f"class {c}" for c in range(len(text)))
        if len(names) != len(text):
            raise ValueError(f"{name}: {len(names)} class names but text features for {len(text)} classes")
        unit_text = _unit(text, f"{name}: text features")
        parts = {
            part: _split(arrays, unit_text, f"{name}, {part}")
            for part, arrays in (("support", support), ("val", val), ("test", test))
        }
        widths = {part: split.aux.shape[1] for part, split in parts.items()}
        if len(set(widths.values())) > 1:
            raise ValueError(f"{name}: auxiliary features have different dimensions: {widths}")
        shots = _shots(parts["support"].y, names, name)
        view_splits = tuple(_split(v, unit_text, f"{name}, view {i}") for i, v in enumerate(views))
        for i, view in enumerate(view_splits):
            if not torch.equal(view.y, parts["support"].y):
                raise ValueError(f"{name}: view {i} has other labels than the support, whose rows it must follow")
        return cls(**parts, text=unit_text, classnames=names, shots=shots, seed=seed, name=name, views=view_splits)

    def for_tuning(self, protocol: str) -> FewShotTask:
        """Return the copy that a method may learn from and choose on; it holds no test part.

        `val` leaves support and validation images, `fixed` the support alone. Under `oracle` the test images take
        the place of the validation images: results of that protocol are optimistic and must carry its name.
        """
        if protocol not in PROTOCOLS:
            raise ValueError(f"protocol is one of {', '.join(PROTOCOLS)}, not {protocol!r}")
        if protocol == "oracle":
            if self.test is None:
                raise ValueError("the oracle protocol needs test images, this task has none")
            return replace(self, val=self.test, test=None)
        return replace(self, val=self.val if protocol == "val" else None, test=None)


@dataclass(frozen=True)
class TaskSource:
    """All features of one data set under one CLIP and one auxiliary encoder, from which tasks are drawn.

    `clip` and `aux` hold `train`, `val`, `test`, and, where they were asked for, `views` of shape [V, n, D]; `aux` one
    entry for each encoder. Rows stay on disk, mapped into memory, until a task is drawn.
    """

    name: str
    clip: Mapping[str, features.Features]
    aux: Mapping[str, Sequence[features.Features]]
    text: features.TextFeatures
    shot_index: Int64[Tensor, " n"] | None
    encoders: tuple[str, str]
    fingerprints: Mapping[str, str]


def encoders(dataset: str, clip: str = "auto", aux: str = "auto") -> tuple[str, tuple[str, ...]]:
    """Return the names of a data set's CLIP encoder and auxiliary encoders.

    `auto` stands for the embedded ones, or for those of the bank: its first CLIP file, all its auxiliary files.
    """
    if dataset.startswith("features:"):
        clips, known = features.bank_encoders(dataset)
    else:
        clips, known = ("embedded:clip",), EMBEDDED_AUX
    if (clip == "auto" and not clips) or (aux == "auto" and not known):
        raise ValueError(f"{dataset} holds CLIP features {clips} and auxiliary features {known}; one of each is needed")
    return clips[0] if clip == "auto" else clip, tuple(known) if aux == "auto" else tuple(aux.split("+"))


def load_source(
    dataset: str,
    clip: str = "auto",
    aux: str = "auto",
    *,
    templates: str = "auto",
    views: int = 0,
    device: str = "auto",
    precision: str = "fp32",
    **extraction: object,
) -> TaskSource:
    """Load (or extract once) the features of a data set.

    Args:
        dataset: a name that `datasets.load` knows, or `features:PATH`.
        clip: a CLIP encoder by name, or `auto`, see `encoders`.
        aux: an auxiliary encoder by name, several joined by `+` (unit rows side by side), or `auto` for the first.
        templates: `auto` for the data set's own prompts; else `7`, `80` or a file, see `datasets.prompts`.
        views: random crops and flips of each training image, which heads are then trained on; 0 for none.
        device, precision, extraction: passed on to `features.load_many` (batch_size, num_workers, ...).
    """
    if views == 1 or views < 0:
        raise ValueError(f"views is 0 (plain images) or at least 2 random crops, not {views}")
    clip, auxiliaries = encoders(dataset, clip, aux)
    if aux == "auto":
        auxiliaries = auxiliaries[:1]
    options = {} if dataset.startswith("features:") else {"device": device, "precision": precision} | extraction
    prompts = None if templates == "auto" else templates
    text = features.load_text(
        dataset, clip, prompts, **({k: options[k] for k in ("device", "precision") if k in options})
    )
    clip_parts, aux_parts, prints = {}, {}, {"text": text.fingerprint}
    for part in ("train", "val", "test", *(["views"] if views else [])):
        shown = {"views": views} if part == "views" else {}
        split = "train" if part == "views" else part
        first, *rest = features.load_many(dataset, split, [clip, *auxiliaries], **options, **shown)  # one decoding pass
        clip_parts[part], aux_parts[part] = first, rest
        prints |= {f"{part}/{f.backbone}": f.fingerprint for f in (first, *rest)}
    index = features.bank_shot_index(dataset) if dataset.startswith("features:") else None
    return TaskSource(dataset, clip_parts, aux_parts, text, index, (clip, "+".join(auxiliaries)), prints)


def sample(bank: TaskSource, shots: int, seed: int, val_shots: int = 4) -> FewShotTask:
    """Draw a K-shot task: nested in `shots` (the 4 shots of a seed contain its 2 shots), stratified by class.

    Args:
        shots: support images per class, 1 or more.
        seed: 0 takes a bank's own shot order where it has one; any other seed permutes.
        val_shots: validation images per class, at most `shots` of them (CoOp's min(K, 4)); 0 keeps all.

    Raises:
        ValueError: a class has fewer training images than `shots`.
    """
    train, val = bank.clip["train"], bank.clip["val"]
    if shots < 1:
        raise ValueError(f"shots must be 1 or more, not {shots}")
    counts = torch.bincount(train.y, minlength=len(bank.text.classnames))
    if shots > counts.min():
        poorest = bank.text.classnames[int(counts.argmin())]
        raise ValueError(
            f"{bank.name}: {shots} shots asked for, but class {poorest!r} has {int(counts.min())} training images"
        )
    generator = torch.Generator().manual_seed(seed)
    rank = _rank_in_class(train.y, generator)
    if bank.shot_index is not None and seed == 0:
        rank = bank.shot_index
    chosen = torch.argsort(train.y * len(train.y) + rank)  # class by class, by rank inside the class
    chosen = chosen[rank[chosen] < shots]
    val_rank = _rank_in_class(val.y, generator)
    keep = torch.arange(len(val.y)) if val_shots == 0 else torch.nonzero(val_rank < min(shots, val_shots))[:, 0]
    shown = [bank.clip["views"], *bank.aux["views"]] if "views" in bank.clip else []
    part = {"train": chosen, "val": keep, "test": slice(None)}
    arrays = {
        p: {"clip": bank.clip[p].x[rows], "aux": _joined([f.x[rows] for f in bank.aux[p]]), "y": bank.clip[p].y[rows]}
        for p, rows in part.items()
    }
    return FewShotTask.from_arrays(
        text=bank.text.x,
        support=arrays["train"],
        val=arrays["val"],
        test=arrays["test"],
        classnames=bank.text.classnames,
        seed=seed,
        name=bank.name,
        views=[
            {"clip": clip[chosen], "aux": _joined([x[chosen] for x in aux]), "y": train.y[chosen]}
            for clip, *aux in zip(*(f.x for f in shown), strict=True)
        ],
    )


def _rank_in_class(y: Int64[Tensor, " n"], generator: torch.Generator) -> Int64[Tensor, " n"]:
    """Return each row's place in a random order of its own class, from 0."""
    order = torch.randperm(len(y), generator=generator)
    order = order[torch.argsort(y[order], stable=True)]
    start = torch.cumsum(torch.bincount(y), 0) - torch.bincount(y)
    rank = torch.empty_like(y)
    rank[order] = torch.arange(len(y)) - start[y[order]]
    return rank


def _joined(parts: Sequence[Float[Tensor, "n _"]]) -> Float[Tensor, "n Da"]:
    """Return the rows of several encoders side by side, each of unit length."""
    return torch.cat([F.normalize(x, dim=1) for x in parts], dim=1) if len(parts) > 1 else parts[0]


def _unit(x: Float[Tensor, "n d"], what: str) -> Float[Tensor, "n d"]:
    if not torch.isfinite(x).all():
        bad = int((~torch.isfinite(x).all(dim=1)).sum())
        raise ValueError(f"{what}: {bad} of {len(x)} rows hold NaN or infinite values")
    norms = x.float().norm(dim=1, keepdim=True)
    if (norms == 0).any():
        raise ValueError(f"{what}: {int((norms == 0).sum())} of {len(x)} rows are all zeros and have no direction")
    return x.float() / norms


def _split(arrays: Mapping[str, Tensor], text: Float[Tensor, "C D"], what: str) -> Split:
    missing = {"clip", "aux", "y"} - set(arrays)
    if missing:
        raise ValueError(f"{what}: needs clip, aux and y, lacks {', '.join(sorted(missing))}")
    clip, aux, y = arrays["clip"], arrays["aux"], arrays["y"].long()
    if not len(clip) == len(aux) == len(y):
        raise ValueError(f"{what}: {len(clip)} CLIP rows, {len(aux)} auxiliary rows, {len(y)} labels")
    if clip.shape[1] != text.shape[1]:
        raise ValueError(f"{what}: CLIP features have {clip.shape[1]} dimensions, text features {text.shape[1]}")
    if len(y) and (int(y.min()) < 0 or int(y.max()) >= len(text)):
        raise ValueError(f"{what}: labels run from {int(y.min())} to {int(y.max())}, text has {len(text)} classes")
    clip = _unit(clip, f"{what}: CLIP features")
    return Split(clip, _unit(aux, f"{what}: auxiliary features"), y, LOGIT_SCALE * clip @ text.T)


def _shots(y: Int64[Tensor, " n"], classnames: Sequence[str], what: str) -> int:
    counts = torch.bincount(y, minlength=len(classnames))
    if int((counts > 0).sum()) != len(classnames):
        raise ValueError(f"{what}: support has {int((counts > 0).sum())} classes, text has {len(classnames)}")
    if int(counts.min()) != int(counts.max()):
        low, high = int(counts.argmin()), int(counts.argmax())
        raise ValueError(
            f"{what}: every class needs the same number of support images, but {classnames[low]!r} has "
            f"{int(counts[low])} and {classnames[high]!r} has {int(counts[high])}"
        )
    return int(counts[0])
