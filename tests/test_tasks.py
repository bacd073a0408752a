import pytest
import torch

from lib import tasks
from lib.tasks import FewShotTask


def test_rows_are_unit_and_zero_shot_is_100_cosine(make_task):
    task = make_task()
    for split in (task.support, task.val, task.test):
        assert torch.allclose(split.clip.norm(dim=1), torch.ones(len(split)), atol=1e-6)
        assert torch.allclose(split.aux.norm(dim=1), torch.ones(len(split)), atol=1e-6)
        assert torch.allclose(split.zero_shot, 100 * split.clip @ task.text.T, atol=1e-4)
    assert task.shots == 4 and task.num_classes == 5


def test_scale_of_the_given_arrays_does_not_matter(make_arrays):
    arrays = make_arrays()
    plain = FewShotTask.from_arrays(**arrays)
    arrays["test"] = {**arrays["test"], "aux": 37 * arrays["test"]["aux"]}
    assert torch.allclose(FewShotTask.from_arrays(**arrays).test.aux, plain.test.aux, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.update(text=a["text"][:4]), "labels run from 0 to 4, text has 4 classes"),
        (lambda a: a.update(text=a["text"][:, :7]), "CLIP features have 12 dimensions, text features 7"),
        (lambda a: a["test"].update(aux=a["test"]["aux"][:, :9]), "auxiliary features have different dimensions"),
        (lambda a: a["val"].update(y=a["val"]["y"][:3]), "20 CLIP rows, 20 auxiliary rows, 3 labels"),
        (lambda a: a["support"]["clip"].__setitem__((2, 3), float("nan")), "support: CLIP features: 1 of 20 rows hold"),
        (lambda a: a["test"]["aux"].__setitem__(5, 0.0), "test: auxiliary features: 1 of 40 rows are all zeros"),
        (lambda a: a["support"].update(y=a["support"]["y"].clamp_max(3)), "support has 4 classes, text has 5"),
        (lambda a: a["support"]["y"].__setitem__(0, 1), "'class 0' has 3 and 'class 1' has 5"),
        (lambda a: a["val"].pop("aux"), "needs clip, aux and y, lacks aux"),
        (lambda a: a.update(classnames=["a", "b"]), "2 class names but text features for 5 classes"),
    ],
)
def test_bad_arrays_are_refused_with_both_sides_named(make_arrays, change, message):
    arrays = make_arrays()
    change(arrays)
    with pytest.raises(ValueError, match=message):
        FewShotTask.from_arrays(**arrays)


def test_tuning_never_sees_test_labels(make_task):
    task = make_task()
    assert task.for_tuning("val").test is None and task.for_tuning("val").val is task.val
    assert task.for_tuning("fixed").test is None and task.for_tuning("fixed").val is None
    assert task.for_tuning("oracle").test is None and task.for_tuning("oracle").val is task.test
    with pytest.raises(ValueError, match="val, fixed, oracle, not 'best'"):
        task.for_tuning("best")


def test_views_follow_the_support(make_arrays):
    arrays = make_arrays()
    view = {**arrays["support"], "aux": arrays["support"]["aux"] + 0.1}
    assert len(FewShotTask.from_arrays(**arrays, views=[view, view]).views) == 2
    with pytest.raises(ValueError, match="view 0 has other labels"):
        FewShotTask.from_arrays(**arrays, views=[{**view, "y": view["y"].flip(0)}])


@pytest.fixture
def bank(caltech70):
    return tasks.load_source(f"features:{caltech70}")


def test_sampled_tasks_are_nested_balanced_and_reproducible(bank):
    small, large, again = (tasks.sample(bank, shots, seed=1) for shots in (2, 8, 2))
    assert torch.equal(small.support.clip, again.support.clip)
    assert torch.equal(torch.bincount(large.support.y), torch.full((70,), 8))
    rows = {tuple(row[:8].tolist()) for row in large.support.clip}
    assert all(tuple(row[:8].tolist()) in rows for row in small.support.clip)
    other = tasks.sample(bank, 2, seed=2)
    assert not torch.equal(small.support.clip, other.support.clip)
    assert torch.equal(small.test.y, other.test.y)


def test_validation_keeps_to_its_budget(bank):
    assert int(torch.bincount(tasks.sample(bank, 2, seed=1).val.y).max()) == 2
    assert int(torch.bincount(tasks.sample(bank, 16, seed=1).val.y).max()) == 4
    assert len(tasks.sample(bank, 1, seed=1, val_shots=0).val) == len(bank.clip["val"].y)


def test_seed_zero_takes_the_order_of_the_bank(bank, caltech70):
    from safetensors.torch import load_file

    labels = load_file(caltech70 / "labels.safetensors")
    clip = load_file(caltech70 / "clip_vit_b32.safetensors")["train"].float()
    first = torch.nn.functional.normalize(clip[labels["train_shot_index"] < 1], dim=1)
    assert torch.allclose(tasks.sample(bank, 1, seed=0).support.clip, first, atol=1e-6)


def test_too_many_shots_are_refused(bank):
    with pytest.raises(ValueError, match="17 shots asked for, but class 'face' has 16 training images"):
        tasks.sample(bank, 17, seed=1)


def test_two_auxiliary_encoders_stand_side_by_side(caltech70, bank):
    both = tasks.load_source(f"features:{caltech70}", aux="aux_mobilenet_v1+aux_mobilenet_v2")
    assert len(both.fingerprints) == 1 + 3 * 3
    first, second = tasks.sample(both, 1, seed=0).support.aux.split([1024, 1280], dim=1)
    assert torch.allclose(first.norm(dim=1), second.norm(dim=1))


def test_augmented_views_reach_the_head():
    views = tasks.load_source("digits", aux="embedded:random", views=2)
    task = tasks.sample(views, 2, seed=1)
    assert len(task.views) == 2 and not torch.allclose(task.views[0].aux, task.views[1].aux)
    assert torch.equal(task.views[0].y, task.support.y)
    plain = tasks.sample(tasks.load_source("digits", aux="embedded:random"), 2, seed=1)
    assert torch.equal(plain.support.aux, task.support.aux) and plain.views == ()
    with pytest.raises(ValueError, match="at least 2 random crops, not 1"):
        tasks.load_source("digits", views=1)


def test_prompts_can_be_chosen(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("the digit {}.\n")
    assert tasks.load_source("digits", templates=str(path)).text.templates == ("the digit {}.",)
