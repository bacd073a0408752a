"""Every notebook runs headless with small parameters, and its recorded numbers are what they must be."""

import pytest
from conftest import ROOT

from lib import runs

SMALL = {
    "00_extract_features": {"picture": 200},
    "01_state_the_logit_bias": {},
    "05_tune_amu": {"shots": 4, "seeds": 2, "epochs": 4},
    "90_train_embedded_models": {"steps": 3},
}


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """Return a function that executes a notebook once and returns its record."""
    done = {}

    def execute(notebook, **parameters):
        key = (notebook, *sorted(parameters.items()))
        if key not in done:
            folder = tmp_path_factory.mktemp(notebook)
            done[key] = runs.execute(notebook, SMALL[notebook] | parameters, folder)
            assert (folder / f"{notebook}.ipynb").exists()
            assert done[key]["fingerprints"] or notebook.startswith("9")
        return done[key]["metrics"]

    return execute


def test_00_extract_features(record):
    metrics = record("00_extract_features")
    assert metrics["images"]["test"] >= 2000
    nearest = metrics["nearest"]
    assert nearest["embedded:random"]["same class"] < nearest["embedded:vicreg"]["same class"]
    for name, row in metrics["cka"].items():
        assert row[name] == pytest.approx(1) and all(0 <= value <= 1.0001 for value in row.values())


def test_01_state_the_logit_bias(record):
    metrics = record("01_state_the_logit_bias")
    assert 0.35 <= metrics["zero_shot"] <= 0.75, "the embedded world is a fair miniature"
    assert abs(metrics["zero_shot"] - metrics["zero_shot_val"]) < 0.1
    assert 0 <= metrics["calibration_error"] <= 1
    assert max(metrics["error_auroc"].values()) > 0.6
    assert metrics["published_rows"] == sum(1 for _ in open(ROOT / "data" / "published.csv")) - 1


def test_05_tune_amu(record):
    metrics = record("05_tune_amu")
    accuracy = metrics["accuracy"]
    assert set(accuracy) == {"Zero-shot CLIP", "Auxiliary only", "AMU-Tuning", "AMU-Tuning (code)"}
    assert set(accuracy["AMU-Tuning"]) == {"1", "2", "4"}
    assert accuracy["Zero-shot CLIP"]["1"]["half"] == 0
    assert accuracy["AMU-Tuning"]["4"]["mean"] > accuracy["Zero-shot CLIP"]["4"]["mean"] + 2
    assert sum(metrics["shapley"].values()) == pytest.approx(metrics["ablation"]["AMU"] - metrics["ablation"][""])
    assert metrics["repaired"] > metrics["broken"]


def test_05_tune_amu_on_a_bank_of_real_features(record, caltech70):
    accuracy = record("05_tune_amu", dataset=f"features:{caltech70}", aux="aux_mobilenet_v2")["accuracy"]
    assert accuracy["Zero-shot CLIP"]["4"]["mean"] == pytest.approx(94.46, abs=0.01)
    assert accuracy["AMU-Tuning"]["4"]["mean"] > 94.46


def test_90_train_embedded_models(record):
    metrics = record("90_train_embedded_models")
    assert all(value == value for value in metrics.values() if isinstance(value, float))
