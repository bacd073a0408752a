"""Images to features: data sets and encoders by name, extraction, banks."""

from lib.features import datasets, encoders
from lib.features.banks import LOGIT_SCALE, FeatureBank, save_bank
from lib.features.load import Features, TextFeatures, load, load_many, load_text

__all__ = [
    "LOGIT_SCALE",
    "FeatureBank",
    "Features",
    "TextFeatures",
    "datasets",
    "encoders",
    "load",
    "load_many",
    "load_text",
    "save_bank",
]
