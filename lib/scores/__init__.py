"""Scores of a logit vector: how sure it is, whether its image is of an unknown class, how accurate a classifier is."""

from lib.scores.confidence import (
    CONFIDENCES,
    aurc,
    conformal_sets,
    logit_norm,
    norm_power,
    risk_coverage,
    temperature,
)
from lib.scores.estimation import ESTIMATES, IS_ACCURACY, from_uniform
from lib.scores.table import computable, needs
from lib.scores.unknown import LOCAL_OUTLIERS, UNKNOWN, fpr95, residual_axes
