"""Images to features: data sets and encoders by name, extraction, banks."""

from lib.features import datasets, encoders
from lib.features.banks import LOGIT_SCALE, FeatureBank, open_bank, save_bank
from lib.features.encoders import load_encoder
from lib.features.load import Features, TextFeatures, identify, load, load_many, load_text
