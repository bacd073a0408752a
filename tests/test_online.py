"""TDA against a stream of plain lists, and what its order does."""

import math

import authors
import pytest
import torch

from lib import predictors


@pytest.fixture(scope="module")
def task():
    return authors.task()


def plain_tda(task, order, bounds=(0.2, 0.5), classes=12):
    """Return TDA's bias from lists of (entropy, row), as the formula reads, image by image."""
    split, caches, bias = task.test, ({}, {}), torch.zeros(len(task.test), classes)
    p = split.zero_shot.softmax(1)
    entropy = -(p * p.clamp_min(1e-38).log()).sum(1)
    for row in order:
        label = int(p[row].argmax())
        middling = bounds[0] < entropy[row] / math.log2(classes) < bounds[1]
        for cache, size, taken in ((caches[0], 3, True), (caches[1], 2, middling)):
            if taken:
                queue = [*cache.get(label, []), (float(entropy[row]), row)]
                cache[label] = sorted(queue)[:size]
        for label_, queue in caches[0].items():
            for _, key in queue:
                bias[row, label_] += 2 * math.exp(-5 * (1 - split.clip[row] @ split.clip[key]))
        for queue in caches[1].values():
            for _, key in queue:
                mask = ((p[key] > 0.03) & (p[key] < 1.0)).float()
                bias[row] -= 0.117 * math.exp(-1 * (1 - split.clip[row] @ split.clip[key])) * mask
    return bias, caches


@pytest.mark.parametrize("order", [0, 1, 2])
def test_tda_is_the_stream_of_lists(task, order):
    rows = torch.randperm(150, generator=torch.Generator().manual_seed(order)).tolist() if order else range(150)
    expected, caches = plain_tda(task, rows)
    assert max(map(len, caches[0].values())) == 3 and max(map(len, caches[1].values())) == 2, "both caches are full"
    assert authors.error(predictors.TDA(order=order).fit(task).logits(task.test), expected) < 1e-5


def test_what_comes_later_does_not_matter_and_the_order_does(task):
    tda = predictors.TDA(order=0).fit(task)
    logits = tda.logits(task.test)
    assert torch.equal(tda.logits(task.test.rows(torch.arange(60))), logits[:60])
    others = [predictors.TDA(order=order).fit(task).logits(task.test) for order in (1, 2)]
    assert not torch.allclose(others[0], logits, atol=1e-3) and not torch.allclose(*others, atol=1e-3)
    backwards = torch.arange(149, -1, -1)
    assert authors.error(tda.logits(task.test.rows(backwards))[backwards], logits) > 0.01


def test_the_first_image_meets_itself_alone(task):
    first = task.test.rows(torch.tensor([7]))
    bias = predictors.TDA(negative=0.0).fit(task).logits(first)[0]
    expected = 2.0 * torch.nn.functional.one_hot(first.zero_shot.argmax(1), 12)[0]
    assert torch.allclose(bias, expected, atol=1e-5)


def test_no_cache_no_bias(task):
    assert not predictors.TDA(positive=0.0, negative=0.0).fit(task).logits(task.test).any()
