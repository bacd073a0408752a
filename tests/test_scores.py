"""Scores of a logit vector: the numbers of the authors' code, and what must hold of any logits (hypothesis)."""

import math

import authors
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lib import metrics, scores

CLOSE = 1e-4
THEIRS = authors.outputs("scores")
properties = settings(max_examples=40, deadline=None, database=None, derandomize=True)


@pytest.fixture(scope="module")
def inputs():
    """The authors' inputs; zero-shot logits as 100 times a product of float32 rows."""
    world = authors.outputs("scores_inputs")
    return world | {f"z_{part}": 100 * world[f"img_{part}"] @ world["text"].T for part in ("val", "test", "ood")}


@st.composite
def logits(draw, least=1):
    """Rows of finite logits, many of them tied or constant, of one class or more."""
    shape = draw(st.tuples(st.integers(1, 12), st.integers(least, 7)))
    values = st.integers(-8, 8).map(lambda v: v / 2) if draw(st.booleans()) else st.floats(-30, 30, width=32)
    return torch.from_numpy(draw(arrays(np.float32, shape, elements=values)))


@st.composite
def ranked(draw):
    """Confidences, many of them equal, and whether each image is right."""
    pairs = draw(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=1, max_size=30))
    return torch.tensor([float(c) for c, _ in pairs]), torch.tensor([right for _, right in pairs])


# The authors' numbers


@pytest.mark.parametrize("p", [0, 2, 4])
@pytest.mark.parametrize(("ours", "theirs"), [("none", "raw"), ("mean", "mean"), ("min", "min")])
def test_logit_norm_and_its_aurc_are_the_authors(inputs, p, ours, theirs):
    score = scores.logit_norm(inputs["z_test"], p, ours)
    key = f"selective_logitnorm/score_{theirs}_p{p}"
    assert score.dtype == torch.float64 and authors.error(score, THEIRS[key]) < CLOSE
    hits = metrics.correct(inputs["z_test"], inputs["y_test"])
    area = THEIRS[f"selective_logitnorm/{theirs}_p{p}/aurc"].item()
    assert scores.aurc(score, hits) == pytest.approx(area, abs=2e-5)


def test_the_three_conventions_of_aurc(inputs):
    """Ours is the plain mean; the two others follow from the same curve."""
    hits = metrics.correct(inputs["z_test"], inputs["y_test"])
    risk = scores.risk_coverage(scores.CONFIDENCES["max probability"](inputs["z_test"].double()), hits).numpy()
    n = len(risk)
    assert risk == pytest.approx(THEIRS["selective_logitnorm/risk_msp"][1:].numpy(), abs=1e-6)
    with_zero = np.trapezoid(np.append(0, risk), dx=1 / n)
    without = np.trapezoid(risk, dx=1 / n) / (1 - 1 / n)
    three = [THEIRS[f"selective_logitnorm/msp/{kind}"].item() for kind in ("aurc", "trapezoid", "tu")]
    assert [risk.mean(), with_zero, without] == pytest.approx(three, abs=1e-6)


def test_norm_power_is_chosen_on_validation(inputs):
    z, y = inputs["z_val"], inputs["y_val"]
    hits = metrics.correct(z, y)
    curves = [scores.risk_coverage(scores.logit_norm(z, p, "none"), hits).numpy() for p in range(1, 11)]
    theirs = THEIRS["selective_logitnorm/val_aurc"].tolist()
    assert [np.trapezoid(np.append(0, c), dx=1 / len(c)) for c in curves] == pytest.approx(theirs, abs=2e-5)
    assert scores.norm_power(z, y, centre="none") == 10
    chosen = scores.norm_power(z, y)
    least = min(scores.aurc(scores.logit_norm(z, p), hits) for p in range(1, 11))
    assert scores.aurc(scores.logit_norm(z, chosen), hits) == least


def test_calibration_agrees_and_the_temperature_is_the_optimum(inputs):
    z, y = inputs["z_test"], inputs["y_test"]
    assert metrics.calibration_error(z, y) == pytest.approx(THEIRS["calibration/ece"].item(), abs=1e-6)
    assert metrics.brier(z, y) == pytest.approx(THEIRS["calibration/brier"].item(), abs=1e-5)
    best = scores.temperature(inputs["z_val"], inputs["y_val"])
    assert best == pytest.approx(THEIRS["calibration/optimum"].item(), rel=1e-5)
    assert abs(best - THEIRS["calibration/lbfgs"].item()) > 0.02, "the released optimiser stops before"
    assert metrics.calibration_error(z / best, y) == pytest.approx(
        THEIRS["calibration/ece_at_optimum"].item(), abs=1e-5
    )


