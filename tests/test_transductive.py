"""Transductive predictors against the authors' own code."""

from dataclasses import replace

import authors
import pytest
import torch

from lib import metrics, predictors, tasks
from lib.predictors import transductive
from lib.tasks import FewShotTask

CLOSE = 1e-4  # relative to the spread of the reference


@pytest.fixture(scope="module")
def task():
    return authors.task()


@pytest.mark.parametrize("few_shot", [True, False])
def test_transclip_agrees_in_a_consistent_row_order(task, few_shot):
    theirs = authors.outputs("transclip")["fs_rows_reordered/z" if few_shot else "zs/z"]
    found = predictors.TransCLIP(use_support=few_shot).fit(task).logits(task.test).softmax(1)
    assert authors.error(found, theirs) < CLOSE


@pytest.mark.parametrize(
    ("delta", "gamma", "key"),
    [
        (0.3, 1.3 / 2.5, "corrected_dist_rows_fp32_logits"),
        (0.0, 1.3 / 2.5, "corrected_delta0_fp32_logits"),
        (0.0, 0.0, "corrected_delta0_gamma0_fp32_logits"),
    ],
)
def test_m_adapter_agrees_with_the_formula(monkeypatch, delta, gamma, key):
    inputs, theirs = authors.outputs("scores_inputs"), authors.outputs("caps_madapter")
    support = theirs["support_idx"]

    def part(name, rows=slice(None)):
        x = inputs[f"img_{name}"][rows]
        return {"clip": x, "aux": x, "y": inputs[f"y_{name}"][rows]}

    task = FewShotTask.from_arrays(
        text=inputs["text"], support=part("train", support), val=part("val"), test=part("test")
    )
    adapter = predictors.MAdapter(delta=delta, gamma=gamma).fit(task, captions=inputs["cap_train"][support])
    bias = adapter.logits(task.test)
    assert authors.error(task.test.zero_shot + 2.5 * bias, theirs[key]) < CLOSE
    monkeypatch.setattr(transductive, "CHUNK", 100)
    assert torch.allclose(adapter.logits(task.test), bias, atol=1e-4)


@pytest.mark.parametrize("delta", [0.0, 0.3])
def test_m_adapter_of_unequal_classes_sums_over_their_own_images(task, delta):
    few = authors.unequal(task)
    adapter = predictors.MAdapter(delta=delta).fit(few)
    log_p = [(part.zero_shot / 50).log_softmax(1) for part in (task.test, few.support)]
    kl = (log_p[0].exp()[:, None] * (log_p[0][:, None] - log_p[1])).sum(-1)
    captions = few.text[few.support.y]
    affinity = (1 - delta) * task.test.clip @ few.support.clip.T + delta * task.test.clip @ captions.T
    rescaled = affinity.min() + (kl - kl.min()) * (affinity.max() - affinity.min()) / (kl.max() - kl.min())
    each = torch.exp(-5.5 * (1 - affinity)) - 0.5 * rescaled
    expected = torch.stack([each[:, few.support.y == c].sum(1) for c in range(few.num_classes)], dim=1)
    assert authors.error(adapter.logits(task.test), expected) < CLOSE
    assert authors.error(next(adapter.logits_grid(task.test, [{}])), expected) < CLOSE


def test_large_grids_of_m_adapter_are_computed_in_chunks(task, monkeypatch):
    adapter = predictors.MAdapter().fit(authors.unequal(task))
    grid = [{"gamma": 2.0}, {"delta": 0.0}, {"sharpness": 2.0}]
    together = list(adapter.logits_grid(task.test, grid))
    monkeypatch.setattr(transductive, "CHUNK", 7)
    for logits, other in zip(adapter.logits_grid(task.test, grid), together, strict=True):
        assert authors.error(logits, other) < CLOSE


def test_transclip_takes_unequal_classes_in_any_order(task):
    few = authors.unequal(task)
    by_class = replace(few, support=few.support.rows(torch.argsort(few.support.y)))
    logits = predictors.TransCLIP().fit(few).logits(task.test)
    assert torch.isfinite(logits).all()
    assert authors.error(predictors.TransCLIP().fit(by_class).logits(task.test), logits) < CLOSE


