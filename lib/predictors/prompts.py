"""Predictors that look at each prompt of a class on its own, where a task keeps them apart."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from lib import metrics
from lib.predictors.base import Predictor
from lib.predictors.heads import GDA
from lib.splits import LOGIT_SCALE, Split
from lib.tasks import FewShotTask


@dataclass(eq=False)
class WeightedPrompts(Predictor):
    """Prompts weighted by the images of their class, TIMO's image-guided text: of all the weights, none is trained.

        logits = 100 x t^T,    t_c = unit(sum_p w_cp t_cp),    w_c = softmax_p(sharpness unit(a_c)),    a_cp = m_c t_cp

    m_c is the unit mean of the support's images of class c. Sharpness 0 is the plain mean, zero-shot CLIP's.

    Source: TIMO (arXiv 2412.11375); the constants (1 for ImageNet, 100 for Flowers, 50 elsewhere) are its code's.
    """

    clip_only: ClassVar[bool] = True
    needs_text: ClassVar[bool] = True
    needs_prompts: ClassVar[bool] = True
    features: str = "clip"
    sharpness: float = 50.0

    def fit(self, task: FewShotTask) -> WeightedPrompts:
        self.check(task)
        mean = normalize(metrics.class_means(task.support.clip, task.support.y, task.num_classes), dim=1)
        self.agreement_ = (task.prompts @ mean[:, :, None])[:, :, 0]
        self.weights_ = (self.sharpness * normalize(self.agreement_, dim=1)).softmax(1)
        self.text_ = normalize((self.weights_[:, :, None] * task.prompts).sum(1), dim=1)
        return self

    def logits(self, split: Split) -> Float[Tensor, "n C"]:
        return LOGIT_SCALE * split.clip @ self.text_.T


@dataclass(eq=False)
class TIMO(WeightedPrompts):
    """TIMO: weighted prompts, and a discriminant analysis in which prompts are images of their class.

        logits = 100 x t^T + weight gda(x),    GDA of the support's images and of the rows a_cp t_cp, all of them

    Source: TIMO (arXiv 2412.11375), with as many prompts as there are; TIMO-S also searches their number.
    """

    weight: float = 0.1

    def fit(self, task: FewShotTask) -> TIMO:
        super().fit(task)
        y = torch.arange(task.num_classes).repeat_interleave(task.prompts.shape[1])
        rows, y = (self.agreement_[:, :, None] * task.prompts).flatten(0, 1), torch.cat([y, task.support.y])
        x = torch.cat([rows, task.support.clip])
        self.gda_ = GDA("clip").fit(replace(task, support=Split(x, x, y, x @ self.text_.T), views=()))
        return self

    def logits(self, split: Split) -> Float[Tensor, "n C"]:
        return super().logits(split) + self.weight * self.gda_.logits(split)