VIM = {"max probability": "MSP", "max logit": "MaxLogit", "energy": "Energy", "ReAct": "EnergyReAct", "ViM": "ViM"}
VIM |= {"Residual": "Residual", "KL matching": "KLMatching", "Mahalanobis": "Mahalanobis"}


@pytest.mark.parametrize("head", ["lin", "txt"])
def test_unknown_scores_are_those_of_the_vim_repository(inputs, head):
    weight, offset = (inputs["head_W"], inputs["head_b"]) if head == "lin" else (100 * inputs["text"], torch.zeros(12))
    train, got = inputs["img_train"], {}
    for part, name in (("test", "id"), ("ood", "ood")):
        x = inputs[f"img_{part}"]
        world = {"logits": x @ weight.T + offset, "features": x, "train": train, "train_y": inputs["y_train"]}
        world |= {"train_logits": train @ weight.T + offset, "weight": weight, "offset": offset}
        got[name] = scores.computable(scores.UNKNOWN, world)
    for ours, theirs in VIM.items():
        for name in ("id", "ood"):
            key = f"ood_vim_{head}/{theirs}_{'f64_id' if (theirs, name) == ('Mahalanobis', 'id') else name}"
            assert authors.error(got[name][ours], THEIRS[key]) < CLOSE, key
        about = {kind: THEIRS[f"ood_vim_{head}/{theirs}/{kind}"].item() for kind in ("auroc", "fpr95")}
        assert metrics.auroc(got["id"][ours], got["ood"][ours]) == pytest.approx(about["auroc"], abs=1e-4), ours
        assert scores.fpr95(got["id"][ours], got["ood"][ours]) == pytest.approx(about["fpr95"], abs=0.006), ours
    origin, axes = scores.residual_axes(train, weight, offset)
    assert authors.error(axes @ axes.T, THEIRS[f"ood_vim_{head}/vim_residual_projector"]) < CLOSE
    assert torch.allclose(origin.float(), THEIRS[f"ood_vim_{head}/vim_u"], atol=1e-4)


@pytest.mark.parametrize("part", ["test", "ood"])
def test_scores_of_openood(inputs, part):
    name, x = {"test": "id", "ood": "ood"}[part], inputs[f"img_{part}"]
    mcm, knn, kl = (scores.UNKNOWN[score] for score in ("MCM", "KNN", "KL matching"))
    assert authors.error(mcm(inputs[f"z_{part}"]), THEIRS[f"ood_openood_txt/mcm_cos_tau1_{name}"]) < CLOSE
    assert authors.error(knn(x, inputs["img_train"], k=5), THEIRS[f"ood_openood_txt/knn_K5_{name}"]) < CLOSE
    val = inputs["z_val"]
    val = val[metrics.predictions(val) != THEIRS["ood_openood_txt/klm_missing_class"]]
    theirs = THEIRS[f"ood_openood_txt/klm_missing_{name}"]
    assert authors.error(kl(inputs[f"z_{part}"], val), theirs) < CLOSE, "a class that is never predicted"


@pytest.mark.parametrize("part", ["test", "ood"])
def test_clipn_decides_as_released(inputs, part):
    name = {"test": "id", "ood": "ood"}[part]
    world = {"logits": inputs[f"z_{part}"], "negated": 100 * inputs[f"img_{part}"] @ inputs["text_no"].T}
    got = scores.computable(scores.UNKNOWN, world)
    assert authors.error(got["CLIPN, CTW"], THEIRS[f"clipn/ctw_{name}"]) < CLOSE
    assert authors.error(got["CLIPN, ATD"], THEIRS[f"clipn/atd_{name}"]) < CLOSE


@pytest.mark.parametrize("k", [16, 32])
@pytest.mark.parametrize("ours", ["k-distance", "LID", "SLOF", "DAO"])
def test_local_outliers_are_the_corrected_ones(ours, k):
    got = scores.LOCAL_OUTLIERS[ours](THEIRS["local_outlier/X"], k)
    assert (
        authors.error(got, THEIRS[f"local_outlier/corrected_{ours.lower().replace('k-distance', 'kdist')}_k{k}"])
        < CLOSE
    )
    if (ours, k) == ("SLOF", 16):
        for released in ("idxfix", "theirs"):
            assert authors.error(got, THEIRS[f"local_outlier/{released}_slof_k16"]) > 0.01, "not the released ones"


