"""Images to features: data sets and encoders by name, extraction, banks."""

from lib.features import datasets, encoders
from lib.features.banks import save_bank
from lib.features.load import Features, TextFeatures, bank_encoders, bank_shot_index, load, load_many, load_text

__all__ = [
    "Features",
    "TextFeatures",
    "bank_encoders",
    "bank_shot_index",
    "datasets",
    "encoders",
    "load",
    "load_many",
    "load_text",
    "save_bank",
]
