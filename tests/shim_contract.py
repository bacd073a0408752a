"""What the contract gives `lib.features` and base lacks, so that lib.tasks can be tested on this branch alone.

Every entry is guarded and does nothing once features have been rebuilt. Delete this file (and its import in
test_tasks.py) when the branches meet.
"""

import dataclasses
import importlib

from lib import features
from lib.features import banks, datasets

load = importlib.import_module("lib.features.load")

if not hasattr(features, "FeatureBank"):

    class FeatureBank:
        def __init__(self, name):
            self.name, card = name, banks.meta(name)
            self.class_names = tuple(card["class_names"])
            self.clip_encoders, self.aux_encoders = banks.encoders(name)
            self.splits = tuple(s for s in ("train", "val", "test") if s in banks._read(name, "labels"))

        def has_text(self, encoder):
            return (banks.folder(self.name) / "text.safetensors").is_file()

    features.FeatureBank, features.LOGIT_SCALE = FeatureBank, load.LOGIT_SCALE
    features.Features, features.TextFeatures = load.Features, load.TextFeatures
    load.Features.encoder = property(lambda self: self.backbone)

if "aux" not in {field.name for field in dataclasses.fields(datasets.Dataset)}:
    EMBEDDED = tuple(f"embedded:{n}" for n in ("supervised", "vicreg", "mae", "supervised-colour", "random"))
    datasets.Dataset.aux = property(lambda self: EMBEDDED)
