"""Every notebook runs headless with small parameters, and its recorded numbers are what they must be."""

import shlex

import pytest
import torch
from conftest import ROOT

from lib import features, fusion, methods, records, runs, tasks
from lib.__main__ import main
from lib.metrics import class_accuracy

SMALL = {
    "00_extract_features": {"picture": 200},
    "01_state_the_logit_bias": {},
    "02_compare_logit_features": {"shots": 4, "seeds": 2, "epochs": 6},
    "03_compare_logit_predictors": {
        "dataset": "digits",
        "shots": 2,
        "seeds": 2,
        "epochs": 8,
        "only": "linear_probe,gda,mlp,cache,proker,lp_plus_plus,text_probe",
    },
    "04_compare_logit_fusions": {"dataset": "digits", "shots": 4, "seeds": 2, "epochs": 8},
    "05_tune_amu": {"shots": 4, "seeds": 2, "epochs": 4},
    "06_benchmark_methods": {
        "datasets": "digits",
        "shots": 2,
        "seeds": 2,
        "epochs": 8,
        "only": "tip_adapter,gda,clap,lp_plus_plus,tda,timo",
    },
    "07_shift_the_distribution": {
        "shifts": "shapes-sketch,shapes-spurious",
        "only": "gda,gda/classwise,amu",
        "shots": 4,
        "seeds": 2,
        "epochs": 4,
    },
    "11_run_one_method": {"dataset": "digits", "method": "gda", "shots": 4, "seeds": 2},
    "08_trust_the_confidence": {"shifts": "shapes-corrupted-5", "shots": 4, "seeds": 2, "epochs": 4},
    "09_detect_the_unknown": {"shots": 4, "seeds": 2, "epochs": 4},
    "10_estimate_accuracy": {"dataset": "digits", "shots": 4, "seeds": 2, "epochs": 4},
    "20_advise_on_your_images": {
        "dataset": "digits",
        "shots": 4,
        "only": "zero_shot,gda,gda@aux,convex_head/uncertain",
    },
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
    assert metrics["images"]["test"] >= 2000 and not any(metrics["left_out"].values())
    nearest, verdicts, chance = metrics["nearest"], metrics["verdicts"], metrics["chance"]
    clip, *others = nearest
    assert set(chance) == {"class", "shape", "texture", "colour", "background"}, "factors.csv is read"
    assert chance["texture"] == pytest.approx(100 / 6, abs=0.1) and chance["shape"] == pytest.approx(100 / 12, abs=0.1)
    assert set(verdicts["shape"].values()) == {"worse"}, "CLIP sees the shape"
    assert verdicts["texture"]["embedded:texture"] == verdicts["texture"]["embedded:other-classes"] == "better"
    assert nearest["embedded:random"]["class"] < nearest["embedded:vicreg"]["class"]
    assert metrics["other"] in others and set(metrics["only"]) == set(others) == set(verdicts["class"])
    for name, shares in metrics["only"].items():
        gap = shares["it alone"] - shares["CLIP alone"]
        assert gap == pytest.approx(nearest[name]["class"] - nearest[clip]["class"])
    for name, row in metrics["cka"].items():
        assert row[name] == pytest.approx(1) and all(0 <= value <= 1.0001 for value in row.values())


def test_00_extract_features_of_a_bank_of_real_features(record, caltech70):
    metrics = record("00_extract_features", dataset=f"features:{caltech70}", candidates="aux_inat_bird")
    assert list(metrics["nearest"]) == ["clip_vit_b32", "aux_inat_bird"] and list(metrics["chance"]) == ["class"]
    assert metrics["verdicts"]["class"]["aux_inat_bird"] == "worse" and metrics["behind"]


def test_01_state_the_logit_bias(record):
    metrics = record("01_state_the_logit_bias")
    assert 0.35 <= metrics["zero_shot"] <= 0.75, "the embedded world is a fair miniature"
    assert abs(metrics["zero_shot"] - metrics["zero_shot_val"]) < 0.1
    assert metrics["zero_shot_gap"] is None, "nobody has published a number of the embedded encoder"
    calibration, reach = metrics["calibration"], metrics["reach"]
    field, fitted = calibration["the field's"], calibration["fitted on validation images"]
    assert field["gap"] == pytest.approx(field["confidence"] - 100 * metrics["zero_shot"], abs=1e-3)
    assert field["ece"] == pytest.approx(100 * metrics["calibration_error"]) and fitted["ece"] < field["ece"]
    textures, shapes = metrics["by_word"]["texture"], metrics["by_word"]["shape"]
    assert (len(textures), len(shapes)) == (6, 12)
    assert max(textures.values()) - min(textures.values()) > max(shapes.values()) - min(shapes.values())
    words = [reach[f"{part} wrong"] for part in ("only the texture is", "only the shape is", "both are")]
    for kind in ("measured", "by chance"):
        assert sum(row[kind] for row in words) == pytest.approx(100)
    assert words[0]["measured"] > 50 > words[0]["by chance"], "CLIP errs by texture"
    assert metrics["median_gap"] > 0 and 0 < metrics["safe"] < 100
    assert metrics["published_rows"] == len((ROOT / "data" / "published.csv").read_text().splitlines()) - 1


def test_00_and_01_on_a_bank_of_two_classes_and_nothing_to_repair(record, tmp_path):
    """Twelve images, one encoder, no validation part, no error: what does not exist is null."""
    text, labels = torch.eye(2, 6), {"train": torch.arange(4) % 2, "test": torch.arange(12) % 2}
    noise = torch.Generator().manual_seed(0)
    rows = {part: text[y] + 0.05 * torch.randn(len(y), 6, generator=noise) for part, y in labels.items()}
    parts = {"clip": {"clip_x": rows}, "labels": labels, "text": {"clip_x": text}}
    bank = features.save_bank(tmp_path / "bank", class_names=["one", "two"], **parts)
    metrics = record("00_extract_features", dataset=f"features:{bank}")
    assert metrics["other"] is None and metrics["nearest"] == {"clip_x": {"class": 100.0}}
    metrics = record("01_state_the_logit_bias", dataset=f"features:{bank}")
    assert metrics["zero_shot"] == 1 and metrics["errors"] == 0
    absent = (metrics["zero_shot_val"], metrics["median_gap"], metrics["safe"], metrics["reach"]["its truth is second"])
    assert absent == (None, None, None, {"measured": None, "by chance": 100.0})


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
    assert metrics["took"]["with CLIP"]["superiority"] >= metrics["took"]["with CLIP"]["the paper's rule"] == 0
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
    gain, learned, kept = metrics["gain"], metrics["learned"], metrics["kept"]
    assert set(gain["clip"]) ^ set(gain["aux"]) == {"text probe", "MLP"} and len(gain["clip"]) == 7
    assert max(gain["clip"].values()) > 3, "two digits of each class help on handwriting"
    assert set(metrics["verdicts"]["aux"]) == set(gain["aux"]) - {"two-branch head"}
    assert {verdict for part in metrics["verdicts"].values() for verdict in part.values()} <= {"better", "worse", "tie"}
    assert learned["cache"] == 0 < kept["cache"] and 0 < learned["two-branch head"] < learned["MLP"]
    assert set(metrics["published_order"]) == {"LP", "MLP", "cache, random init"}
    assert metrics["gain"]["aux"]["two-branch head"] == pytest.approx(metrics["fused"]["mean"]["0.5"])
    for init, row in metrics["starved"].items():
        alone = metrics["alone"][init]
        assert row["difference"] == pytest.approx(alone["1.0"] - alone["0.0"])
    assert len(metrics["two_branches"]) == 4 and 0 <= metrics["best_lambda"] <= 1


@pytest.mark.parametrize("real", [False, True])
def test_04_compare_logit_fusions(record, request, real):
    which = {}
    if real:
        which = {"dataset": f"features:{request.getfixturevalue('caltech70')}", "aux": "aux_mobilenet_v2", "shots": 2}
    metrics = record("04_compare_logit_fusions", **which)
    accuracy, weights = metrics["accuracy"], metrics["weights"]
    assert set(accuracy) == {*fusion.FUSIONS, "zero-shot", "additive (β by cross-entropy)"}
    assert accuracy["zero-shot"] < accuracy["additive"] <= metrics["either"]
    assert metrics["wise_differs"] < 0.2 and "wise" not in metrics["against_additive"], "additive once more"
    gain = accuracy["uncertain"] - accuracy["additive"]
    assert weights["kurtosis (AMU)"]["chosen"][0] == pytest.approx(gain, abs=1e-6), "one number for one thing"
    for name, row in weights.items():
        assert row["weight"][0] + row["beta"][0] == pytest.approx(row["chosen"][0], abs=1e-6), name
    assert set(metrics["weight_verdicts"].values()) <= {"better", "worse", "tie"}
    assert weights["errors known"]["hindsight"][0] > weights["kurtosis, shuffled"]["hindsight"][0]
    assert all(best >= 0 for best, rho in metrics["best_in_hindsight"].values()), "rho = 0 is among the choices"
    assert min(metrics["optimism"].values()) >= 0
    for name, left in metrics["optimism_left"].items():
        assert left == pytest.approx(metrics["optimism"][name] - metrics["optimism"]["additive"], abs=1e-6)
    auroc = {name: row["errors"] for name, row in metrics["auroc"].items()}
    assert auroc["entropy"] > 0.6 and auroc["std of probabilities"] < 0.4, "the released std is a confidence"
    assert auroc["entropy"] > auroc["kurtosis of logits"]
    factor = metrics["one_hot_factor"]
    assert [factor[n] for n in ("10", "100", "1000")] == pytest.approx([4.29, 1.47, 0.575], abs=0.005)


def test_05_tune_amu(record):
    metrics = record("05_tune_amu")
    accuracy, ablation, shapley = metrics["accuracy"], metrics["ablation"], metrics["shapley"]
    family = {"AMU-Tuning", "AMU-Tuning (code)", "AMU-Tuning (convex)"}
    assert set(accuracy) == family | {"Zero-shot CLIP", "Auxiliary only", "Tip-Adapter-F", "GDA", "LP++"}
    assert set(accuracy["AMU-Tuning"]) == {"1", "2", "4"} and accuracy["Zero-shot CLIP"]["1"]["half"] == 0
    assert all(accuracy[name]["4"]["mean"] > accuracy["Zero-shot CLIP"]["4"]["mean"] + 2 for name in family)
    assert metrics["weights_apart"] < 1e-5, "a dozen lines of torch train the library's head"
    ours = accuracy["AMU-Tuning"]
    for shots, row in metrics["verdicts"].items():
        assert len(row) == len(accuracy) - 1 and {one["verdict"] for one in row.values()} <= {"better", "worse", "tie"}
        gain = ours[shots]["mean"] - accuracy["Zero-shot CLIP"][shots]["mean"]
        assert row["zero_shot"]["difference"] == pytest.approx(gain), "ours minus the other"
    assert ablation["AMU"] == pytest.approx(ours["4"]["mean"])
    assert sum(part["difference"] for part in shapley.values()) == pytest.approx(ablation["AMU"] - ablation[""])
    assert max(shapley, key=lambda part: shapley[part]["difference"]) == "A", "CLIP's features lack texture"
    assert len(metrics["switches"]) == 2 * 6 * 2, "each side, each switch, two numbers of shots"
    assert all(change["p_holm"] >= change["p"] for change in metrics["switches"].values())
    assert len(metrics["falls"]) == 2 * 3 and min(fall["difference"] for fall in metrics["falls"].values()) >= 0
    assert metrics["repaired"] > metrics["broken"]


def test_05_tune_amu_on_a_bank_of_real_features(record, caltech70):
    metrics = record("05_tune_amu", dataset=f"features:{caltech70}", shots=1, seeds=1)
    accuracy = metrics["accuracy"]
    assert accuracy["Zero-shot CLIP"]["1"]["mean"] == pytest.approx(94.46, abs=0.01)
    assert accuracy["AMU-Tuning"]["1"]["mean"] > 94.46 and accuracy["AMU-Tuning"]["1"]["half"] is None
    assert {row["verdict"] for row in metrics["verdicts"]["1"].values()} == {"–"}, "one draw, no verdict"


def test_06_benchmark_methods(record):
    metrics = record("06_benchmark_methods")
    ours, rule = metrics["accuracy"]["digits"], metrics["rule"]["digits"]
    always = {"zero_shot", "linear_probe", "aux_only", "amu"}
    assert set(ours) == always | set(SMALL["06_benchmark_methods"]["only"].split(","))
    assert set(ours["amu"]) == {"1", "2"} and ours["zero_shot"]["1"] == ours["zero_shot"]["2"]
    assert rule["duel"] in ("aux", "CLIP", "tie") and rule["lead"] in ("aux", "CLIP", "tie")
    assert rule["rule"] == "open" if "tie" in (rule["duel"], rule["lead"]) else rule["rule"] in ("holds", "fails")
    assert rule["adapts CLIP"] not in ("amu", "aux_only") and rule["reads aux"] in ("amu", "aux_only")
    for family in ("adapts CLIP", "reads aux"):
        gain = ours[rule[family]]["2"] - ours["zero_shot"]["2"]
        assert rule[f"gain {family}"] == pytest.approx(gain), "the leaders are methods of the table"
    assert 0 <= rule["aux"] <= 100 and 0 <= rule["clip"] <= 100 and set(metrics["foretold"]) == {"digits"}
    triples = metrics["triples"]["digits"]
    assert {key.split("|")[2] for key in triples} == set(fusion.ALL)
    for key, gain in triples.items():
        if key.endswith("|wise"):
            assert gain == pytest.approx(triples[key.replace("wise", "additive")], abs=0.3), "one family, two ways"
        if key.endswith("|zs_norm"):
            assert gain == pytest.approx(triples[key.replace("zs_norm", "additive")], abs=1e-6), "no answer changes"
    shares, (features, predictor, rule_of) = metrics["shapley"]["digits"], metrics["chosen"]["digits"]
    whole = triples[f"{features}|{predictor}|{rule_of}"] - triples["clip|LP|additive"]
    assert sum(shares[part] for part in ("features", "predictor", "fusion")) == pytest.approx(whole)
    spread, most = metrics["spread"]["digits"], metrics["most"]["digits"]
    assert [spread[factor] for factor in most] == sorted(spread.values(), reverse=True)
    assert metrics["optimism"]["digits"][0] > 0 and metrics["published_rows"] == 0
    assert "digits" in metrics["answer"]


def test_06_benchmark_on_a_bank_of_real_features(record, caltech70):
    bank = f"features:{caltech70}"
    some = "clap,frolic_prior,timo"
    metrics = record("06_benchmark_methods", datasets=bank, aux="aux_mobilenet_v2", shots=1, only=some)
    ours, rule = metrics["accuracy"]["caltech70"], metrics["rule"]["caltech70"]
    assert ours["zero_shot"]["1"] == pytest.approx(94.46, abs=0.01)
    assert "timo" not in ours and ours["frolic_prior"]["1"] == pytest.approx(95.55, abs=0.06)
    assert ours["clap"]["1"] > 94.46 and ours["aux_only"]["1"] < 90
    assert rule["clip"] < rule["aux"], "MobileNet's features win the duels that CLIP's lose"


BOTH = ("as they come", "balanced")


def test_07_shift_the_distribution(record):
    metrics = record("07_shift_the_distribution")
    places, rivals = {"in distribution", "sketch", "spurious"}, {"gda", "gda/classwise", "amu"}
    zero_shot, gains = metrics["zero_shot"], metrics["gains"]
    assert set(zero_shot) == places and set(gains) == rivals
    assert gains["amu"]["in distribution"]["difference"] > 2 and zero_shot["sketch"] < zero_shot["in distribution"]
    assert {one["verdict"] for row in gains.values() for one in row.values()} <= {"better", "worse", "tie"}
    assert metrics["auxiliary_heads"]["sketch"] < -3 < metrics["auxiliary_heads"]["spurious"], "unlike CLIP's"
    robust, lost = metrics["robustness"], metrics["robustness_lost"]
    for name in rivals:
        for place in places - {"in distribution"}:
            moved = robust[name][place] - robust["zero_shot"][place]
            assert lost[name][place]["difference"] == pytest.approx(moved), "against zero-shot CLIP's"
    additive, best = metrics["fusions"]["additive"], metrics["fusions"]["additive, best β there"]
    for place in places:
        regret = metrics["regret"][place]
        assert regret == pytest.approx(best[place] - additive[place]) and regret >= 0
    groups = metrics["groups"]
    assert set(groups) == {f"{what}, {how}" for what in ("all", "worst") for how in ("from shapes", *BOTH)}
    for name in rivals | {"zero_shot"}:
        assert all(groups[f"worst, {how}"][name] < groups[f"all, {how}"][name] for how in ("from shapes", *BOTH))
    assert len({groups[f"all, {how}"]["zero_shot"] for how in ("from shapes", *BOTH)}) == 1, "no support, no change"


def test_07_stress_and_new_classes(record):
    metrics = record("07_shift_the_distribution")
    batches = metrics["batches"]
    assert list(batches) == ["2", "7", "18", "36", "72"]
    for name in ("gda", "amu"):
        assert len({round(row[name], 9) for row in batches.values()}) == 1, "row-wise: the batch does not matter"
        assert batches["2"][name] == pytest.approx(metrics["gains"][name]["in distribution"]["difference"])
    assert batches["2"]["gda/classwise"] != batches["72"]["gda/classwise"]
    drawn, noisy = (metrics["supports"][name]["accuracy"] for name in ("as drawn", "40% wrong"))
    assert noisy["amu"] < drawn["amu"] and noisy["zero_shot"] == drawn["zero_shot"]
    for row in metrics["supports"].values():
        assert all(row["worst class"][name] < row["balanced"][name] for name in drawn)
    as_is, levelled = metrics["base_to_new"]["as it is"], metrics["base_to_new"]["levelled"]
    clip = as_is["zero_shot"]
    assert set(as_is) == {"zero_shot", "gda", "amu", "clip_adapter"}, "what looks at its batch is left out"
    for name in ("gda", "amu"):
        assert as_is[name]["new"] == clip["new"] == levelled[name]["new"], "a bias has no new logit"
        assert as_is[name]["base"] == pytest.approx(levelled[name]["base"]), "no base class moves"
        assert levelled[name]["taken"] == pytest.approx(clip["taken"]), "base or new is left to s0"
        assert levelled[name]["new at once"] == pytest.approx(clip["new at once"])
    assert as_is["clip_adapter"]["new"] != clip["new"], "it moves the image"
    assert as_is["amu"]["base"] > clip["base"] and levelled["amu"]["H at once"] > clip["H at once"]
    assert as_is["amu"]["taken"] > 2 * clip["taken"] and as_is["amu"]["H at once"] < levelled["amu"]["H at once"]


def test_07_on_a_bank_of_real_features(record, caltech70):
    real = {"dataset": f"features:{caltech70}", "aux": "aux_mobilenet_v2"}
    metrics = record("07_shift_the_distribution", shifts="auto", **real)
    assert list(metrics["zero_shot"]) == ["in distribution"] and "caltech70 has no shifted version" in metrics["answer"]
    assert metrics["robustness_lost"] == metrics["groups"] == metrics["lines"] == {}
    assert metrics["batches"]["2"]["gda/classwise"] < metrics["batches"]["70"]["gda/classwise"] - 1, "it breaks"
    assert metrics["base_to_new"]["as it is"]["zero_shot"]["H"] > 94


@pytest.mark.stress
def test_07_on_two_classes_and_one_draw(record, tmp_path):
    text, generator = torch.eye(2, 6), torch.Generator().manual_seed(0)
    labels = {part: torch.arange(size) % 2 for part, size in (("train", 8), ("val", 8), ("test", 20))}
    rows = {part: text[y] + 0.5 * torch.randn(len(y), 6, generator=generator) for part, y in labels.items()}
    parts = {"clip": {"clip_x": rows}, "labels": labels, "text": {"clip_x": text}}
    bank = features.save_bank(tmp_path / "bank", class_names=["one", "two"], **parts)
    metrics = record("07_shift_the_distribution", dataset=f"features:{bank}", shifts="auto", seeds=1)
    assert metrics["base_to_new"] == {} and list(metrics["batches"]) == ["2"]
    assert metrics["gains"]["amu"]["in distribution"]["half"] is None, "one draw, no interval"
    assert {row["verdict"] for one in metrics["gains"].values() for row in one.values()} == {"–"}


def test_11_run_one_method(record, tmp_path):
    metrics = record("11_run_one_method")
    assert metrics["verdict"] in ("a gain", "a loss", "a tie")
    assert metrics["gain"]["difference"] == pytest.approx(metrics["accuracy"]["gda"] - metrics["accuracy"]["zero_shot"])
    net = (metrics["repaired"] - metrics["broken"]) / len(features.load("digits", "test", "embedded:clip").y)
    assert 100 * net == pytest.approx(metrics["gain"]["difference"])
    folder = tmp_path / "one"
    done = runs.execute("11_run_one_method", {"dataset": "digits", "method": "cache/uncertain", "seeds": 1}, folder)
    assert done["metrics"]["verdict"] == "–" and done["metrics"]["gain"]["half"] is None
    assert {(row["label"], row["seed"]) for row in done["rows"]} == {("cache/uncertain", 1), ("zero_shot", 1)}


def test_06_draws_what_a_sweep_has_measured(record, tmp_path):
    digits = {"dataset": "digits", "shots": 1, "seeds": 2}
    for method in ("gda", "tip_adapter"):
        runs.execute("11_run_one_method", digits | {"method": method}, tmp_path / "sweep" / method)
    gathered = records.table([tmp_path / "sweep"])
    marked = gathered["label"].eq("gda") & gathered["seed"].eq(1)
    records.write(gathered.assign(accuracy=gathered["accuracy"].where(~marked, 99.0)), tmp_path)
    few = {"datasets": "digits", "shots": 1, "seeds": 2, "epochs": 2, "only": "gda,tip_adapter"}
    run = runs.execute("06_benchmark_methods", few | {"table": str(tmp_path / "results.parquet")}, tmp_path / "run")
    both = gathered[gathered["label"].eq("gda")].set_index("seed")["accuracy"]
    assert run["metrics"]["accuracy"]["digits"]["gda"]["1"] == pytest.approx((99 + both[2]) / 2), "read, not fitted"
    assert {row["label"] for row in run["rows"]} == {"linear_probe", "aux_only", "amu"}, "the rest is fitted"


def test_08_trust_the_confidence(record):
    metrics = record("08_trust_the_confidence")
    plain, fitted = (metrics["calibration"][kind] for kind in ("as it is", "at fitted T"))
    assert set(plain) == set(fitted) == {"zero_shot", "tip_adapter", "gda", "amu"}
    for name, row in plain.items():
        assert row["gap"] == pytest.approx(row["confidence"] - row["accuracy"])
        assert fitted[name]["accuracy"] == pytest.approx(row["accuracy"]), "a temperature changes no answer"
        assert fitted[name]["nll"] < row["nll"] + 0.02
        assert abs(row["gap"]) <= row["ece"] + 1e-6
    for name, parts in metrics["parts"].items():
        assert parts["gap"] == pytest.approx(sum(parts.values()) - parts["gap"]), "three parts add up"
        change = 100 * (plain[name]["gap"] - plain["zero_shot"]["gap"])
        assert parts["gap"] == pytest.approx(change, abs=1e-3)
    assert sum(len(who) for who in metrics["ranges"].values()) == 3
    for scores_of in metrics["excess"].values():
        assert min(scores_of.values()) >= 0 and len(scores_of) == 10
    here, shifted = (metrics["conformal"][name] for name in ("shapes", "shapes-corrupted-5"))
    assert 80 < here["amu"]["sets that hold the truth (%)"] <= 100 and here["amu"]["classes in a set"] < 72
    assert shifted["amu"]["sets that hold the truth (%)"] < here["amu"]["sets that hold the truth (%)"]
    assert set(metrics["verdicts"]["at fitted T"].values()) <= {"better", "worse", "tie"}


def test_09_detect_the_unknown(record):
    metrics = record("09_detect_the_unknown")
    areas = metrics["scores"]
    assert metrics["unknown"] == "shapes-novel beside shapes"
    assert {"s0", "bias amu", "fused amu", "matched amu", "clip", "aux", "clip+aux"} <= set(areas)
    assert set(areas["s0"]) == {"max probability", "max logit", "energy", "MCM", "KL matching"}
    assert set(areas["aux"]) == {"KNN", "Mahalanobis", "Residual", "ReAct", "ViM"}
    assert all(
        0 <= row["AUROC"] <= 100 and 0 <= row["FPR95"] <= 100 for place in areas.values() for row in place.values()
    )
    for key, row in metrics["gains"].items():
        name, place, score = key.split("|")
        gain = areas[f"{place} {name}"][score]["AUROC"] - areas["s0"][score]["AUROC"]
        assert row["difference"] == pytest.approx(gain), key
    outliers = metrics["outliers"]
    in_class = [outliers[f"mislabelled|k-distance in class|{kind}"] for kind in ("clip", "aux", "clip+aux")]
    assert max(in_class) > 60, "a wrong label stands out among its class"
    assert set(metrics["cured"]) == {f"{k}|{w}" for k in ("unknown", "mislabelled") for w in ("costs", "brings")}


def test_09_detect_the_unknown_on_a_bank_of_real_features(record, caltech70):
    metrics = record("09_detect_the_unknown", dataset=f"features:{caltech70}", shots=2, only="tip_adapter", seeds=1)
    assert metrics["unknown"] == "23 of the 70 classes of caltech70, held out"
    assert metrics["scores"]["s0"]["max probability"]["AUROC"] > 85 > metrics["scores"]["clip"]["KNN"]["AUROC"]
    assert {row["verdict"] for row in metrics["gains"].values()} == {"–"}, "one draw, no verdict"
    assert metrics["outliers"] == metrics["cured"] == {}, "two images of a class are no neighbourhood"


def test_10_estimate_accuracy(record):
    metrics = record("10_estimate_accuracy")
    accuracy = metrics["accuracy"]
    assert len(accuracy) == len(metrics["sets"]) == 11, "digits has no shifted versions: ten parts of its test images"
    assert max(accuracy.values()) - min(accuracy.values()) > 3, "the parts differ"
    raw, fitted = (metrics["quality"][f"mean confidence|{kind}"] for kind in ("as it is", "at fitted T"))
    assert fitted["off (points)"] < raw["off (points)"], "CLIP is overconfident on handwriting"
    for key, row in metrics["quality"].items():
        assert 0 <= row["R²"] <= 1 and -1 <= row["rank correlation"] <= 1, key
        assert row["off (points)"] <= row["off at most (points)"], key
    assert metrics["quality"]["ATC|at fitted T"]["rank correlation"] > 0.3
    assert set(metrics["signed"]) == {"mean confidence", "ATC"}


@pytest.mark.parametrize("notebook", ["08_trust_the_confidence", "10_estimate_accuracy"])
def test_08_and_10_on_a_bank_of_real_features(record, caltech70, notebook):
    metrics = record(notebook, dataset=f"features:{caltech70}", shifts="", shots=2, seeds=1, only="gda")
    if notebook.startswith("08"):
        plain, fitted = (metrics["calibration"][kind]["zero_shot"] for kind in ("as it is", "at fitted T"))
        assert plain["ece"] == pytest.approx(0.077, abs=0.002) and plain["gap"] < 0, "underconfident at the scale 100"
        assert fitted["ece"] < plain["ece"] and set(metrics["ece"]) == {"caltech70"}
    else:
        assert metrics["accuracy"]["caltech70"] == pytest.approx(94.46, abs=0.01)


@pytest.mark.stress
def test_08_to_10_on_a_bank_of_two_classes(record, tmp_path):
    """Two classes, a few images, one draw, once without validation images: what does not exist is null."""
    text, noise, banks = torch.eye(2, 6), torch.Generator().manual_seed(0), {}
    for name, sizes in (("val", {"train": 8, "val": 8, "test": 24}), ("none", {"train": 8, "test": 24})):
        labels = {part: torch.arange(n) % 2 for part, n in sizes.items()}
        rows = {part: text[y] + 0.6 * torch.randn(len(y), 6, generator=noise) for part, y in labels.items()}
        parts = {"clip": {"clip_x": rows}, "labels": labels, "text": {"clip_x": text}}
        banks[name] = f"features:{features.save_bank(tmp_path / name, class_names=['one', 'two'], **parts)}"
    few = {"shots": 4, "seeds": 1, "only": "gda"}
    metrics = record("09_detect_the_unknown", dataset=banks["val"], **few)
    assert metrics["scores"]["s0"]["max probability"]["AUROC"] == 50, "one known class has probability one"
    metrics = record("08_trust_the_confidence", dataset=banks["none"], protocol="fixed", **few | {"shifts": ""})
    assert set(metrics["calibration"]) == {"as it is"} and not metrics["conformal"]
    assert set(metrics["verdicts"]["as it is"].values()) == {"–"}
    metrics = record("10_estimate_accuracy", dataset=banks["none"], protocol="fixed", **few)
    assert set(metrics["signed"]) == {"mean confidence"}


def test_20_advise_on_your_images(tmp_path):
    """The saved method is the one that was judged, and the recommended command makes the same."""
    name, folder = "20_advise_on_your_images", tmp_path / "advice"
    metrics = runs.execute(name, SMALL[name], folder)["metrics"]
    promise, test, best = metrics["promise"], metrics["test"], metrics["recommended"]
    assert best == max(metrics["cross_validated"], key=metrics["cross_validated"].get) != "zero_shot"
    assert promise["low"] < promise["mean"] < promise["high"] and promise["images"] == 80
    assert metrics["kept"] == (promise["low"] <= test[best] <= promise["high"])
    assert metrics["regret"] == pytest.approx(max(test.values()) - test[best])
    assert metrics["leads"]["zero_shot"]["verdict"] == "ahead"
    assert all(gain["low"] <= gain["mean"] <= gain["high"] for gain in metrics["more"].values()) and metrics["more"]
    assert metrics["planted"][0] / metrics["planted"][1] > 0.5 and metrics["suspects"][0]["image"].endswith(".png")
    advised, judge = methods.load(folder / "method"), tasks.load_source("digits").test
    by_class = class_accuracy(advised.logits(judge), judge.y)
    assert by_class.mean().item() == pytest.approx(test[best], abs=1e-6), "balanced labels weigh classes equally"
    words = shlex.split(metrics["command"])
    assert words[:3] == ["python", "-m", "lib"] and words[-2] == "--to"
    assert main([*words[3:-1], str(tmp_path / "again")]) == 0
    assert torch.equal(methods.load(tmp_path / "again").logits(judge), advised.logits(judge))


def test_20_advise_on_a_bank_of_real_features_with_two_second_encoders(caltech70, tmp_path):
    changes = {"dataset": f"features:{caltech70}", "shots": 2, "candidates": "aux_mobilenet_v2,aux_inat_bird"}
    metrics = runs.execute("20_advise_on_your_images", changes | {"only": "zero_shot,gda@aux"}, tmp_path)["metrics"]
    assert set(metrics["test"]) == {"zero_shot", "gda@aux on mobilenet_v2", "gda@aux on inat_bird"}
    assert metrics["cross_validated"]["zero_shot"] > 0.85 and "row" in metrics["suspects"][0]
    assert "image" not in metrics["suspects"][0], "a bank has no pictures"