def test_mano_is_the_authors(inputs):
    z = inputs["z_test"].double()
    head = inputs["img_test"].double() @ inputs["head_W"].double().T + inputs["head_b"]
    rows = {"x100": z, "cos": z / 100, "x100_centred": z - z.mean(1, keepdim=True), "head": head}
    mano = scores.ESTIMATES["MaNo"]
    for key, logits in rows.items():
        assert mano(logits) == pytest.approx(THEIRS[f"mano/{key}"].item(), rel=1e-4), key
    assert mano(z) > 2 * mano(z / 100), "one classifier, two scales, two formulas"
    shifts = [100 * shift @ inputs["text"].T for shift in inputs["img_shift"]]
    assert [mano(s) for s in shifts] == pytest.approx(THEIRS["mano/shift_auto"].tolist(), rel=1e-4)
    taylor = scores.estimation.taylor(head)
    assert authors.error(taylor, THEIRS["mano/Q_taylor_head"]) < CLOSE


# What must hold of any logits

OFFSET_FREE = ("max probability", "margin", "margin of logits", "entropy", "kurtosis", "logit norm")
SCALE_FREE = ("kurtosis", "logit norm")


@properties
@given(logits(), st.integers(-20, 20), st.sampled_from([0.5, 2.0, 8.0]), st.randoms(use_true_random=False))
def test_confidences_are_finite_and_invariant_as_they_say(z, offset, scale, random):
    order = random.sample(range(z.shape[1]), z.shape[1])
    for name, confidence in scores.CONFIDENCES.items():
        value = confidence(z)
        assert value.shape == (len(z),) and torch.isfinite(value).all(), name
        assert torch.allclose(confidence(z[:, order]), value, atol=1e-4), f"{name}: the order of the classes"
        if name in OFFSET_FREE and (name != "kurtosis" or len(z.unique()) > 1):
            assert torch.allclose(confidence(z + offset), value, atol=2e-3), f"{name}: an offset"
        if name in SCALE_FREE:
            assert torch.allclose(confidence(scale * z), value, rtol=1e-3, atol=1e-4), f"{name}: a scale"
    probability, entropy = (scores.CONFIDENCES[name](z) for name in ("max probability", "entropy"))
    assert (probability >= 1 / z.shape[1] - 1e-5).all() and (probability <= 1 + 1e-5).all()
    assert (entropy <= 1e-5).all() and (entropy >= -math.log(z.shape[1]) - 1e-4).all()


def test_an_offset_and_a_scale_do_move_the_others():
    z = torch.tensor([[3.0, 1.0, 0.0]])
    for name, confidence in scores.CONFIDENCES.items():
        assert torch.equal(confidence(z + 5), confidence(z)) or name not in OFFSET_FREE or name in SCALE_FREE
        assert torch.allclose(confidence(z + 5), confidence(z), atol=1e-5) == (name in OFFSET_FREE), name
        assert torch.allclose(confidence(2 * z), confidence(z), atol=1e-5) == (name in SCALE_FREE), name


@properties
@given(ranked(), st.randoms(use_true_random=False))
def test_risk_coverage_does_not_depend_on_the_order_of_rows_or_on_the_scale(pair, random):
    confidence, hits = pair
    risk, error = scores.risk_coverage(confidence, hits), 1 - hits.double().mean().item()
    order = torch.tensor(random.sample(range(len(hits)), len(hits)))
    assert torch.allclose(scores.risk_coverage(confidence[order], hits[order]), risk)
    assert torch.allclose(scores.risk_coverage(confidence.exp(), hits), risk)
    assert (risk >= 0).all() and (risk <= 1).all() and risk[-1].item() == pytest.approx(error)
    best, none = (scores.aurc(c, hits) for c in (hits.double(), torch.zeros(len(hits))))
    assert best - 1e-12 <= scores.aurc(confidence, hits) and none == pytest.approx(error)
    worst = scores.aurc(-hits.double(), hits)
    assert scores.aurc(confidence, hits) <= worst + 1e-12


