"""Stressed tasks: one thing changes, counted by hand, and the rest is what it was."""

from dataclasses import replace

import pytest
import torch

from lib import stress
from lib.tasks import FewShotTask


@pytest.fixture
def viewed(make_arrays):
    """A task whose support, shuffled, comes with one augmented view."""
    arrays = make_arrays(classes=5, shots=4)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    support = {key: values[order] for key, values in arrays["support"].items()}
    return FewShotTask.from_arrays(**arrays | {"support": support}, views=[support])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_subset_support_keeps_the_first_images_of_each_class(viewed):
    counts = torch.tensor([1, 4, 2, 3, 1])
    task = stress.subset_support(viewed, counts)
    assert torch.equal(task.counts, counts) and task.shots == 4 and task.val is viewed.val and task.test is viewed.test
    for c, count in enumerate(counts):
        first = viewed.support.clip[viewed.support.y == c][:count]
        assert torch.equal(task.support.clip[task.support.y == c], first)
    assert torch.equal(task.views[0].clip, task.support.clip)
    assert torch.equal(stress.subset_support(viewed, viewed.counts).support.aux, viewed.support.aux)
    with pytest.raises(ValueError, match="5 support images of class 'class 1' asked for, arrays has 4"):
        stress.subset_support(viewed, torch.tensor([4, 5, 4, 4, 4]))
    with pytest.raises(ValueError, match="0 support images"):
        stress.subset_support(viewed, torch.tensor([4, 4, 4, 4, 0]))


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_wrong_labels_are_as_many_as_asked_for_and_all_wrong(viewed, share):
    task = stress.with_label_noise(viewed, share, seeded())
    wrong = task.support.y != viewed.support.y
    assert wrong.sum() == round(20 * share) and torch.equal(task.counts, viewed.counts)
    assert torch.equal(task.views[0].y, task.support.y) and torch.equal(task.support.clip, viewed.support.clip)
    per_class = torch.bincount(viewed.support.y[wrong], minlength=5)
    assert per_class.max() - per_class.min() <= 1, "spread over the classes"
    assert task.val is viewed.val and task.test is viewed.test
    again, other = (stress.with_label_noise(viewed, share, seeded(s)).support.y for s in (0, 1))
    assert torch.equal(again, task.support.y) and (torch.equal(other, again) == (share == 0))


def test_wrong_labels_are_of_all_other_classes(make_task):
    """Of 6 wrong labels of a class, no other class may own most: the noise is symmetric, not a swap of two classes."""
    task = make_task(classes=6, shots=40)
    noisy = stress.with_label_noise(task, 0.5, seeded()).support.y
    counts = torch.zeros(6, 6).index_put_((task.support.y, noisy), torch.ones(240), accumulate=True)
    assert counts.diagonal().tolist() == [20] * 6 and counts.fill_diagonal_(4).min() > 0 and counts.max() < 12


def test_two_classes_and_one_that_has_most_of_the_images(make_task):
    task = make_task(classes=2, shots=5)
    for share, count in ((0.3, 2), (0.5, 4), (1.0, 10)):  # an odd number cannot be exchanged
        noisy = stress.with_label_noise(task, share, seeded())
        assert (noisy.support.y != task.support.y).sum() == count and torch.equal(noisy.counts, task.counts)
    uneven = stress.subset_support(task, torch.tensor([5, 1]))
    assert (stress.with_label_noise(uneven, 1.0, seeded()).support.y != uneven.support.y).sum() == 2
    single = stress.subset_support(task, torch.tensor([1, 1]))
    assert stress.with_label_noise(single, 1.0, seeded()).support.y.tolist() == [1, 0]
    with pytest.raises(ValueError, match=r"in \[0, 1\], not 1.5"):
        stress.with_label_noise(task, 1.5, seeded())


def test_subset_classes_renumbers_and_leaves_foreign_test_images_unlabelled(viewed):
    classes = torch.tensor([3, 0])
    task = stress.subset_classes(viewed, classes)
    assert task.classnames == ("class 3", "class 0") and torch.equal(task.text, viewed.text[classes])
    assert len(task.support) == 8 and len(task.val) == 8 and len(task.views[0]) == 8 and task.shots == 4
    for new, old in enumerate(classes):
        assert torch.equal(task.support.aux[task.support.y == new], viewed.support.aux[viewed.support.y == old])
        assert torch.equal(task.test.y == new, viewed.test.y == old)
    assert len(task.test) == 40 and (task.test.y == -1).sum() == 24
    assert torch.equal(task.test.zero_shot, viewed.test.zero_shot[:, [3, 0]])
    everything = stress.subset_classes(viewed, torch.arange(5))
    assert torch.equal(everything.support.y, viewed.support.y) and torch.equal(everything.test.y, viewed.test.y)


def test_subset_classes_of_a_test_set_with_foreign_images_and_some_of_the_classes(make_task):
    task = make_task()
    y = task.test.y.where(task.test.y < 4, -1)
    task = replace(task, test=replace(task.test, y=y, classes=torch.arange(4)), text=None, val=None)
    half = stress.subset_classes(task, torch.tensor([4, 2]))
    assert half.test.classes.tolist() == [1] and set(half.test.y.tolist()) == {-1, 1}
    assert half.text is None and half.val is None
    for wrong in ([], [0, 0], [5], [-1]):
        with pytest.raises(ValueError, match="different ones of the 5 of arrays"):
            stress.subset_classes(task, torch.tensor(wrong, dtype=torch.int64))
