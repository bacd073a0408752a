"""Every notebook on the smallest things a user brings: two classes, no error of CLIP's, a dozen photos, one draw."""

import numpy as np
import pytest
from small_models import write_folder

from lib import runs
from lib.features import save_bank

SHORT = {"shots": 2, "seeds": 2, "epochs": 3}
FAILED_ONCE = {
    ("photos", "00_extract_features"),
    ("perfect", "01_state_the_logit_bias"),
    ("perfect", "02_compare_logit_features"),
    ("two", "02_compare_logit_features"),
    ("perfect", "04_compare_logit_fusions"),
    ("one draw", "05_tune_amu"),
}


def bank(path, classes, noise):
    """Write a bank whose classes lie around their texts."""
    rng = np.random.default_rng(3)
    text, means = rng.normal(size=(classes, 24)), rng.normal(size=(classes, 16))
    labels = {split: np.repeat(np.arange(classes), n) for split, n in (("train", 4), ("val", 4), ("test", 12))}
    clip = {s: (text[y] + noise * rng.normal(size=(len(y), 24))).astype("float32") for s, y in labels.items()}
    aux = {s: (means[y] + 0.5 * rng.normal(size=(len(y), 16))).astype("float32") for s, y in labels.items()}
    names = [f"class {i}" for i in range(classes)]
    text = {"clip_a": text.astype("float32")}
    return save_bank(path, clip={"clip_a": clip}, aux={"aux_b": aux}, labels=labels, class_names=names, text=text)


@pytest.fixture(scope="module")
def brought(tmp_path_factory):
    """Return what is brought, by name: a data set and parameters."""
    place = tmp_path_factory.mktemp("brought")
    photos = write_folder(place / "photos", classes=3, images=4, splits=())
    return {
        "two": (f"features:{bank(place / 'two', 2, 1.5)}", {}),
        "perfect": (f"features:{bank(place / 'perfect', 8, 0.1)}", {}),
        "photos": (f"folder:{photos}", {"shots": 1}),
        "one draw": (f"features:{bank(place / 'one', 6, 2.0)}", {"seeds": 1}),
    }


CASES = [(what, notebook) for what in ("two", "perfect", "photos", "one draw") for notebook in runs.notebooks()]


@pytest.mark.parametrize(
    ("what", "notebook"),
    [pytest.param(*case, marks=[] if case in FAILED_ONCE else pytest.mark.stress) for case in CASES],
)
def test_a_notebook_runs_on(brought, tmp_path, monkeypatch, what, notebook):
    monkeypatch.setenv("LOGIT_BIAS_CACHE", str(tmp_path / "cache"))
    dataset, changes = brought[what]
    declared = runs.declared(notebook)
    settings = {("datasets" if "datasets" in declared else "dataset"): dataset}
    settings |= {name: value for name, value in (SHORT | changes).items() if name in declared}
    record = runs.execute(notebook, settings, tmp_path / "run")
    assert record["metrics"], "numbers, with null for what does not exist"
    text = (tmp_path / "run" / f"{notebook}.ipynb").read_text()
    assert not [word for word in ("nan %", "nan ±", "± nan") if word in text], "a dash for what does not exist"
