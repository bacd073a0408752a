import hashlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_models import write_folder

from lib import features, tasks
from lib.tasks import FewShotTask


def test_rows_are_unit_and_zero_shot_is_100_cosine(make_task):
    task = make_task()
    for split in (task.support, task.val, task.test):
        assert torch.allclose(split.clip.norm(dim=1), torch.ones(len(split)), atol=1e-6)
        assert torch.allclose(split.aux.norm(dim=1), torch.ones(len(split)), atol=1e-6)
        assert torch.allclose(split.zero_shot, 100 * split.clip @ task.text.T, atol=1e-4)
    assert task.shots == 4 and task.num_classes == 5 and task.rows is None


def test_scale_of_the_given_arrays_does_not_matter(make_arrays):
    arrays = make_arrays()
    plain = FewShotTask.from_arrays(**arrays)
    arrays["test"] = {**arrays["test"], "aux": 37 * arrays["test"]["aux"]}
    assert torch.allclose(FewShotTask.from_arrays(**arrays).test.aux, plain.test.aux, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.update(text=a["text"][:4]), "labels run from 0 to 4, the task has 4 classes"),
        (lambda a: a.update(text=a["text"][:, :7]), "CLIP features have 12 dimensions, text features 7"),
        (lambda a: a.update(text=a["text"][0]), r"text features must be rows \[n, d\], not \(12,\)"),
        (lambda a: a["test"].update(aux=a["test"]["aux"][:, :9]), "auxiliary features have different dimensions"),
        (lambda a: a["val"].update(y=a["val"]["y"][:3]), "20 CLIP rows, 20 auxiliary rows, 3 labels"),
        (lambda a: a["support"]["clip"].__setitem__((2, 3), float("nan")), "support: CLIP features: 1 of 20 rows hold"),
        (lambda a: a["support"]["clip"].__setitem__((2, 3), -float("inf")), "CLIP features: 1 of 20 rows hold"),
        (lambda a: a["test"]["aux"].__setitem__(5, 0.0), "test: auxiliary features: 1 of 40 rows are all zeros"),
        (lambda a: a["support"].update(y=a["support"]["y"].clamp_max(3)), "support has no image of class 'class 4'"),
        (lambda a: a["val"].pop("aux"), "needs clip, aux, y; lacks aux"),
        (
            lambda a: a.update(classnames=["a", "b"]),
            "must give one number of classes, not {'text': 5, 'classnames': 2}",
        ),
        (lambda a: a.update(num_classes=7), "not {'text': 5, 'num_classes': 7}"),
        (
            lambda a: a.update(text=None, prompts=None),
            "text, classnames or num_classes must give one number of classes, not {}",
        ),
        (lambda a: a["val"]["y"].__setitem__(0, -1), "val: labels run from -1 to 4"),
        (lambda a: a["test"]["y"].__setitem__(0, -2), "test: labels run from -2 to 4"),
        (lambda a: a["val"].update(y=a["val"]["y"].float()), "val: labels must be whole numbers"),
        (lambda a: a.update(test={k: x[:0] for k, x in a["test"].items()}), "test has no images"),
    ],
)
def test_bad_arrays_are_refused_with_both_sides_named(make_arrays, change, message):
    arrays = make_arrays()
    change(arrays)
    with pytest.raises(ValueError, match=message):
        FewShotTask.from_arrays(**arrays)


def test_numpy_arrays_and_lists_give_the_task_that_tensors_give(make_arrays):
    arrays = make_arrays()
    plain = FewShotTask.from_arrays(**arrays)
    parts = {part: {key: x.numpy() for key, x in arrays[part].items()} for part in ("support", "val", "test")}
    parts["support"]["clip"].flags.writeable = False  # as np.load(..., mmap_mode="r") gives them
    parts["val"]["y"] = parts["val"]["y"].tolist()
    parts["test"]["y"] = parts["test"]["y"].astype(np.uint8)[::-1][::-1]
    task = FewShotTask.from_arrays(text=arrays["text"].numpy().astype(np.float64), **parts)
    for part in ("support", "val", "test"):
        mine, theirs = getattr(task, part), getattr(plain, part)
        assert torch.equal(mine.y, theirs.y) and torch.equal(mine.aux, theirs.aux) and mine.clip.dtype == torch.float32
        assert torch.allclose(mine.zero_shot, theirs.zero_shot)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_labels_of_any_integer_type_become_int64(make_arrays, dtype):
    arrays = make_arrays()
    arrays["support"]["y"] = arrays["support"]["y"].to(dtype)
    assert FewShotTask.from_arrays(**arrays).support.y.dtype == torch.int64


