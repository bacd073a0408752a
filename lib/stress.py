"""Stress: a task made harder in one respect, everything else left as it was."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Int64
from torch import Tensor

from lib.splits import Split, places
from lib.tasks import FewShotTask


def subset_support(task: FewShotTask, counts: Int64[Tensor, " C"]) -> FewShotTask:
    """The task with the first `counts[c]` support images of each class c; validation and test stay.

    Raises:
        ValueError: a class is to have no image, or more than it has.
    """
    wrong = ((counts < 1) | (counts > task.counts)).nonzero()[:, 0]
    if len(wrong):
        name, asked, has = task.classnames[wrong[0]], int(counts[wrong[0]]), int(task.counts[wrong[0]])
        raise ValueError(f"{asked} support images of class {name!r} asked for, {task.name} has {has}")
    rows = (places(task.support.y) < counts[task.support.y]).nonzero()[:, 0]
    support, views = task.support.rows(rows), tuple(view.rows(rows) for view in task.views)
    return replace(task, support=support, views=views, shots=int(counts.max()), rows=None)


def with_label_noise(task: FewShotTask, share: float, generator: torch.Generator) -> FewShotTask:
    """The task with wrong labels on a share in [0, 1] of its support; validation and test stay.

    Support images, as many of one class as of another, exchange their labels at random until each has another class's:
    classes keep their sizes. Fewer labels are wrong where that is not possible (one class has most of the images).
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share of wrong labels is in [0, 1], not {share}")
    y = task.support.y
    order = torch.randperm(len(y), generator=generator)
    order = order[places(y[order]).argsort(stable=True)]  # one of each class, then another of each
    sizes = range(round(share * len(y)), -1, -1)
    m = next(m for m in sizes if 2 * torch.bincount(y[order[:m]], minlength=1).max() <= m)
    right = y[order[:m]]
    wrong = right[torch.randperm(m, generator=generator)]
    for i in (wrong == right).nonzero()[:, 0].tolist():  # at most half are of one class, so that a partner exists
        partners = ((right != right[i]) & (wrong != wrong[i])).nonzero()[:, 0]
        j = int(partners[torch.randint(len(partners), (1,), generator=generator)])
        if wrong[i] == right[i]:
            wrong[[i, j]] = wrong[[j, i]]
    labels = y.clone()
    labels[order[:m]] = wrong
    views = tuple(replace(view, y=labels) for view in task.views)
    return replace(task, support=replace(task.support, y=labels), views=views)


def subset_classes(task: FewShotTask, classes: Int64[Tensor, " c"]) -> FewShotTask:
    """The task of some of its classes, renumbered in the order of `classes`.

    Test images of the other classes stay, labelled -1; support and validation images of them are left out.
    """
    listed, allowed = classes.tolist(), range(task.num_classes)
    if not listed or len(set(listed)) < len(listed) or not set(listed) <= set(allowed):
        raise ValueError(f"classes are different ones of the {len(allowed)} of {task.name}, not {listed}")
    index = torch.full((task.num_classes + 1,), -1)  # the last place is that of the label -1
    index[classes] = torch.arange(len(classes))

    def part(split: Split, foreign: bool = False) -> Split:
        split = split if foreign else split.rows(torch.isin(split.y, classes).nonzero()[:, 0])
        common = None if split.classes is None else index[split.classes][index[split.classes] >= 0]
        return replace(split, y=index[split.y], zero_shot=split.zero_shot[:, classes], classes=common)

    return replace(
        task,
        support=part(task.support),
        val=part(task.val) if task.val else None,
        test=part(task.test, foreign=True) if task.test else None,
        text=None if task.text is None else task.text[classes],
        prompts=None if task.prompts is None else task.prompts[classes],
        classnames=tuple(task.classnames[c] for c in listed),
        shots=int(task.counts[classes].max()),
        views=tuple(part(view) for view in task.views),
        rows=None,
    )
