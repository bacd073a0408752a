"""Every notebook runs headless with small parameters, and its recorded numbers are what they must be."""

import pytest
from conftest import ROOT

from lib import fusion, runs, tasks

SMALL = {
    "00_extract_features": {"picture": 200},
    "01_state_the_logit_bias": {},
    "02_compare_logit_features": {"shots": 4, "seeds": 2, "epochs": 6},
    "03_compare_logit_predictors": {
        "dataset": "digits",
        "shots": 2,
        "seeds": 2,
        "epochs": 8,
        "only": "linear_probe+gda+mlp+cache+proker+lp_plus_plus+text_probe",
    },
    "04_compare_logit_fusions": {"dataset": "digits", "shots": 4, "seeds": 2, "epochs": 8, "subsets": 1},
    "05_tune_amu": {"shots": 4, "seeds": 2, "epochs": 4},
    "06_benchmark_methods": {
        "datasets": "digits",
        "shots": 2,
        "seeds": 2,
        "epochs": 8,
        "only": "tip_adapter+gda+clap+lp_plus_plus",
    },
    "91_measure_speed": {
        "classes": 6,
        "shots": 2,
        "dim": 24,
        "aux_dim": 32,
        "epochs": 2,
        "heads": 3,
        "repeats": 1,
        "threads": 1,
        "seeds": 1,
        "only": "gda+amu",
        "photos": 2,
        "encoder": "embedded:supervised",
        "large_classes": 8,
        "large_test": 20,
        "large": "amu_convex",
    },
    "90_train_embedded_models": {"encoders": "clip+supervised", "steps": 2, "images": 64, "threads": 1},
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
    assert metrics["published_rows"] == len((ROOT / "data" / "published.csv").read_text().splitlines()) - 1


def test_02_compare_logit_features(record):
    metrics = record("02_compare_logit_features")
    encoders, itself = metrics["encoders"], "CLIP itself"
    assert set(encoders) == {*tasks.encoders("shapes")[1], itself}
    assert all(0 <= row["CMY"] <= 2 for row in encoders.values())
    assert min(encoders, key=lambda name: encoders[name]["CMY centred"]) == itself, "most like s0"
    assert metrics["best"] == max(encoders, key=lambda name: encoders[name]["gain"]) != itself
    assert encoders[metrics["best"]]["gain"] > 2
    for pool in ("with CLIP", "without CLIP"):
        assert all(lost >= 0 for lost in metrics["lost"][pool].values())
        assert all(rho is None or -1 <= rho <= 1 for rho in metrics["rho"][pool].values())
        assert metrics["lost"][pool]["the paper's rule"] < metrics["lost"][pool]["a random candidate"]
        earned = metrics["lost"][pool]["superiority"] - metrics["lost"][pool]["the paper's rule"]
        assert metrics["complementarity_earns"][pool]["difference"] == pytest.approx(earned)
    assert metrics["took"]["with CLIP"]["superiority"] > metrics["took"]["with CLIP"]["the paper's rule"] == 0
    assert len(metrics["pairs"]) == 2 * (len(encoders) - 2), "two ways to join each other encoder"
    assert {row["verdict"] for row in metrics["pairs"].values()} <= {"better", "worse", "tie"}


def test_02_compare_logit_features_on_a_bank_of_real_features(record, caltech70):
    metrics = record("02_compare_logit_features", dataset=f"features:{caltech70}", shots=2)
    encoders = metrics["encoders"]
    assert metrics["zero_shot"] == pytest.approx(94.46, abs=0.01)
    assert encoders["aux_inat_bird"]["SUP"] < 50 < 70 < encoders["aux_mobilenet_v2"]["SUP"]
    assert metrics["took"]["with CLIP"]["superiority"] == 1, "CLIP's own head is the most accurate"


def test_02_compare_logit_features_without_a_second_encoder_or_seed(record):
    """What does not exist is null: no pairs, no rules, no verdicts; nothing fails."""
    metrics = record("02_compare_logit_features", dataset="digits", candidates="clip", seeds=1, shots=1)
    assert list(metrics["encoders"]) == ["CLIP itself"] and metrics["encoders"]["CLIP itself"]["half"] is None
    assert metrics["pairs"] == metrics["lost"] == metrics["repairs_differ"] == {}


def test_03_compare_logit_predictors(record):
    metrics = record("03_compare_logit_predictors")
    gain, learned = metrics["gain"], metrics["learned"]
    assert set(gain["clip"]) - set(gain["aux"]) == {"text probe"} and len(gain["clip"]) == 8
    assert max(gain["clip"].values()) > 3, "two digits of each class help on handwriting"
    assert set(metrics["verdicts"]["aux"]) == set(gain["aux"]) - {"two-branch head"}
    assert {said for part in metrics["verdicts"].values() for said in part.values()} <= {"better", "worse", "tie"}
    assert learned["cache"] == 0 < learned["two-branch head"] < learned["MLP"]
    assert set(metrics["published_order"]) == {"LP", "MLP", "cache, random init", "cache, feature init"}
    assert all(value > 0 for value in metrics["gap"].values()), "the support is easier than the test images"
    assert metrics["starved"]["mean"] > -5


@pytest.mark.parametrize("real", [False, True])
def test_04_compare_logit_fusions(record, request, real):
    given = {}
    if real:
        given = {"dataset": f"features:{request.getfixturevalue('caltech70')}", "aux": "aux_mobilenet_v2", "shots": 2}
    metrics = record("04_compare_logit_fusions", **given)
    accuracy = metrics["accuracy"]
    assert set(accuracy) == {*fusion.FUSIONS, "zero-shot"}
    assert accuracy["zero-shot"] + 0.5 < accuracy["fixed"] <= metrics["either"]
    assert accuracy["wise"] == pytest.approx(accuracy["fixed"], abs=0.1), "one family, two ways to write beta"
    assert all(row["hindsight"] >= -1e-4 for row in metrics["weighted"].values()), "rho = 0 is among the choices"
    assert min(metrics["optimism"].values()) >= 0
    auroc = {name: row["errors"] for name, row in metrics["auroc"].items()}
    assert auroc["entropy"] > 0.6 and auroc["std of probabilities"] < 0.4, "the released std is a confidence"
    factor = metrics["one_hot_factor"]
    assert [factor[n] for n in ("10", "100", "1000")] == pytest.approx([4.29, 1.47, 0.575], abs=0.005)


def test_05_tune_amu(record):
    metrics = record("05_tune_amu")
    accuracy = metrics["accuracy"]
    assert set(accuracy) == {
        *("Zero-shot CLIP", "Auxiliary only"),
        *("AMU-Tuning", "AMU-Tuning (code)", "AMU-Tuning (convex)"),
    }
    assert accuracy["AMU-Tuning (convex)"]["4"]["mean"] > accuracy["Zero-shot CLIP"]["4"]["mean"] + 2
    assert set(metrics["verdicts"]) == {"zero_shot", "aux_only", "amu_code", "amu_convex"}
    assert set(accuracy["AMU-Tuning"]) == {"1", "2", "4"}
    assert accuracy["Zero-shot CLIP"]["1"]["half"] == 0
    assert accuracy["AMU-Tuning"]["4"]["mean"] > accuracy["Zero-shot CLIP"]["4"]["mean"] + 2
    assert sum(metrics["shapley"].values()) == pytest.approx(metrics["ablation"]["AMU"] - metrics["ablation"][""])
    assert metrics["repaired"] > metrics["broken"]


def test_05_tune_amu_on_a_bank_of_real_features(record, caltech70):
    accuracy = record("05_tune_amu", dataset=f"features:{caltech70}")["accuracy"]
    assert accuracy["Zero-shot CLIP"]["4"]["mean"] == pytest.approx(94.46, abs=0.01)
    assert accuracy["AMU-Tuning"]["4"]["mean"] > 94.46


def test_06_benchmark_methods(record):
    metrics = record("06_benchmark_methods")
    ours = metrics["accuracy"]["digits"]
    always = {"zero_shot", "linear_probe", "aux_only", "amu"}
    assert set(ours) == set(metrics["ranks"]) == always | set(SMALL["06_benchmark_methods"]["only"].split("+"))
    assert set(ours["amu"]) == {"1", "2"} and ours["zero_shot"]["1"] == ours["zero_shot"]["2"]
    assert sum(metrics["ranks"].values()) == pytest.approx(len(ours) * (len(ours) + 1) / 2)
    assert set(metrics["verdicts"].values()) == {"tie"}, "four blocks decide nothing"
    assert sum(metrics["optimism"].values()) > 0 and metrics["agreeing_published_rows"] == 0
    triples = metrics["triples"]
    for goal, shares in metrics["shapley"].items():
        if goal.startswith("AMU"):
            whole = triples["aux|two-branch head|uncertain"] - triples["clip|LP|fixed"]
            assert sum(shares.values()) == pytest.approx(whole)
    assert {key.split("|")[2] for key in triples} == set(fusion.FUSIONS)


def test_06_benchmark_on_a_bank_of_real_features(record, caltech70):
    bank = f"features:{caltech70}"
    metrics = record("06_benchmark_methods", datasets=bank, aux="aux_mobilenet_v2", shots=1, only="clap")
    ours = metrics["accuracy"]["caltech70"]
    assert ours["zero_shot"]["1"] == pytest.approx(94.46, abs=0.01)
    assert ours["clap"]["1"] > 94.46 and ours["aux_only"]["1"] < 90


def test_90_train_embedded_models(record):
    metrics = record("90_train_embedded_models")
    assert set(metrics["loss"]) == {"clip", "supervised"}
    assert min(metrics["least_cosine"].values()) > 0.999, "storing as float16 loses next to nothing"
    assert metrics["megabytes"] <= 16
    assert metrics["captions"]["texture"] < metrics["captions"]["shape"] == 1
    assert not metrics["fair"], "two steps teach nothing"


def test_91_measure_speed(record):
    metrics = record("91_measure_speed")
    assert metrics["weights_apart"] < 1e-5 and metrics["convex_gradient"] <= 1e-3
    assert set(metrics["ratios"]) == {"heads", "convex", "grid", "extraction"}
    assert all(0 < low <= middle <= high for middle, low, high in metrics["ratios"].values())
    for claim, pair in metrics["paired_s"].items():  # one repetition: its ratio is the ratio of the medians
        assert metrics["ratios"][claim][0] == pytest.approx(pair["plain"] / pair["ours"])
    assert set(metrics["limits_s"]) == {"heads", "convex", "grid"} and min(metrics["limits_s"].values()) > 0
    assert set(metrics["seconds"]) == {"gda", "amu"} and metrics["whole_benchmark_s"] > 0
    assert 0.1 < metrics["large"]["amu_convex"]["gib"] < 4
    assert metrics["import_s"]["lib"] < metrics["import_s"]["torch"], "lib itself imports nothing"
