"""Inputs and outputs of the authors' own code (tests/references), and how close ours come to them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from lib.tasks import FewShotTask

REFERENCES = Path(__file__).parent / "references"


def outputs(name):
    """Return the arrays of one reference file as tensors; floats in float32."""
    with np.load(REFERENCES / f"{name}.npz") as arrays:
        found = {key: torch.from_numpy(np.asarray(arrays[key])) for key in arrays.files}
    return {key: value.float() if value.is_floating_point() else value for key, value in found.items()}


def task():
    """Return the task of the few-shot references: 12 classes, 4 shots, 150 test images."""
    arrays = outputs("inputs")
    parts = {
        ours: {
            "clip": arrays[f"clip_{part}"],
            "aux": arrays[f"aux_{part}"],
            "y": arrays[f"{part}_labels"],
        }
        for ours, part in (("support", "train"), ("val", "val"), ("test", "test"))
    }
    return FewShotTask.from_arrays(text=arrays["clip_text"], **parts)


def error(ours, theirs):
    """Return the largest deviation relative to the spread of the reference."""
    spread = (theirs.max() - theirs.min()).clamp_min(1e-12)
    return ((ours - theirs).abs().max() / spread).item()


def unequal(task):
    """The task with 1, 3 and otherwise all support images per class, classes shuffled."""
    support, seen = task.support, torch.zeros(task.num_classes, dtype=torch.int64)
    keep = []
    for row, c in enumerate(support.y.tolist()):
        seen[c] += 1
        if seen[c] <= {0: 1, 1: 3}.get(c, len(support)):
            keep.append(row)
    order = torch.randperm(len(keep), generator=torch.Generator().manual_seed(0))
    return replace(task, support=support.rows(torch.tensor(keep)[order]))