def test_transclip_without_support_needs_no_shots(task):
    one = predictors.TransCLIP(use_support=False).fit(task).logits(task.test)
    other = predictors.TransCLIP(use_support=False).fit(authors.unequal(task)).logits(task.test)
    assert torch.equal(one, other)


DEPENDENT = [getattr(predictors, name)() for name in ("MAdapter", "TransCLIP", "StatA", "ClassPrior", "ZLaP", "TDA")]


@pytest.mark.parametrize("predictor", DEPENDENT, ids=lambda predictor: type(predictor).__name__)
def test_logits_of_a_row_depend_on_the_rows_around_it(task, predictor):
    assert predictor.per_batch
    rows = torch.arange(40)
    logits = predictor.fit(task).logits(task.test)[rows]
    assert authors.error(predictor.logits(task.test.rows(rows)), logits) > 0.01


def test_stat_a_agrees_with_its_formulas(task):
    """Dense matrices, a loop over classes, probabilities instead of logarithms, double precision."""
    x, text, p = task.test.clip.double(), task.text.double(), task.test.zero_shot.double().softmax(1)
    z, n = p, len(x)
    start = sum(z[i, c] * (x[i] - text[c]) ** 2 for i in range(n) for c in range(12)) / n
    mean, variance = text, start.expand(12, -1)
    cosine = x @ x.T
    graph = torch.zeros_like(cosine)
    for i, near in enumerate(cosine.topk(4).indices[:, 1:]):
        graph[i, near] = cosine[i, near]
    for round_ in range(11):
        likelihood = -((x[:, None] - mean) ** 2 / (2 * variance)).sum(2)
        for _ in range(5):
            z = p * torch.exp((likelihood + 25 / 3 * (graph + graph.T) @ z) / 50)
            z = z / z.sum(1, keepdim=True)
        if round_ < 10:
            images = torch.bincount(z.argmax(1), minlength=12)
            means, variances = [], []
            for c in range(12):
                b, own = images[c] / (1.0 + images[c]), (z[:, c, None] * x).sum(0)
                mu = b * own / own.norm() + (1 - b) * text[c]
                means.append(mu / mu.norm())
                own = (z[:, c, None] * (x - means[c]) ** 2).sum(0) / z[:, c].sum()
                variances.append(b * own + (1 - b) * (start + (text[c] - means[c]) ** 2))
            mean, variance = torch.stack(means), torch.stack(variances)
    ours = predictors.StatA().fit(task).logits(task.test).softmax(1)
    assert (ours - z).abs().max() < 1e-4


def test_statistics_of_stat_a_run_from_the_texts_to_transclips(task):
    x, z = task.test.clip, task.test.zero_shot.softmax(1)
    free, anchored = predictors.StatA(alpha=0.0).fit(task), predictors.StatA(alpha=1e9).fit(task)
    plain = predictors.TransCLIP(use_support=False).fit(task)
    first = free.start(x, z)
    assert z.argmax(1).bincount(minlength=12).all(), "every class has an image"
    (mean, variance), (theirs, shared) = free.statistics(x, z, *first), plain.statistics(x, z)
    assert torch.allclose(mean, theirs, atol=1e-5)
    assert torch.allclose((variance * z.sum(0)[:, None]).sum(0) / len(x), shared, atol=1e-6), "shared over classes"
    mean, variance = anchored.statistics(x, z, *first)
    assert torch.allclose(mean, task.text, atol=1e-5) and torch.allclose(variance, first[1], atol=1e-6)


def test_stat_a_bears_a_batch_that_lacks_classes(task):
    few = task.test.rows((task.test.y < 3).nonzero()[:, 0])
    accuracy = {
        name: metrics.accuracy(getattr(predictors, name)().fit(task).logits(few), few.y)
        for name in ("StatA", "ClassPrior", "ZLaP")
    }
    accuracy["zero-shot"] = metrics.accuracy(few.zero_shot, few.y)
    assert accuracy["StatA"] >= accuracy["zero-shot"] > accuracy["ClassPrior"]
    other = replace(task, support=authors.unequal(task).support)
    assert torch.equal(*(predictors.StatA().fit(one).logits(task.test) for one in (task, other))), "no label enters"