def test_classes_may_differ_in_support_images(make_arrays):
    arrays = make_arrays()
    arrays["support"] = {key: x[3:] for key, x in arrays["support"].items()}
    task = FewShotTask.from_arrays(**arrays)
    assert task.counts.tolist() == [1, 4, 4, 4, 4] and task.shots == 4


def test_prompts_stand_beside_the_texts(make_arrays):
    arrays = make_arrays()
    task, bare = FewShotTask.from_arrays(**arrays), FewShotTask.from_arrays(**arrays | {"prompts": None})
    assert task.prompts.shape == (5, 3, 12) and bare.prompts is None
    assert torch.allclose(task.prompts, torch.nn.functional.normalize(arrays["prompts"], dim=2), atol=1e-6)
    assert torch.equal(task.text, bare.text) and torch.equal(task.test.zero_shot, bare.test.zero_shot)
    for_tuning = task.for_tuning("val")
    assert for_tuning.prompts is task.prompts


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p[:4], r"prompts are \[\(3, 12\)\] in 4 classes, texts \(5, 12\)"),
        (lambda p: p[:, :, :7], r"prompts are \[\(3, 7\)\] in 5 classes, texts \(5, 12\)"),
        (lambda p: [*p[:4], p[4, :2]], r"prompts are \[\(2, 12\), \(3, 12\)\] .* P must be one"),
        (lambda p: 0 * p, "prompts: 3 of 3 rows are all zeros"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(make_arrays, change, message):
    arrays = make_arrays()
    with pytest.raises(ValueError, match=message):
        FewShotTask.from_arrays(**arrays | {"prompts": change(arrays["prompts"])})
    with pytest.raises(ValueError, match="texts None"):
        FewShotTask.from_arrays(**arrays | {"text": None}, num_classes=5)


def test_without_auxiliary_arrays_the_rows_of_clip_stand_in(make_arrays, capsys):
    arrays = make_arrays()
    for part in ("support", "val", "test"):
        del arrays[part]["aux"]
    task = FewShotTask.from_arrays(**arrays)
    assert torch.equal(task.test.aux, task.test.clip) and torch.equal(task.support.aux, task.support.clip)
    assert capsys.readouterr().out == ""


def test_without_texts_zero_shot_logits_are_zeros(make_arrays):
    arrays = make_arrays() | {"text": None, "prompts": None}
    task = FewShotTask.from_arrays(**arrays, num_classes=5)
    assert task.text is None and task.num_classes == 5
    assert torch.equal(task.test.zero_shot, torch.zeros(40, 5))
    assert FewShotTask.from_arrays(**arrays, classnames="abcde").classnames == tuple("abcde")


@pytest.mark.parametrize("empty", [True, False])
def test_without_validation_images_there_is_nothing_to_choose_on(make_arrays, empty):
    arrays = make_arrays()
    arrays["val"] = {key: x[:0] for key, x in arrays["val"].items()} if empty else None
    task = FewShotTask.from_arrays(**arrays)
    assert task.val is None and task.for_tuning("val").val is None


def test_tuning_never_sees_test_labels(make_task):
    task = make_task()
    assert task.for_tuning("val").test is None and task.for_tuning("val").val is task.val
    assert task.for_tuning("fixed").test is None and task.for_tuning("fixed").val is None
    assert task.for_tuning("oracle").test is None and task.for_tuning("oracle").val is task.test
    with pytest.raises(ValueError, match="val, fixed, oracle, not 'best'"):
        task.for_tuning("best")


def test_test_images_of_unknown_classes_are_labelled_minus_one(make_arrays):
    arrays = make_arrays()
    arrays["test"]["y"][:7] = -1
    arrays["test"]["classes"] = torch.tensor([0, 1, 2, 3, 4])
    task = FewShotTask.from_arrays(**arrays)
    assert int((task.test.y == -1).sum()) == 7 and torch.equal(task.test.classes, torch.arange(5))
    assert torch.equal(task.test.rows(torch.tensor([8, 9])).classes, torch.arange(5))
    chosen_on = task.for_tuning("oracle").val
    assert len(chosen_on) == 33 and torch.equal(chosen_on.clip, task.test.clip[7:])
    arrays["test"]["y"][:] = -1
    with pytest.raises(ValueError, match="oracle protocol needs test images of the task's classes"):
        FewShotTask.from_arrays(**arrays).for_tuning("oracle")


def test_views_follow_the_support(make_arrays):
    arrays = make_arrays()
    view = {**arrays["support"], "aux": arrays["support"]["aux"] + 0.1}
    assert len(FewShotTask.from_arrays(**arrays, views=[view, view]).views) == 2
    with pytest.raises(ValueError, match="view 0 has other labels"):
        FewShotTask.from_arrays(**arrays, views=[{**view, "y": view["y"].flip(0)}])


# ---- tasks drawn from feature banks -----------------------------------------------------------------------------


@pytest.fixture
def make_bank(tmp_path):
    """Return a function that writes a small bank and gives its name; labels are given for each split."""

    def make(name, labels, classes="abc", *, clip="clip_small", aux="aux_small", dim=4, text=True):
        generator = torch.Generator().manual_seed(len(name))
        labels = {split: torch.tensor(y, dtype=torch.int64) for split, y in labels.items()}

        def rows(width):
            return {split: torch.randn(len(y), width, generator=generator) for split, y in labels.items()}

        features.save_bank(
            tmp_path / name,
            clip={clip: rows(dim)},
            aux={aux: rows(6)} if aux else {},
            text={clip: torch.randn(len(classes), dim, generator=generator)} if text else {},
            labels=labels,
            class_names=list(classes),
        )
        return f"features:{tmp_path / name}"

    return make


ORDINARY = {"train": [c % 3 for c in range(15)], "val": [c % 3 for c in range(9)], "test": [0, 1, 2, 2]}


@pytest.mark.parametrize(
    ("seed", "support", "val"),
    [(1, [12, 6, 10, 4, 5, 11], [1, 3, 4, 5, 6, 8]), (2, [3, 0, 4, 10, 14, 2], [1, 3, 4, 5, 6, 8])],
)
def test_the_draw_of_a_seed_stays_what_it_was(make_bank, seed, support, val):
    source = tasks.load_source(make_bank("one", ORDINARY))
    task = tasks.sample(source, 2, seed)
    clip = torch.nn.functional.normalize(source.parts["train"][0].x, dim=1)
    assert torch.allclose(task.support.clip, clip[support], atol=1e-6)
    assert task.rows.tolist() == sorted(support)
    clip = torch.nn.functional.normalize(source.parts["val"][0].x, dim=1)
    assert torch.allclose(task.val.clip, clip[val], atol=1e-6)


def test_a_class_with_fewer_images_gives_all_it_has(make_bank):
    labels = ORDINARY | {"train": [0, 0, 0, 0, 0, 1, 1, 2, 2, 2]}
    source = tasks.load_source(make_bank("one", labels))
    large, small = tasks.sample(source, 4, seed=1), tasks.sample(source, 2, seed=1)
    assert large.counts.tolist() == [4, 2, 3] and large.shots == 4
    assert small.counts.tolist() == [2, 2, 2] and set(small.rows.tolist()) < set(large.rows.tolist())
    assert torch.equal(large.support.y, large.support.y.sort().values)
    assert tasks.sample(source, 5, seed=1).counts.tolist() == [5, 2, 3]
    with pytest.raises(
        ValueError, match="6 shots asked for, but class 'a' has 5 training images, and no class has more"
    ):
        tasks.sample(source, 6, seed=1)
    lacking = tasks.load_source(make_bank("two", labels | {"train": [0, 0, 1]}))
    with pytest.raises(ValueError, match="1 shots asked for, but class 'c' has 0 training images"):
        tasks.sample(lacking, 1, seed=1)


def test_equal_supports_are_drawn_once(make_bank):
    source = tasks.load_source(make_bank("one", ORDINARY))
    assert [task.seed for task in tasks.draw(source, 5, seeds=4)] == [1]
    several = tasks.draw(source, 2, seeds=4, val_shots=1)
    assert [task.seed for task in several] == [1, 2, 3, 4] and len(several[0].val) == 3
    assert len({tuple(task.rows.tolist()) for task in several}) == 4
    assert torch.equal(several[1].support.clip, tasks.sample(source, 2, 2).support.clip)
    with pytest.raises(ValueError, match="seeds must be 1 or more, not 0"):
        tasks.draw(source, 2, seeds=0)


def test_numbers_of_images_are_checked(make_bank):
    source = tasks.load_source(make_bank("one", ORDINARY))
    for shots, val_shots in ((0, 4), (2, -3)):
        with pytest.raises(ValueError, match=f"not {shots} and {val_shots}"):
            tasks.sample(source, shots, 1, val_shots)


def test_tasks_share_the_test_part(make_bank):
    source = tasks.load_source(make_bank("one", ORDINARY))
    first, second = tasks.draw(source, 2, seeds=2)
    assert first.test is second.test


@pytest.mark.parametrize("val", [[], None])
def test_a_bank_without_validation_images_gives_tasks_without(make_bank, val):
    labels = {key: y for key, y in (ORDINARY | {"val": val}).items() if y is not None}
    assert tasks.sample(tasks.load_source(make_bank("one", labels)), 2, seed=1).val is None


def test_clip_stands_in_for_missing_auxiliary_features_and_says_so(make_bank, capsys):
    name = make_bank("one", ORDINARY, aux=None)
    source = tasks.load_source(name)
    assert capsys.readouterr().out == f"{name} has no auxiliary features; CLIP's own stand in for them (aux=clip)\n"
    task = tasks.sample(source, 2, seed=1)
    assert source.encoders == ("clip_small", "clip") and tasks.encoders(name) == ("clip_small", ("clip",))
    assert torch.equal(task.support.aux, task.support.clip) and torch.equal(task.test.aux, task.test.clip)
    both = make_bank("both", ORDINARY)
    named = tasks.load_source(both, aux="clip")
    assert named.encoders == ("clip_small", "clip") and capsys.readouterr().out == ""
    assert torch.equal(tasks.sample(named, 2, seed=1).val.aux, tasks.sample(named, 2, seed=1).val.clip)
    joined = tasks.load_source(both, aux="clip,aux_small")
    assert joined.encoders == ("clip_small", "clip,aux_small")
    assert tasks.sample(joined, 2, seed=1).support.aux.shape == (6, 10)


def test_a_bank_without_texts_is_refused_unless_none_are_needed(make_bank):
    name = make_bank("one", ORDINARY, text=False)
    with pytest.raises(ValueError, match=r"text\.safetensors"):
        tasks.load_source(name)
    source = tasks.load_source(name, need_text=False)
    task = tasks.sample(source, 2, seed=1)
    assert source.text is None and "text" not in source.fingerprints
    assert task.text is None and task.num_classes == 3 and torch.equal(task.test.zero_shot, torch.zeros(4, 3))
    assert tasks.load_source(make_bank("two", ORDINARY), need_text=False).text is not None


# ---- learning from one set, testing on another --------------------------------------------------------------------


def test_classes_of_another_test_set_are_matched_by_name(make_bank):
    one = make_bank("one", ORDINARY, ["polar bear", "cat", "Dog"])
    other = make_bank("other", {"test": [0, 0, 1, 2]}, ["dog", "fox", "Polar_Bear"])
    source = tasks.load_source(one, test=other)
    task = tasks.sample(source, 2, seed=1)
    assert (source.name, source.test_name, task.name) == (one, other, f"{one} -> {other}")
    assert task.test.y.tolist() == [2, 2, -1, 0] and task.test.classes.tolist() == [0, 2]
    assert task.test.zero_shot.shape == (4, 3) and task.text.shape == (3, 4)
    itself, elsewhere = tasks.load_source(one).fingerprints, source.fingerprints
    assert {key for key in itself if itself[key] != elsewhere[key]} == {"test/clip_small", "test/aux_small"}
    assert elsewhere["test/clip_small"] == features.load(other, "test", "clip_small").fingerprint
    assert torch.equal(task.support.clip, tasks.sample(tasks.load_source(one), 2, seed=1).support.clip)


def test_a_test_set_with_all_classes_restricts_nothing(make_bank):
    one = make_bank("one", ORDINARY)
    more = tasks.load_source(one, test=make_bank("more", {"test": [3, 0, 1, 2]}, "cabx"))
    assert more.test.y.tolist() == [-1, 2, 0, 1] and more.test.classes is None
    novel = tasks.load_source(one, test=make_bank("novel", {"test": [0, 1]}, "xy"))
    assert tasks.sample(novel, 1, seed=1).test.y.tolist() == [-1, -1] and novel.test.classes is None


def test_two_classes_of_one_name_cannot_be_matched(make_bank):
    one = make_bank("one", ORDINARY, ["crane", "crane ", "cat"])
    assert tasks.load_source(one).test.y.tolist() == [0, 1, 2, 2]
    with pytest.raises(ValueError, match="two classes of one name, 'crane'"):
        tasks.load_source(one, test=make_bank("other", {"test": [0]}, ["cat"]))


def test_wordnet_codes_come_before_names():
    cards = [SimpleNamespace(codes=("n1", "n2", "n3")), SimpleNamespace(codes=("n3", "n9", "n1"))]
    names = [("crane", "crane", "cat"), ("tabby", "fox", "bird")]
    assert tasks._match(*(card.codes for card in cards), "a -> b").tolist() == [2, -1, 0]
    with pytest.raises(ValueError, match="a -> b: two classes of one name"):
        tasks._match(*names, "a -> b")


def test_pairs_that_do_not_fit_are_refused_with_both_named(make_bank):
    one = make_bank("one", ORDINARY)
    wide = make_bank("wide", ORDINARY, dim=5)
    with pytest.raises(ValueError, match=r"clip_small has 4 dimensions in features:.*/one, 5 in features:.*/wide"):
        tasks.load_source(one, test=wide)
    for other in (make_bank("other", ORDINARY, aux="aux_other"), "digits"):
        with pytest.raises(
            ValueError, match=r"does not have the features clip_small and aux_small that features:.*/one"
        ):
            tasks.load_source(one, test=other)


def test_a_set_with_only_a_test_split_is_tested_on_not_learned_from(make_bank):
    name = make_bank("other", {"test": [0, 1, 2]})
    with pytest.raises(ValueError, match=rf"can be tested on, not learned from.*test='{name}'"):
        tasks.load_source(name)
    with pytest.raises(ValueError, match=r"shapes-sketch can be tested on, not learned from.*test='shapes-sketch'"):
        tasks.load_source("shapes-sketch")
    learned_only = make_bank("train", {"train": [0, 1, 2]})
    with pytest.raises(ValueError, match="has no split 'test'"):
        tasks.load_source(learned_only)
    assert tasks.load_source(learned_only, test=name).test.y.tolist() == [0, 1, 2]


# ---- real features ------------------------------------------------------------------------------------------------


@pytest.fixture
def source(caltech70):
    return tasks.load_source(f"features:{caltech70}")


def test_sampled_tasks_are_nested_balanced_and_reproducible(source):
    small, large, again = (tasks.sample(source, shots, seed=1) for shots in (2, 8, 2))
    assert torch.equal(small.support.clip, again.support.clip)
    assert torch.equal(large.counts, torch.full((70,), 8))
    assert set(small.rows.tolist()) < set(large.rows.tolist())
    other = tasks.sample(source, 2, seed=2)
    assert not torch.equal(small.support.clip, other.support.clip)
    assert torch.equal(small.test.y, other.test.y)


def test_draws_of_real_features_stay_what_they_were(source):
    drawn = tasks.sample(source, 8, seed=5)
    digest = hashlib.sha256(b"".join(x.numpy().tobytes() for x in (drawn.support.y, drawn.rows, drawn.val.y)))
    assert digest.hexdigest()[:16] == "26f27044569c20e3"


def test_validation_keeps_to_its_budget(source):
    assert int(torch.bincount(tasks.sample(source, 2, seed=1).val.y).max()) == 2
    assert int(torch.bincount(tasks.sample(source, 16, seed=1).val.y).max()) == 4
    assert len(tasks.sample(source, 1, seed=1, val_shots=0).val) == len(source.parts["val"][0].y)


def test_too_many_shots_are_refused(source):
    with pytest.raises(ValueError, match="17 shots asked for, but class 'face' has 16 training images"):
        tasks.sample(source, 17, seed=1)


def test_sixteen_of_sixteen_images_are_one_support(source):
    (task,) = tasks.draw(source, 16, seeds=3)
    assert torch.equal(task.rows, torch.arange(70 * 16)) and task.seed == 1


def test_two_auxiliary_encoders_stand_side_by_side(caltech70, source):
    both = tasks.load_source(f"features:{caltech70}", aux="aux_mobilenet_v1,aux_mobilenet_v2")
    assert len(both.fingerprints) == 1 + 3 * 3
    first, second = tasks.sample(both, 1, seed=1).support.aux.split([1024, 1280], dim=1)
    assert torch.allclose(first.norm(dim=1), second.norm(dim=1))


def test_augmented_views_reach_the_head():
    source = tasks.load_source("digits", aux="embedded:random", views=2)
    task = tasks.sample(source, 2, seed=1)
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


def test_auxiliary_encoders_come_from_the_card():
    clip, auxiliaries = tasks.encoders("digits")
    assert (
        clip == "embedded:clip" and len(auxiliaries) > 1 and all(name.startswith("embedded:") for name in auxiliaries)
    )
    assert tasks.encoders("digits", aux="embedded:random,clip")[1] == ("embedded:random", "clip")


def test_own_images_take_the_embedded_encoders(tmp_path):
    write_folder(tmp_path / "own", splits=())
    assert tasks.encoders(f"folder:{tmp_path / 'own'}") == tasks.encoders("shapes")
