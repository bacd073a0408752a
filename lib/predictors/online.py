"""Online predictors: a row's logits depend on the rows that came before it, so their order matters."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from lib.predictors.base import Predictor
from lib.predictors.caches import kernel
from lib.splits import Split
from lib.tasks import FewShotTask


@dataclass(eq=False)
class TDA(Predictor):
    """TDA: two caches of confident test images, one of what they are and one of what they are not; no labels.

        bias = positive exp(-sharpness (1 - x F^T)) Y - negative exp(-negative_sharpness (1 - x G^T)) [low < P < high]

    F, of predicted classes Y, and G, of zero-shot probabilities P, hold for each predicted class the `size` and
    `negative_size` rows of lowest entropy so far, the row at hand among them. G takes rows of middling entropy only, in
    nats over log2 C, as released.

    Source: TDA (arXiv 2403.18293); repository kdiAAA/TDA at d4b04d3, `tda_runner.py`, constants of ImageNet.
    """

    needs_text: ClassVar[bool] = True
    per_batch: ClassVar[bool] = True
    features: str = "clip"  # of the caches; predictions and entropies are always those of `s0`
    order: int = 1  # seed of the order in which a split's rows come; 0 is the order in which they stand
    positive: float = 2.0
    sharpness: float = 5.0
    size: int = 3
    negative: float = 0.117
    negative_sharpness: float = 1.0
    negative_size: int = 2
    middling: tuple[float, float] = (0.2, 0.5)
    possible: tuple[float, float] = (0.03, 1.0)  # low and high

    def fit(self, task: FewShotTask) -> TDA:
        self.check(task)
        task.support.features(self.features)  # refuses an unknown kind
        return self

    def logits(self, split: Split) -> Float[Tensor, "n C"]:
        x, p, n = split.features(self.features), split.zero_shot.softmax(1), len(split)
        entropy, y, bias = torch.special.entr(p).sum(1), p.argmax(1), torch.zeros_like(p)
        low, high = (bound * math.log2(p.shape[1]) for bound in self.middling)
        offers = torch.stack([torch.ones(n, dtype=torch.bool), (entropy > low) & (entropy < high)], dim=1).tolist()
        masks = ((p > self.possible[0]) & (p < self.possible[1])).float()
        entropy = torch.cat([entropy, torch.tensor([torch.inf])])
        caches = [torch.full((p.shape[1], size), n) for size in (self.size, self.negative_size)]  # rows; n: none yet
        generator = torch.Generator().manual_seed(self.order)
        for row in torch.randperm(n, generator=generator).tolist() if self.order else range(n):
            for cache, offered in zip(caches, offers[row], strict=True):
                place = entropy[cache[y[row]]].argmax()
                if offered and entropy[row] < entropy[cache[y[row], place]]:
                    cache[y[row], place] = row
            near, far = (cache[cache < n] for cache in caches)
            bias[row].index_add_(0, y[near], self.positive * kernel(x[near] @ x[row], self.sharpness))
            bias[row] -= self.negative * kernel(x[far] @ x[row], self.negative_sharpness) @ masks[far]
        return bias