def test_class_prior_is_the_fixed_point(task):
    p = task.test.zero_shot.double().softmax(1)
    matrix = torch.stack([p[p.argmax(1) == k].mean(0) for k in range(12)], dim=1)
    values, vectors = torch.linalg.eig(matrix)
    pi = vectors[:, values.real.argmax()].real
    bias = predictors.ClassPrior(steps=5000).fit(task).logits(task.test)
    assert torch.allclose(bias[0], -(pi / pi.sum()).log().float(), atol=1e-3)
    assert torch.equal(bias, bias[:1].expand_as(bias)), "one prior for the whole split"
    by_hand = torch.full((12,), 1 / 12, dtype=p.dtype)
    for _ in range(100):
        by_hand = torch.stack([sum(matrix[j, k] * by_hand[k] for k in range(12)) for j in range(12)])
    assert torch.allclose(predictors.ClassPrior().fit(task).logits(task.test)[0], -by_hand.log().float(), atol=1e-4)


def test_a_uniform_prior_changes_nothing_and_a_missing_class_gains(task):
    """Twelve images, one for each class, all with the same gap: pi is 1 / C and a constant is added."""
    even = replace(task.test.rows(torch.arange(12)), zero_shot=3 * torch.eye(12))
    bias = predictors.ClassPrior().fit(task).logits(even)
    assert torch.allclose(bias, torch.full_like(bias, torch.tensor(12.0).log().item()), atol=1e-5)
    assert torch.allclose((even.zero_shot + bias).softmax(1), even.zero_shot.softmax(1), atol=1e-6), "s0"
    rows = (task.test.zero_shot.argmax(1) != 4).nonzero()[:, 0]
    few, all_ = (predictors.ClassPrior().fit(task).logits(part)[0] for part in (task.test.rows(rows), task.test))
    assert torch.isfinite(few).all() and few[4] > all_[4] + 0.5


def test_class_prior_on_real_features(caltech70):
    task = tasks.sample(tasks.load_source(f"features:{caltech70}", need_text=True), 1, 1)
    split, bias = task.test, predictors.ClassPrior().fit(task).logits(task.test)
    accuracy = [100 * metrics.accuracy(logits, split.y) for logits in (split.zero_shot, split.zero_shot + bias)]
    assert accuracy == pytest.approx([94.46, 95.55], abs=0.06)
    naive = split.zero_shot - split.zero_shot.softmax(1).mean(0).log()
    assert 100 * metrics.accuracy(naive, split.y) == pytest.approx(90.52, abs=0.06)


@pytest.mark.parametrize("use_support", [False, True])
def test_zlap_is_the_inverse_on_the_whole_graph(task, use_support):
    """A dense graph, edge by edge, and a matrix inverse."""
    few = authors.unequal(task)
    zlap = predictors.ZLaP(use_support=use_support, k=3, alpha=0.6).fit(few)
    labelled = few.support if use_support else few.support.rows(torch.arange(0))
    images = torch.cat([labelled.clip, few.test.clip]).double()
    text, n = few.text.double(), 12 + len(images)
    a = torch.zeros(n, n, dtype=torch.float64)
    for i, x in enumerate(images):
        for c in (x @ text.T).topk(3).indices.tolist():
            a[12 + i, c] = max(0.0, float(x @ text[c])) ** 5
        for j in (x @ images.T).topk(3).indices.tolist():
            a[12 + i, 12 + j] = max(0.0, float(x @ images[j])) if i != j else 0.0
    w = a + a.T
    degree = w.sum(1).clamp_min(1e-12)
    w = w / (degree[:, None] * degree).sqrt()
    start = torch.zeros(n, 12, dtype=torch.float64)
    start[torch.arange(12 + len(labelled)), torch.cat([torch.arange(12), labelled.y])] = 1
    expected = (torch.linalg.inv(torch.eye(n) - 0.6 * w) @ start)[-len(few.test) :]
    assert authors.error(zlap.logits(few.test), expected.float()) < 1e-4


def test_zlap_without_support_reads_no_label(task):
    one, other = (predictors.ZLaP().fit(t).logits(task.test) for t in (task, authors.unequal(task)))
    assert torch.equal(one, other) and (one >= 0).all()