def test_risk_coverage_by_hand_and_what_it_refuses():
    confidence, hits = torch.tensor([3.0, 2.0, 2.0, 1.0]), torch.tensor([True, False, True, False])
    assert scores.risk_coverage(confidence, hits).tolist() == pytest.approx([0, 0.25, 1 / 3, 0.5])
    with pytest.raises(ValueError, match="1 of 4 confidences"):
        scores.risk_coverage(confidence.index_fill(0, torch.tensor([1]), math.nan), hits)
    assert math.isnan(scores.aurc(confidence[:0], hits[:0]))
    with pytest.raises(ValueError, match="centre is one of"):
        scores.logit_norm(torch.zeros(1, 2), centre="median")


@properties
@given(logits(least=2), st.integers(0, 5), st.sampled_from([0.5, 4.0]), st.data())
def test_temperature_minimises_the_loss_and_scales_with_the_logits(z, offset, scale, data):
    y = torch.tensor(data.draw(st.lists(st.integers(0, z.shape[1] - 1), min_size=len(z), max_size=len(z))))
    best = scores.temperature(z, y)
    assert best >= 0.01 - 1e-9

    def loss(t):
        return torch.nn.functional.cross_entropy(z.double() / t, y).item()

    assert loss(best) <= min(loss(t) for t in (0.01, 0.1, 0.5, 1.0, 2.0, 10.0, 1e6)) + 1e-6
    if 0.1 < best < 10:
        assert scores.temperature(scale * (z + offset), y) == pytest.approx(scale * best, rel=1e-3)


def test_conformal_sets_cover_what_they_promise():
    generator = torch.Generator().manual_seed(0)
    z = 3 * torch.randn(4000, 5, generator=generator)
    y = torch.multinomial(z.softmax(1), 1, generator=generator)[:, 0]
    size = []
    for coverage in (0.5, 0.9):
        sets = scores.conformal_sets(z[:2000], y[:2000], z[2000:], coverage)
        hit = sets.gather(1, y[2000:, None]).double().mean().item()
        assert hit == pytest.approx(coverage, abs=0.03)
        size.append(sets.double().sum(1).mean().item())
    assert size[0] < size[1] < 5
    assert scores.conformal_sets(z[:8], y[:8], z, 0.9).all(), "eight images cannot promise 90 %"
    assert not scores.conformal_sets(z[:9], y[:9], z, 0.9).all()
    with pytest.raises(ValueError, match="between 0 and 1"):
        scores.conformal_sets(z, y, z, 1.0)


@properties
@given(st.lists(st.integers(0, 5), max_size=12), st.lists(st.integers(0, 5), max_size=12))
def test_auroc_counts_pairs_and_fpr95_lies_in_its_range(inliers, outliers):
    high, low = (torch.tensor(values, dtype=torch.float64) for values in (inliers, outliers))
    area, rate = metrics.auroc(high, low), scores.fpr95(high, low)
    if not inliers or not outliers:
        assert math.isnan(area) and math.isnan(rate)
        return
    pairs = [(a > b) + (a == b) / 2 for a in inliers for b in outliers]
    assert area == pytest.approx(np.mean(pairs)) and metrics.auroc(low, high) == pytest.approx(1 - area)
    assert metrics.auroc_interval(high, low)[0] == pytest.approx(area)
    level = sorted(inliers, reverse=True)[max(int(0.95 * len(inliers)), 1) - 1]
    assert rate == pytest.approx(np.mean([b >= level for b in outliers]))


def small_world(seed=0):
    """Eight images, four of training that lie in a plane, two classes."""
    generator = torch.Generator().manual_seed(seed)
    train = torch.cat([torch.randn(4, 2, generator=generator), torch.zeros(4, 3)], dim=1)
    weight, x = torch.randn(2, 5, generator=generator), torch.randn(8, 5, generator=generator)
    arrays = {"logits": x @ weight.T, "features": x, "train": train, "train_logits": train @ weight.T}
    return arrays | {"train_y": torch.tensor([0, 1, 0, 1]), "weight": weight, "offset": torch.zeros(2)}


def test_the_table_gives_each_score_whose_arrays_exist():
    world = small_world()
    assert set(scores.UNKNOWN) - set(scores.computable(scores.UNKNOWN, world)) == {"CLIPN, CTW", "CLIPN, ATD"}
    bare = scores.computable(scores.UNKNOWN, {"logits": world["logits"], "features": None})
    assert set(bare) == {"max probability", "max logit", "energy", "MCM"}
    assert scores.needs(scores.UNKNOWN["KNN"]) == ("features", "train")


