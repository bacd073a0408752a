"""GDA against the authors' own code."""

import authors
import pytest

from lib import methods, predictors

CLOSE = 1e-4  # relative to the spread of the reference


@pytest.fixture(scope="module")
def task():
    return authors.task()


def test_gda_agrees(task):
    theirs = authors.outputs("gda")
    gda = predictors.GDA().fit(task)
    assert authors.error(gda.weight_.T, theirs["W"]) < CLOSE
    assert authors.error(gda.intercept_, theirs["b"]) < CLOSE
    bias = gda.logits(task.test)
    for beta in theirs["alpha_grid"].tolist():
        name = f"test_logits_alpha/{beta:g}"
        assert authors.error(task.test.zero_shot + beta * bias, theirs[name]) < CLOSE
    method = methods.build("gda").fit(task)
    assert authors.error(method.logits(task.test), theirs["test_logits"]) < CLOSE
