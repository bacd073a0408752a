"""Training loops: the authors' trajectories, heads that do not disturb each other, schedules."""

import authors
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from lib import fusion, metrics, predictors
from lib.predictors import convex, training

RUNS = {"lam035_none": (0.35, "none"), "lam035_moment": (0.35, "kurtosis"), "lam1_none": (1.0, "none")}


@pytest.fixture(scope="module")
def task():
    return authors.task()


def train(task, names, theirs, **settings):
    """Train one head per name, all of them together."""
    u = [fusion.uncertainty(task.support.zero_shot, RUNS[name][1], 0.4, "probabilities", 250.0)[None] for name in names]
    start = metrics.class_means(task.support.aux, task.support.y, 12)
    return training.train_heads(
        task.support.aux[None],
        task.support.zero_shot[None],
        task.support.y,
        start.expand(len(names), -1, -1),
        theirs["perms"],
        **{"lam": [RUNS[name][0] for name in names], "beta": 0.5, "u": torch.stack(u)} | settings,
        standardised=True,
    )


def test_class_means_are_the_authors_initial_weight(task):
    theirs = authors.outputs("amu")
    assert authors.error(task.support.aux, theirs["aux_train_unit"]) < 1e-5
    means = metrics.class_means(task.support.aux, task.support.y, 12)
    assert authors.error(means, theirs["init_weight"]) < 1e-5


@pytest.mark.parametrize("together", [False, True])
def test_heads_follow_the_authors_trajectories(task, together):
    theirs = authors.outputs("amu")
    groups = [list(RUNS)] if together else [[name] for name in RUNS]
    for names in groups:
        epochs = []
        heads = train(task, names, theirs, watch=lambda _, __, w: epochs.append(w.clone()))  # noqa: B023
        for head, name in enumerate(names):
            key = f"train/{name}"
            assert (heads.weight[head] - theirs[f"{key}/weight_final"]).abs().max() < 1e-5
            assert (epochs[0][head] - theirs[f"{key}/weight_epoch1"]).abs().max() < 1e-5
            assert authors.error(heads.losses[head], theirs[f"{key}/losses"]) < 1e-4
            bias = fusion.standardise(task.test.aux @ heads.weight[head].T)
            assert authors.error(bias, theirs[f"{key}/test_aux_logits_final"]) < 1e-4
            u = fusion.uncertainty(task.test.zero_shot, RUNS[name][1], 0.4, "probabilities", 250.0)
            fused = task.test.zero_shot + 0.5 * u[:, None] * bias
            assert authors.error(fused, theirs[f"{key}/test_logits_final"]) < 1e-4


def test_rates_are_the_authors(task):
    amu, taskres = authors.outputs("amu"), authors.outputs("taskres")
    assert authors.error(training.cosine(1e-3, 60), amu["train/lam1_none/lr"]) < 1e-5
    assert authors.error(training.warmed_cosine(2e-3, 10, 3), taskres["train/lr"]) < 1e-5


