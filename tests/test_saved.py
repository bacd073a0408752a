"""Saved methods: what comes back answers like what was saved, and anything changed since is refused."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from small_models import write_folder
from test_methods import NAMES, build

from lib import methods, predictors
from lib.features import encoders
from lib.tasks import draw, load_source

KEPT = [name for name in NAMES if not methods.METHODS[name].per_batch]


@pytest.mark.parametrize("name", NAMES)
def test_a_loaded_method_answers_like_the_saved_one(name, make_task, tmp_path):
    task = make_task()
    method = build(name).fit(task)
    if name not in KEPT:
        with pytest.raises(ValueError, match=f"{name} cannot be saved .* depend on the other images"):
            method.save(tmp_path / "m")
        return
    loaded = methods.load(method.save(tmp_path / "m"))
    logits = loaded.logits(task.test)
    assert torch.equal(logits, method.logits(task.test))
    for size in (1, 7, 40):  # of the batch: no row looks at another
        parts = [loaded.logits(task.test.rows(rows)) for rows in torch.arange(40).split(size)]
        torch.testing.assert_close(torch.cat(parts), logits, rtol=1e-5, atol=1e-4)
    same = ("chosen_", "settings_", "val_accuracy_", "facts_")
    assert [getattr(loaded, key) for key in same] == [getattr(method, key) for key in same]
    assert repr(loaded) == repr(method) and type(loaded.predictor_) is type(method.predictor_)


def test_every_predictor_and_rule_comes_back_or_is_refused_by_name(make_task, tmp_path):
    task, brief = make_task(), {"epochs": 2, "iterations": 20}
    names = [f"{name}/additive" for name in methods.PREDICTORS] + ["gda/classwise", "gda/dynamic"]
    for i, name in enumerate(names):
        settings = {key: brief[key] for key in brief if key in methods.build(name).entry.arguments()}
        method = methods.build(name, **settings).fit(task)
        if method.entry.per_batch:
            with pytest.raises(ValueError, match=r"MAdapter|TransCLIP|ClassPrior|StatA|ZLaP|TDA|the fusion classwise"):
                method.save(tmp_path / str(i))
        else:
            logits = methods.load(method.save(tmp_path / str(i))).logits(task.test)
            assert torch.equal(logits, method.logits(task.test)), name


def test_the_card_says_what_was_fitted_and_holds_no_pickle(make_task, tmp_path):
    method = build("tip_adapter").fit(make_task())
    folder = method.save(tmp_path / "m")
    card = json.loads((folder / "card.json").read_text())
    assert card["triple"] == {"features": "clip", "predictor": "Cache", "fusion": "additive"}
    assert card["protocol"] == "val" and len(card["commit"]) in (0, 40, 41)
    held = card["fitted"]
    assert held["chosen_"] == method.chosen_ and held["val_accuracy_"] == method.val_accuracy_
    assert held["facts_"]["classnames"] == [f"class {c}" for c in range(5)]
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".safetensors"]


def test_saving_again_replaces_a_saved_method_and_nothing_else(make_task, tmp_path):
    task = make_task()
    folder = build("gda").fit(task).save(tmp_path / "m")
    build("amu").fit(task).save(folder)
    assert methods.load(folder).name == "amu" and len(list(folder.iterdir())) == 2
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "thesis.txt").touch()
    with pytest.raises(ValueError, match="own is not empty and holds no saved method"):
        build("gda").fit(task).save(tmp_path / "own")
    with pytest.raises(ValueError, match="gda is not fitted"):
        build("gda").save(tmp_path / "new")


def test_a_flipped_byte_is_refused(make_task, tmp_path):
    folder = build("gda").fit(make_task()).save(tmp_path / "m")
    [tensors] = folder.glob("*.safetensors")
    for path, words in ((tensors, "is damaged"), (folder / "card.json", "was changed after it was written|cannot be")):
        data = path.read_bytes()
        for place in (len(data) // 2, len(data) - 8):
            path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
            with pytest.raises(ValueError, match=words):
                methods.load(folder)
        path.write_bytes(data)
    methods.load(folder)
    tensors.unlink()
    with pytest.raises(ValueError, match="lacks tensors-"):
        methods.load(folder)
    with pytest.raises(ValueError, match="holds no saved method"):
        methods.load(tmp_path)


def test_a_name_that_means_another_triple_now_is_refused(make_task, tmp_path, monkeypatch):
    folder = build("gda").fit(make_task()).save(tmp_path / "m")
    monkeypatch.setitem(methods.METHODS, "gda", replace(methods.METHODS["gda"], predictor=predictors.Cache))
    with pytest.raises(ValueError, match=r"gda was .*'GDA'.* when it was saved, is .*'Cache'"):
        methods.load(folder)


def test_other_encoders_and_changed_weights_are_refused(small_encoders, embedded, tmp_path, monkeypatch):
    source = load_source(f"folder:{write_folder(tmp_path / 'photos')}", aux="embedded:conv")
    [task] = draw(source, 4, 1)
    method = methods.build("gda").fit(task)
    folder = method.save(tmp_path / "m")
    loaded = methods.load(folder)
    assert torch.equal(loaded.logits(task.test), method.logits(task.test))
    assert [entry["name"] for entry in loaded.facts_["encoders"]] == ["embedded:clip", "embedded:conv"]
    assert loaded.facts_["prompts"] == ["a photo of a {}."]
    with pytest.raises(ValueError, match=r"fitted on embedded:conv with weights .*, embedded:vit has"):
        methods.load(folder, ["embedded:clip", "embedded:vit"])
    with pytest.raises(ValueError, match="fitted on embedded:clip, embedded:conv; named are embedded:clip"):
        methods.load(folder, ["embedded:clip"])
    with pytest.raises(ValueError, match=r"no file .*nowhere.pt; if its weights have moved, name all 2 by --encoders"):
        methods.load(folder, ["embedded:clip", "timm:resnet10t/nowhere.pt"])
    resolve = encoders.resolve
    swapped = lambda name: replace(resolve("embedded:conv"), name=name) if name == "other:conv" else resolve(name)  # noqa: E731
    load = sys.modules["lib.features.load"]  # `lib.features.load` is its function
    monkeypatch.setattr(load, "resolve", swapped)
    renamed = methods.load(folder, ["embedded:clip", "other:conv"])
    assert renamed.facts_["encoders"][1]["name"] == "other:conv"
    blurred = lambda name: replace(resolve(name), preprocess={**resolve(name).preprocess, "interpolation": "bilinear"})  # noqa: E731
    monkeypatch.setattr(load, "resolve", blurred)
    with pytest.raises(ValueError, match="embedded:clip has the weights of the fit, but is read another way"):
        methods.load(folder)
