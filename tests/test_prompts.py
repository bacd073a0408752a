"""Weighted prompts and TIMO against loops over classes and prompts."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import normalize

from lib import methods, predictors
from lib.tasks import FewShotTask


@pytest.fixture
def uneven(make_arrays):
    """A task whose classes have 4, 4, 3, 2 and 1 support images, and three prompts each."""
    arrays = make_arrays()
    keep = torch.tensor([16, 0, 5, 1, 2, 6, 3, 7, 9, 8, 12, 4, 10, 14])
    support = {key: value[keep] for key, value in arrays["support"].items()}
    return FewShotTask.from_arrays(**arrays | {"support": support})


def plain_text(task, sharpness):
    """Return the weighted texts and the agreements, class by class and prompt by prompt."""
    texts, agreements = [], []
    for c, prompts in enumerate(task.prompts):
        mean = task.support.clip[task.support.y == c].mean(0)
        mean = mean / mean.norm()
        agreement = torch.stack([prompt @ mean for prompt in prompts])
        weights = torch.exp(sharpness * agreement / agreement.norm())
        text = sum(w * prompt for w, prompt in zip(weights / weights.sum(), prompts, strict=True))
        texts.append(text / text.norm())
        agreements.append(agreement)
    return torch.stack(texts), agreements


@pytest.mark.parametrize("sharpness", [1.0, 50.0])
def test_prompts_are_weighted_by_the_images_of_their_class(uneven, sharpness):
    fitted = predictors.WeightedPrompts(sharpness=sharpness).fit(uneven)
    expected = 100 * uneven.test.clip @ plain_text(uneven, sharpness)[0].T
    assert torch.allclose(fitted.logits(uneven.test), expected, atol=1e-4)


def test_sharpness_0_is_the_mean_of_the_prompts_and_a_large_one_the_nearest(uneven):
    task = replace(uneven, text=normalize(uneven.prompts.mean(1), dim=1))
    logits = predictors.WeightedPrompts(sharpness=0.0).fit(task).logits(task.test)
    assert torch.allclose(logits, 100 * task.test.clip @ task.text.T, atol=1e-4), "zero-shot CLIP"
    fitted = predictors.WeightedPrompts(sharpness=1e4).fit(task)
    for c, agreement in enumerate(plain_text(task, 1.0)[1]):
        assert torch.allclose(fitted.text_[c], task.prompts[c, agreement.argmax()], atol=1e-5)
    single = replace(uneven, prompts=uneven.text[:, None])
    assert torch.allclose(predictors.WeightedPrompts().fit(single).logits(task.test), uneven.test.zero_shot, atol=1e-4)


def test_timo_is_weighted_prompts_and_gda_of_images_and_prompts(uneven):
    texts, agreements = plain_text(uneven, 50.0)
    rows = [(uneven.support.clip[i], int(y)) for i, y in enumerate(uneven.support.y)]
    rows += [(a * t, c) for c in range(5) for a, t in zip(agreements[c], uneven.prompts[c], strict=True)]
    x, y = torch.stack([row for row, _ in rows]).double(), torch.tensor([c for _, c in rows])
    means = torch.stack([x[y == c].mean(0) for c in range(5)])
    centred = x - means[y]
    scatter = centred.T @ centred
    precision = 12 * torch.linalg.inv(scatter + scatter.trace() / (len(x) - 1) * torch.eye(12, dtype=x.dtype))
    test = uneven.test.clip.double()
    gda = test @ precision @ means.T - (means @ precision * means).sum(1) / 2
    expected = 100 * test @ texts.double().T + 0.3 * gda
    logits = predictors.TIMO(weight=0.3).fit(uneven).logits(uneven.test).double()
    difference = logits - expected  # GDA's prior adds the same to all classes
    assert torch.allclose(difference, difference[:, :1].expand_as(difference), atol=1e-3)
    plain = predictors.WeightedPrompts().fit(uneven).logits(uneven.test)
    assert torch.equal(predictors.TIMO(weight=0.0).fit(uneven).logits(uneven.test), plain)


def test_without_prompts_they_are_skipped_by_name(make_task):
    task = replace(make_task(), prompts=None)
    assert set(methods.METHODS) - set(methods.offered(task)) == {"timo", "prompt_weights"}
    with pytest.raises(ValueError, match=r"WeightedPrompts needs prompts kept apart.*arrays has none"):
        methods.build("prompt_weights").fit(task)
