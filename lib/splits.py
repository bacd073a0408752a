"""One part of a task: images as unit rows of two encoders, labels, zero-shot logits; made from any arrays, checked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import normalize

from lib.features import LOGIT_SCALE

Arrays = Mapping[str, Any]  # tensors, arrays or lists


@dataclass(frozen=True)
class Split:
    """One part of a task; row i of every field is the same image."""

    clip: Float[Tensor, "n D"]  # unit rows from CLIP's image tower
    aux: Float[Tensor, "n Da"]  # unit rows from the auxiliary encoder
    y: Int64[Tensor, " n"]  # class index; in a test part also -1, an image of a class that the task has not
    zero_shot: Float[Tensor, "n C"]  # 100 x cosine to the class texts, `s0` in the formulas; zeros without texts
    classes: Int64[Tensor, " M"] | None = None  # predictions are an argmax over these: the test set's (None: all)

    def __len__(self) -> int:
        return len(self.y)

    def features(self, kind: str) -> Float[Tensor, "n d"]:
        """Rows that a predictor is fed: `clip`, `aux` or `clip+aux` (both, each weighing one half)."""
        if kind not in ("clip", "aux", "clip+aux"):
            raise ValueError(f"features are 'clip', 'aux' or 'clip+aux', not {kind!r}")
        return torch.cat([self.clip, self.aux], dim=1) * 0.5**0.5 if kind == "clip+aux" else getattr(self, kind)

    def rows(self, index: Int64[Tensor, " m"]) -> "Split":
        """The chosen rows as a split of their own."""
        return Split(self.clip[index], self.aux[index], self.y[index], self.zero_shot[index], self.classes)


def places(y: Int64[Tensor, " n"]) -> Int64[Tensor, " n"]:
    """Place of each row among those of its class: 0 for the first."""
    order, sizes, place = y.argsort(stable=True), torch.bincount(y), torch.empty_like(y)
    place[order] = torch.arange(len(y)) - (sizes.cumsum(0) - sizes)[y[order]]
    return place


def tensor(values: Any) -> Tensor:
    return values if isinstance(values, Tensor) else torch.tensor(np.ascontiguousarray(values))


def unit(values: Any, what: str) -> Float[Tensor, "n d"]:
    """Rows of length 1, float32."""
    x = tensor(values).float()
    if x.ndim != 2:
        raise ValueError(f"{what} must be rows [n, d], not {tuple(x.shape)}")
    norms = x.norm(dim=1, keepdim=True)  # NaN or infinite where a value is
    for wrong, fault in ((~norms.isfinite(), "hold NaN or infinite values"), (norms == 0, "are all zeros")):
        if wrong.any():
            raise ValueError(f"{what}: {int(wrong.sum())} of {len(x)} rows {fault}")
    return x / norms


def unit_prompts(values: Any, text: Tensor | None, name: str) -> Float[Tensor, "C P D"] | None:
    """Unit rows of each class's prompts, checked against the class texts."""
    parts = [unit(part, f"{name}: prompts") for part in (() if values is None else values)]
    shapes, expected = sorted({tuple(part.shape) for part in parts}), text if text is None else tuple(text.shape)
    if parts and (len(shapes) > 1 or (len(parts), shapes[0][1]) != expected):
        raise ValueError(f"{name}: prompts are {shapes} in {len(parts)} classes, texts {expected}; P must be one")
    return torch.stack(parts) if parts else None


def unlabelled(clip: Tensor, aux: Sequence[Tensor], text: Tensor | None, num_classes: int, name: str) -> Split:
    """New images as a split of labels -1, from features of any scale; `text` as in the task that was learned."""
    return make_split(side_by_side(clip, aux, torch.full((len(clip),), -1)), text, num_classes, bool(aux), name, "test")


def side_by_side(clip: Tensor, aux: Sequence[Tensor], y: Tensor) -> Arrays:
    """The arrays of a split; several auxiliary encoders' unit rows stand side by side."""
    joined = aux[0] if len(aux) == 1 else torch.cat([normalize(x, dim=1) for x in aux], dim=1) if aux else None
    return {"clip": clip, "y": y} | ({"aux": joined} if aux else {})


def make_split(arrays: Arrays, text: Tensor | None, num_classes: int, with_aux: bool, name: str, part: str) -> Split:
    """One part, checked; -1 may stand among the labels of `test` alone."""
    what, keys = f"{name}, {part}", ("clip", "aux", "y") if with_aux else ("clip", "y")
    if missing := [key for key in keys if key not in arrays]:
        raise ValueError(f"{what}: needs {', '.join(keys)}; lacks {', '.join(missing)}")
    clip, y = unit(arrays["clip"], f"{what}: CLIP features"), tensor(arrays["y"])
    aux = unit(arrays["aux"], f"{what}: auxiliary features") if with_aux else clip
    if y.ndim != 1 or (len(y) and y.is_floating_point()):
        raise ValueError(f"{what}: labels must be whole numbers [n], not {y.dtype} {tuple(y.shape)}")
    if not len(clip) == len(aux) == len(y):
        raise ValueError(f"{what}: {len(clip)} CLIP rows, {len(aux)} auxiliary rows, {len(y)} labels")
    if text is not None and clip.shape[1] != text.shape[1]:
        raise ValueError(f"{what}: CLIP features have {clip.shape[1]} dimensions, text features {text.shape[1]}")
    y = y.long()
    low, high = (int(y.min()), int(y.max())) if len(y) else (0, 0)
    if low < (-1 if part == "test" else 0) or high >= num_classes:
        raise ValueError(f"{what}: labels run from {low} to {high}, the task has {num_classes} classes")
    zero_shot = torch.zeros(len(clip), num_classes) if text is None else LOGIT_SCALE * clip @ text.T
    return Split(clip, aux, y, zero_shot, arrays.get("classes"))