@pytest.mark.parametrize("name", scores.UNKNOWN)
def test_unknown_scores_are_finite_per_image_and_order_free(name):
    """On images of training that span a plane, and on features that are all one row."""
    for world in (small_world(), small_world() | {"train": torch.ones(4, 5)}):
        world = world | {"negated": torch.zeros_like(world["logits"])}
        score = scores.UNKNOWN[name]
        whole = score(**{need: world[need] for need in scores.needs(score)})
        assert whole.shape == (8,) and torch.isfinite(whole).all()
        order = torch.tensor([3, 0, 7, 1])
        few = {n: world[n][order] if n in ("logits", "features", "negated") else world[n] for n in scores.needs(score)}
        assert torch.allclose(score(**few), whole[order], atol=1e-6), "no image counts for another"


def test_react_clips_and_vim_subtracts_what_lies_off_the_plane():
    world = small_world()
    react = scores.UNKNOWN["ReAct"]
    heads = {name: world[name] for name in ("weight", "offset")}
    free = react(world["features"], 100 + world["train"], **heads)
    assert torch.allclose(free, world["logits"].double().logsumexp(1), atol=1e-5), "clipped above everything"
    inside = torch.cat([world["features"][:, :2], torch.zeros(8, 3)], dim=1)
    off = scores.UNKNOWN["Residual"](inside, world["train"], **heads)
    assert off.abs().max() < 1e-6 < -scores.UNKNOWN["Residual"](world["features"], world["train"], **heads).max()
    names = scores.needs(scores.UNKNOWN["ViM"])
    vim = scores.UNKNOWN["ViM"](**{name: world[name] for name in names})
    assert torch.allclose(vim, world["logits"].double().logsumexp(1)), "no residual in training, nothing to subtract"


@properties
@given(st.integers(2, 20), st.integers(1, 25), st.integers(0, 9), st.booleans())
def test_local_outliers_are_finite_move_with_no_order_and_take_copies(n, k, seed, copies):
    x = torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))
    x = x[:1].repeat(n, 1) if copies else x
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    for name, outlier in scores.LOCAL_OUTLIERS.items():
        value = outlier(x, k)
        assert value.shape == (n,) and torch.isfinite(value).all(), name
        assert torch.allclose(outlier(x[order], k), value[order], rtol=1e-6), f"{name}: the order of the rows"


def test_a_row_far_from_all_others_is_the_outlier_and_one_row_has_none():
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(1))
    x[7] += 30
    assert {int(outlier(x, 8).argmax()) for name, outlier in scores.LOCAL_OUTLIERS.items() if name != "LID"} == {7}
    with pytest.raises(ValueError, match="at least 2 rows"):
        scores.LOCAL_OUTLIERS["SLOF"](x[:1])


@properties
@given(logits(), logits(), st.data())
def test_estimates_stay_in_their_ranges(z, val, data):
    classes = min(z.shape[1], val.shape[1])
    z, val = z[:, :classes], val[:, :classes]
    y = torch.tensor(data.draw(st.lists(st.integers(0, val.shape[1] - 1), min_size=len(val), max_size=len(val))))
    got = scores.computable(scores.ESTIMATES, {"logits": z, "val_logits": val, "val_y": y, "zero_shot": z, "bias": -z})
    assert set(got) == set(scores.ESTIMATES)
    assert all(-1e-5 <= value <= 1 + 1e-5 for value in got.values()), got
    c = z.shape[1]
    assert 1 / c - 1e-9 <= got["MaNo"] <= c**-0.25 + 1e-9


def test_atc_on_its_own_validation_images_is_their_accuracy_and_what_estimates_do_with_one_hot_rows():
    generator = torch.Generator().manual_seed(2)
    val, y = torch.randn(50, 4, generator=generator), torch.randint(4, (50,), generator=generator)
    atc, agreement = scores.ESTIMATES["ATC"], scores.ESTIMATES["agreement"]
    assert atc(val, val, y) == pytest.approx(metrics.accuracy(val, y))
    assert atc(val, val, metrics.predictions(val)) == 1
    assert atc(val, val, (metrics.predictions(val) + 1) % 4) == 0
    assert agreement(val, 3 * val) == 1 and agreement(val, -val) < 0.5
    sure = 1000 * torch.eye(4)
    assert [scores.ESTIMATES[n](sure) for n in ("MaNo", "mean confidence", "entropy")] == pytest.approx(
        [4**-0.25, 1, 1]
    )
