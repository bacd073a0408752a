"""Few-shot tasks: K labelled images per class, and everything a logit bias may look at.

A method learns from a task's `support`, may choose hyper-parameters on `val`, and is judged on `test`. Rows are
L2-normalised here, once: all modules below work on unit rows, while features on disk keep their encoder's scale.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from lib import splits
from lib.features import FeatureBank, Features, TextFeatures, datasets, load_many, load_text, open_bank
from lib.features.load import identify
from lib.splits import Arrays, Split

PROTOCOLS = ("val", "fixed", "oracle")


@dataclass(frozen=True)
class FewShotTask:
    """A K-shot classification task with zero-shot logits."""

    support: Split  # at least one image of each class; class by class if drawn
    val: Split | None  # images for choosing hyper-parameters; None where there are none, or none may be used
    test: Split | None  # images for the verdict; None in the copy that tuning gets
    text: Float[Tensor, "C D"] | None  # unit class texts; None where the features come without
    classnames: tuple[str, ...]
    shots: int  # support images of the class that has most
    seed: int  # it drew the support and the validation images
    name: str = "arrays"
    views: tuple[Split, ...] = ()  # augmented renderings of the support, row for row
    rows: Int64[Tensor, " n"] | None = None  # the support's rows in the training part, ascending; None from arrays
    prompts: Float[Tensor, "C P D"] | None = None  # unit rows of each class's prompts; None where they are not apart
    origin: Mapping[str, Any] = field(default_factory=dict, repr=False)  # of the features, see TaskSource

    @property
    def num_classes(self) -> int:
        return len(self.classnames)

    @property
    def counts(self) -> Int64[Tensor, " C"]:  # support images of each class
        return torch.bincount(self.support.y, minlength=self.num_classes)

    def facts(self) -> dict[str, Any]:
        """What a fitted method must remember of its task, beside the texts."""
        facts = {"task": self.name, "shots": self.shots, "seed": self.seed, "classnames": list(self.classnames)}
        return {**facts, "support_images": len(self.support), "val_images": len(self.val or ()), **self.origin}

    @classmethod
    def from_arrays(
        cls,
        *,
        support: Arrays,  # `clip [n, D]`, `aux [n, Da]` and `y [n]`; CLIP's rows stand in where no part has `aux`
        val: Arrays | None,
        test: Arrays,  # may have labels -1 and `classes`, see `Split`
        text: Any = None,  # one row per class; without it, `classnames` or `num_classes` is needed
        prompts: Any = None,  # beside text, one row per prompt; every class has as many
        classnames: Sequence[str] | None = None,
        num_classes: int | None = None,
        seed: int = 0,
        name: str = "arrays",
        views: Sequence[Arrays] = (),  # augmented renderings of the support, in its row order
    ) -> "FewShotTask":
        """A task from plain arrays: features of any scale, labels as integers; what does not fit is refused."""
        text = None if text is None else splits.unit(text, f"{name}: text features")
        named = {"text": text, "classnames": classnames, "num_classes": range(num_classes) if num_classes else None}
        sizes = {what: len(classes) for what, classes in named.items() if classes is not None}
        if len(set(sizes.values())) != 1:
            raise ValueError(f"{name}: text, classnames or num_classes must give one number of classes, not {sizes}")
        names = tuple(classnames or (f"class {c}" for c in range(max(sizes.values()))))
        arrays = {"support": support, "test": test} | ({} if val is None else {"val": val})
        arrays |= {f"view {i}": view for i, view in enumerate(views)}
        with_aux = any("aux" in part for part in arrays.values())
        parts = {
            part: splits.make_split(array, text, len(names), with_aux, name, part) for part, array in arrays.items()
        }
        widths = {part: split.aux.shape[1] for part, split in parts.items()}
        if len(set(widths.values())) > 1:
            raise ValueError(f"{name}: auxiliary features have different dimensions: {widths}")
        if not parts["test"]:
            raise ValueError(f"{name}: test has no images")
        support, test, val = parts.pop("support"), parts.pop("test"), parts.pop("val", None) or None  # if not empty
        counts = torch.bincount(support.y, minlength=len(names))
        if not counts.all():
            raise ValueError(f"{name}: support has no image of class {names[int(counts.argmin())]!r}")
        for part, view in parts.items():
            if not torch.equal(view.y, support.y):
                raise ValueError(f"{name}: {part} has other labels than the support, whose rows it must follow")
        rest = tuple(parts.values()), None, splits.unit_prompts(prompts, text, name)
        return cls(support, val, test, text, names, int(counts.max()), seed, name, *rest)

    def for_tuning(self, protocol: str) -> "FewShotTask":
        """The copy, without test part, that a method may learn from and choose on: `val` leaves val, `fixed` nothing.

        `oracle` chooses on the test images of the task's classes; its results are optimistic and must carry its name.
        """
        if protocol not in PROTOCOLS:
            raise ValueError(f"protocol is one of {', '.join(PROTOCOLS)}, not {protocol!r}")
        if protocol != "oracle":
            return replace(self, val=self.val if protocol == "val" else None, test=None)
        labelled = self.test.y >= 0 if self.test else torch.zeros(0, dtype=torch.bool)
        if not labelled.any():
            raise ValueError("the oracle protocol needs test images of the task's classes, this task has none")
        return replace(self, val=self.test if labelled.all() else self.test.rows(labelled.nonzero()[:, 0]), test=None)


@dataclass(frozen=True)
class TaskSource:
    """Features of a data set under CLIP and an auxiliary encoder, mapped into memory until a task is drawn."""

    name: str  # the data set that tasks learn from
    test_name: str  # the data set that they are tested on
    classnames: tuple[str, ...]
    parts: Mapping[str, Sequence[Features]]  # of train, test, perhaps val and views: CLIP's, then the auxiliary ones
    text: TextFeatures | None  # None where the bank has none
    class_map: Int64[Tensor, " T"]  # for each class of the test set its index in the task, -1 for none
    encoders: tuple[str, str]  # CLIP and auxiliary; "clip" where CLIP's own features stand in for these
    fingerprints: Mapping[str, str]  # of `text` and of each `part/encoder`
    origin: Mapping[str, Any] = field(default_factory=dict, repr=False)  # data set, encoders, prompts, fingerprints

    @cached_property
    def test(self) -> Split:
        """The test part, normalised once for all tasks; without a common class there is nothing to restrict to."""
        common = self.class_map[self.class_map >= 0].unique()
        some = 0 < len(common) < len(self.classnames)
        return replace(self.split("test", slice(None)), classes=common if some else None)

    def split(self, part: str, rows: Int64[Tensor, " n"] | slice, view: int | None = None) -> Split:
        """Some rows of a part."""
        clip, *aux = ((f.x if view is None else f.x[view])[rows] for f in self.parts[part])
        y = self.parts[part][0].y[rows]
        arrays = splits.side_by_side(clip, aux, self.class_map[y] if part == "test" else y)
        return splits.make_split(arrays, self.text and self.text.x, len(self.classnames), bool(aux), self.name, part)


def encoders(dataset: str, clip: str = "auto", aux: str = "auto") -> tuple[str, tuple[str, ...]]:
    """Names of the CLIP encoder and of the auxiliary ones, which `aux` joins by commas.

    `auto` takes a bank's first CLIP file and all its auxiliary files, or "clip" (CLIP's own features) where it has
    none; of images the auxiliary encoders that the card names, else the embedded ones.
    """
    card = _card(dataset)
    if isinstance(card, FeatureBank):
        own_clip, own_aux = card.clip_encoders[0], card.aux_encoders or ("clip",)
    else:
        own_clip, own_aux = "embedded:clip", card.aux or datasets.load("shapes").aux
    return own_clip if clip == "auto" else clip, own_aux if aux == "auto" else tuple(aux.split(","))


def load_source(
    dataset: str,  # a name that `datasets.load` knows, or `features:PATH`
    clip: str = "auto",
    aux: str = "auto",  # several joined by commas, see `encoders`; auto: the first of them
    *,
    test: str = "",  # the data set to test on, if another; classes are matched by WordNet code, else by name
    templates: str = "auto",  # auto: the data set's own prompts; else `7`, `80` or a file, see `datasets.prompts`
    views: int = 0,  # random crops and flips of each training image, which heads are then trained on
    need_text: bool = True,  # False lets a bank without text features pass; zero-shot logits are then zeros
    **extraction: Any,  # options of `features.load_many` (device, precision, batch_size, quarantine, ...)
) -> TaskSource:
    """Features of a data set, extracted if not yet cached."""
    if views == 1 or views < 0:
        raise ValueError(f"views is 0 (plain images) or at least 2 random crops, not {views}")
    card = _card(dataset)
    test, test_card = (test, _card(test)) if test else (dataset, card)
    if "train" not in card.splits:
        raise ValueError(f"{dataset} can be tested on, not learned from: learn from another with test={dataset!r}")
    clip, auxiliaries = encoders(dataset, clip, aux)
    auxiliaries = auxiliaries[:1] if aux == "auto" else auxiliaries
    if aux == "auto" and auxiliaries == ("clip",):
        print(f"{dataset} has no auxiliary features; CLIP's own stand in for them (aux=clip)")
    names = [clip] if auxiliaries == ("clip",) else [clip, *(clip if a == "clip" else a for a in auxiliaries)]
    is_bank = isinstance(card, FeatureBank)
    banked = {*test_card.clip_encoders, *test_card.aux_encoders} if isinstance(test_card, FeatureBank) else set()
    if (is_bank or banked) and not set(names) <= banked:
        raise ValueError(f"{test} does not have the features {' and '.join(names)} that {dataset} is learned with")
    options = {} if is_bank else extraction
    parts = {split: load_many(dataset, split, names, **options) for split in ("train", "val") if split in card.splits}
    parts["test"] = load_many(test, "test", names, **options)
    if views:
        parts["views"] = load_many(dataset, "train", names, views=views, **options)
    for encoder, learned, tested in zip(names, parts["train"], parts["test"], strict=True):
        dims, test_dims = learned.x.shape[1], tested.x.shape[1]
        if dims != test_dims:
            raise ValueError(f"{encoder} has {dims} dimensions in {dataset}, {test_dims} in {test}")
    prints = {f"{part}/{f.encoder}": f.fingerprint for part, group in parts.items() for f in group}
    text = None
    if need_text or not is_bank or card.has_text(clip):
        shared = {key: options[key] for key in ("device", "precision", "cache") if key in options}
        text = load_text(dataset, clip, None if templates == "auto" else templates, **shared)
        apart, x = splits.unit_prompts(text.prompts, text.x, dataset), splits.unit(text.x, f"{dataset}: text features")
        text, prints["text"] = replace(text, x=x, prompts=apart), text.fingerprint
    of = {"bank": names} if is_bank else {"encoders": [identify(n, options.get("precision", "fp32")) for n in names]}
    origin = {"dataset": dataset, "prompts": list(text.templates if text else ()), "fingerprints": prints, **of}
    codes = [getattr(one, "codes", ()) for one in (card, test_card)]
    classnames = [parts[part][0].classnames for part in ("train", "test")]
    class_map = _match(*(codes if all(codes) else classnames), f"{dataset} -> {test}")
    names = (clip, ",".join(auxiliaries))
    return TaskSource(dataset, test, classnames[0], parts, text, class_map, names, prints, origin)


def sample(source: TaskSource, shots: int, seed: int, val_shots: int = 4) -> FewShotTask:
    """A K-shot task, stratified by class; the 4 shots of a seed contain its 2 shots.

    A class with fewer training images gives all it has, but one must have `shots`. Validation images are at most
    min(shots, val_shots) per class, CoOp's min(K, 4); 0 keeps all.
    """
    if shots < 1 or val_shots < 0:
        raise ValueError(f"shots must be 1 or more and val_shots 0 or more, not {shots} and {val_shots}")
    y, names = source.parts["train"][0].y, source.classnames
    counts = torch.bincount(y, minlength=len(names))
    extreme = int(counts.argmax() if counts.all() else counts.argmin())
    if shots > counts[extreme]:
        size = f"{int(counts[extreme])} training images{', and no class has more' if counts.all() else ''}"
        raise ValueError(f"{source.name}: {shots} shots asked for, but class {names[extreme]!r} has {size}")
    generator = torch.Generator().manual_seed(seed)
    rows = _draw_rows(y, shots, generator)
    val_y = source.parts["val"][0].y if "val" in source.parts else y[:0]
    val_rows = _draw_rows(val_y, min(shots, val_shots) or len(val_y), generator).sort().values
    val = source.split("val", val_rows) if len(val_rows) else None
    num_views = len(source.parts["views"][0].x) if "views" in source.parts else 0
    views = tuple(source.split("views", rows, view) for view in range(num_views))
    name = source.name if source.test_name == source.name else f"{source.name} -> {source.test_name}"
    support, rows = source.split("train", rows), rows.sort().values
    text, prompts = (source.text.x, source.text.prompts) if source.text else (None, None)
    facts = {"rows": rows, "prompts": prompts, "origin": source.origin}
    return FewShotTask(support, val, source.test, text, names, shots, seed, name, views, **facts)


def draw(source: TaskSource, shots: int, seeds: int, val_shots: int = 4) -> list[FewShotTask]:
    """Tasks of seeds 1 to `seeds`; equal supports (K of K images, or `imagenet@16/1`) come once."""
    if seeds < 1:
        raise ValueError(f"seeds must be 1 or more, not {seeds}")
    tasks = [sample(source, shots, seed, val_shots) for seed in range(1, seeds + 1)]
    return [task for i, task in enumerate(tasks) if not any(torch.equal(task.rows, t.rows) for t in tasks[:i])]


def _card(dataset: str) -> FeatureBank | datasets.Dataset:
    return open_bank(dataset) if dataset.startswith("features:") else datasets.load(dataset)


def _match(classes: Sequence[str], test_classes: Sequence[str], what: str) -> Int64[Tensor, " T"]:
    """Index of each class of the test set among the task's classes, -1 for none."""
    mine, others = ([datasets.plain_name(name) for name in group] for group in (classes, test_classes))
    if len(set(mine)) < len(mine) and mine != others:
        raise ValueError(f"{what}: two classes of one name, {max(mine, key=mine.count)!r}, cannot be matched by it")
    index = {name: c for c, name in enumerate(mine)}
    return torch.arange(len(mine)) if mine == others else torch.tensor([index.get(name, -1) for name in others])


def _draw_rows(y: Int64[Tensor, " n"], count: int, generator: torch.Generator) -> Int64[Tensor, " m"]:
    """The first `count` rows (or all) of each class in a random order, class by class."""
    order = torch.randperm(len(y), generator=generator)
    order = order[torch.argsort(y[order], stable=True)]
    return order[splits.places(y[order]) < count]
