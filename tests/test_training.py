"""Training loops: the authors' trajectories, heads that do not disturb each other, schedules."""

import authors
import pytest
import torch

from lib import fusion, training

RUNS = {"lam035_none": (0.35, "none"), "lam035_moment": (0.35, "kurtosis"), "lam1_none": (1.0, "none")}


@pytest.fixture(scope="module")
def task():
    return authors.task()


def train(task, names, theirs, **settings):
    """Train one head per name, all of them together."""
    factors = [
        fusion.uncertainty(task.support.zero_shot, RUNS[name][1], 0.4, "probabilities", 250.0)[None] for name in names
    ]
    start = training.class_means(task.support.aux, task.support.y, 12)
    return training.train_heads(
        task.support.aux[None],
        task.support.zero_shot[None],
        task.support.y,
        start.expand(len(names), -1, -1),
        theirs["perms"].expand(len(names), -1, -1),
        lam=[RUNS[name][0] for name in names],
        beta=0.5,
        factor=torch.stack(factors),
        standardised=True,
        **settings,
    )


def test_class_means_are_the_authors_initial_weight(task):
    theirs = authors.outputs("amu")
    assert authors.error(task.support.aux, theirs["aux_train_unit"]) < 1e-5
    found = training.class_means(task.support.aux, task.support.y, 12)
    assert authors.error(found, theirs["init_weight"]) < 1e-5


@pytest.mark.parametrize("together", [False, True])
def test_heads_follow_the_authors_trajectories(task, together):
    theirs = authors.outputs("amu")
    groups = [list(RUNS)] if together else [[name] for name in RUNS]
    for names in groups:
        epochs = []
        heads = train(task, names, theirs, on_epoch=lambda epoch, weight: epochs.append(weight.clone()))  # noqa: B023
        for head, name in enumerate(names):
            key = f"train/{name}"
            assert (heads.weight[head] - theirs[f"{key}/weight_final"]).abs().max() < 1e-5
            assert (epochs[0][head] - theirs[f"{key}/weight_epoch1"]).abs().max() < 1e-5
            assert authors.error(heads.losses[head], theirs[f"{key}/losses"]) < 1e-4
            bias = fusion.standardise(task.test.aux @ heads.weight[head].T)
            assert authors.error(bias, theirs[f"{key}/test_aux_logits_final"]) < 1e-4
            factor = fusion.uncertainty(task.test.zero_shot, RUNS[name][1], 0.4, "probabilities", 250.0)
            fused = task.test.zero_shot + 0.5 * factor[:, None] * bias
            assert authors.error(fused, theirs[f"{key}/test_logits_final"]) < 1e-4


def test_rates_are_the_authors(task):
    amu, taskres = authors.outputs("amu"), authors.outputs("taskres")
    assert authors.error(training.cosine(1e-3, 60), amu["train/lam1_none/lr"]) < 1e-5
    assert authors.error(training.warmed_cosine(2e-3, 10, 3), taskres["train/lr"]) < 1e-5


def test_settings_of_another_length_are_refused(task):
    with pytest.raises(ValueError, match="lr has 2 values for 1 heads"):
        train(task, ["lam1_none"], authors.outputs("amu"), lr=[1e-3, 1e-2])