@pytest.mark.parametrize("threads", [1, 2])
def test_heads_and_threads_do_not_disturb_each_other(task, threads):
    """Five heads that differ in everything a head can differ in, one by one and together."""
    generator = torch.Generator().manual_seed(0)
    x, n = torch.stack([task.support.aux, task.support.aux.flip(1)]), len(task.support)
    scores, start = task.support.zero_shot.expand(2, -1, -1), torch.rand(5, 12, x.shape[2], generator=generator) / 10
    orders = training.epoch_orders(n, 3, generator)
    u = torch.rand(5, 2, n, generator=generator)
    own = {"lam": [0.1, 0.5, 0.9, 0.0, 1.0], "beta": [1.0, 2.0, 5.0, 0.5, 1.0]}
    common = {"batch_size": 7, "weight_decay": 0.1, "lr": 2e-3, "standardised": True}
    common["picks"] = torch.randint(2, orders.shape, generator=generator)

    def fit(which):
        settings = {name: values[which] for name, values in own.items()} | common
        return training.train_heads(x, scores, task.support.y, start[which], orders, u=u[which], **settings)

    alone = [fit(slice(i, i + 1)) for i in range(5)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = fit(slice(0, 5))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert (together.weight - torch.cat([heads.weight for heads in alone])).abs().max() < 1e-6
    assert (together.losses - torch.cat([heads.losses for heads in alone])).abs().max() < 1e-5


@pytest.mark.parametrize("standardised", [False, True])
def test_heads_are_autograds(task, standardised):
    """Two heads with views of the support, against torch's autograd, AdamW and scheduler."""
    generator = torch.Generator().manual_seed(0)
    support, orders = task.support, training.epoch_orders(len(task.support), 2, generator)
    x = torch.stack([support.aux, support.aux.flip(1)])
    scores, u = support.zero_shot.expand(2, -1, -1), torch.rand(2, 2, len(support), generator=generator)
    picks = torch.randint(2, orders.shape, generator=generator)
    start = torch.rand(2, 12, x.shape[2], generator=generator)
    settings = {"lam": [0.3, 0.8], "beta": [2.0, 0.5], "standardised": standardised, "batch_size": 7, "picks": picks}
    ours = training.train_heads(x, scores, support.y, start, orders, u=u, **settings)
    for head, (lam, beta) in enumerate(zip(settings["lam"], settings["beta"], strict=True)):
        weight = torch.nn.Parameter(start[head].clone())
        optimiser = torch.optim.AdamW([weight], lr=1e-3, weight_decay=0.01, eps=1e-4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 2 * 7)
        for order, views in zip(orders, picks, strict=True):
            for rows, view in zip(order.split(7), views.split(7), strict=True):
                bias = x[view, rows] @ weight.T
                bias = (bias - bias.mean(1, keepdim=True)) / bias.std(1, keepdim=True) if standardised else bias
                fused = support.zero_shot[rows] + beta * u[head, view, rows][:, None] * bias
                losses = [torch.nn.functional.cross_entropy(logits, support.y[rows]) for logits in (bias, fused)]
                optimiser.zero_grad()
                ((1 - lam) * losses[0] + lam * losses[1]).backward()
                optimiser.step()
                schedule.step()
        assert (ours.weight[head] - weight).abs().max() < 1e-5
        assert ours.losses[head, -1, 2].item() == pytest.approx(losses[0].item(), rel=1e-4)


@pytest.mark.parametrize("name", ["lam", "beta"])
def test_settings_of_another_length_are_refused(task, name):
    with pytest.raises(ValueError, match=f"{name} has 2 values for 1 heads"):
        train(task, ["lam1_none"], authors.outputs("amu"), **{name: [0.5, 0.7]})


@pytest.mark.parametrize("name", RUNS)
def test_the_head_is_the_authors_code(task, name):
    theirs, (lam, confidence) = authors.outputs("amu"), RUNS[name]
    code = {"standardised": True, "on": "probabilities", "constant": 250.0, "beta": 0.5, "epochs": 10}
    head = predictors.MultiBranchHead(lam=lam, confidence=confidence, keep_epochs=True, **code)
    head.fit(task, orders=theirs["perms"])
    assert (head.weight_ - theirs[f"train/{name}/weight_final"]).abs().max() < 1e-5
    assert (head.epoch_weights_[0] - theirs[f"train/{name}/weight_epoch1"]).abs().max() < 1e-5
    bias, fused = head.branches(task.test, head.weight_)
    assert authors.error(bias, theirs[f"train/{name}/test_aux_logits_final"]) < 1e-4
    assert authors.error(fused, theirs[f"train/{name}/test_logits_final"]) < 1e-4


@pytest.mark.parametrize("features", ["clip", "aux"])
@pytest.mark.parametrize("inverse_penalty", [0.1, 10.0])
def test_linear_probe_is_scikit_learns(task, features, inverse_penalty):
    x, y = task.support.features(features).double().numpy(), task.support.y.numpy()
    theirs = LogisticRegression(C=inverse_penalty, tol=1e-8, max_iter=5000).fit(x, y)
    ours = predictors.LinearProbe(features, inverse_penalty).fit(task)
    assert authors.error(ours.weight_, torch.from_numpy(theirs.coef_).float()) < 1e-4
    assert (ours.intercept_ - torch.from_numpy(theirs.intercept_).float()).abs().max() < 1e-4


@pytest.mark.parametrize("width", [20, 48, 148])
@pytest.mark.parametrize("lam", [0.0, 0.4, 1.0])
def test_the_convex_optimum_has_no_gradient(task, lam, width):
    """Autograd on the formula, at the weights found; 48 rows are many for 20 dimensions, and few for the others."""
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([task.support.aux.double(), torch.rand(48, 100, generator=generator)], 1)[:, :width]
    x = torch.nn.functional.normalize(x, dim=1)
    s0, y = task.support.zero_shot.double(), task.support.y
    u = 2 * fusion.uncertainty(s0)
    penalties = [1e-2, 1e-4, 1e-3]
    solved = convex.solve_path(x, s0, y, penalties, lam=lam, u=u, intercept=True, tolerance=1e-9)
    for penalty, weight, intercept, loss in zip(
        penalties, solved.weight, solved.intercept, solved.losses.tolist(), strict=True
    ):
        weight, intercept = weight.clone().requires_grad_(), intercept.clone().requires_grad_()
        a = x @ weight.T + intercept
        cross_entropy = torch.nn.functional.cross_entropy
        value = (1 - lam) * cross_entropy(a, y) + lam * cross_entropy(s0 + u[:, None] * a, y)
        value = value + penalty / 2 * weight.square().sum()
        value.backward()
        assert value.item() == pytest.approx(loss, rel=1e-6)
        assert weight.grad.abs().max() < 1e-7
        assert intercept.grad.abs().max() < 1e-7
    assert (solved.gradient_norms <= 1e-9).all()
    assert solved.weight[1].norm() > solved.weight[2].norm() > solved.weight[0].norm()


@pytest.mark.parametrize("width", [20, 48])
def test_the_certificate_holds_in_single_precision(task, width):
    """The gradient of the weights found, by autograd in double precision, against the norm that was reported."""
    x = torch.nn.functional.normalize(task.support.aux[:, :width], dim=1)
    s0, y, penalties = task.support.zero_shot, task.support.y, [1e-2, 1e-3, 1e-4]

    def norm(weight, penalty):
        weight = weight.double().requires_grad_()
        a = x.double() @ weight.T
        losses = [torch.nn.functional.cross_entropy(logits, y) for logits in (a, s0.double() + 3 * a)]
        (sum(losses) / 2 + penalty / 2 * weight.square().sum()).backward()
        return weight.grad.norm().item()

    u = torch.full((len(y),), 3.0)
    solved = convex.solve_path(x, s0, y, penalties, lam=0.5, u=u, tolerance=1e-4)
    scale = norm(torch.zeros(12, width), 0.0)
    for weight, penalty, reported in zip(solved.weight, penalties, solved.gradient_norms.tolist(), strict=True):
        assert reported <= 1e-4
        assert norm(weight, penalty) / scale == pytest.approx(reported, rel=0.05, abs=1e-6)


def test_a_penalty_must_be_above_0(task):
    support = task.support
    with pytest.raises(ValueError, match=r"penalties must be above 0, not 0\.0"):
        convex.solve_path(support.aux, support.zero_shot, support.y, [1e-3, 0.0])


def test_the_certificate_states_what_was_not_reached(task, monkeypatch):
    support = task.support
    monkeypatch.setattr(convex, "EVALUATIONS", 5)
    solved = convex.solve_path(support.aux, support.zero_shot, support.y, [1e-6], tolerance=1e-6)
    assert solved.evaluations.item() == 5
    assert solved.gradient_norms.item() > 1e-6


def test_a_path_ends_where_each_penalty_alone_does(task):
    path = predictors.ConvexHead.fit_many(task, [{"penalty": p, "tolerance": 1e-6} for p in (1e-4, 1e-2, 1e-3)])
    for head in path:
        alone = predictors.ConvexHead(penalty=head.penalty, tolerance=1e-6).fit(task)
        assert authors.error(head.logits(task.test), alone.logits(task.test)) < 1e-3
        assert head.gradient_norm_ < 1e-5
