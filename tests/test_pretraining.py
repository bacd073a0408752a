"""Pretraining: objectives have the values they should, a few steps reduce each loss, weights survive the disk."""

import json
import re

import objectives
import pytest
import torch
import train as pretraining
import world
from card import best_for_digits
from conftest import ROOT
from objectives import FLIPPED, LIGHT, Augmentation, Schedule
from torch.nn import functional as F
from train import RECIPES

from lib.features import encoders

EMBEDDED_FOLDER = ROOT / "data" / "embedded"
SHORT = Schedule(steps=14, batch=24, rate=4e-3)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return world.render_labelled(64, seed=0)[0]


def test_augmentation_without_strength_only_standardises(images):
    views = objectives.augment(images, Augmentation(1.0), generator())
    torch.testing.assert_close(views, objectives.normalise(images), atol=1e-4, rtol=0)
    assert objectives.normalise(torch.full((1, 3, 4, 4), 255, dtype=torch.uint8)).min() > 1.5


def test_augmentation_follows_its_generator(images):
    first, again = (objectives.augment(images, FLIPPED, generator(3)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, objectives.augment(images, FLIPPED, generator(4)))
    assert not torch.equal(objectives.augment(images, LIGHT, generator()), objectives.normalise(images))


def test_vicreg_is_zero_exactly_when_its_three_wishes_are_met():
    rng = generator()
    x = torch.linalg.qr(torch.randn(400, 8, generator=rng)).Q
    x = torch.linalg.qr(x - x.mean(0)).Q * 2 * 399**0.5  # centred, uncorrelated, deviation 2
    assert objectives.vicreg_loss(x, x).item() == pytest.approx(0, abs=1e-4)
    collapsed = torch.zeros(400, 8)
    assert objectives.vicreg_loss(collapsed, collapsed).item() == pytest.approx(25 * (1 - 1e-2), rel=1e-4)
    assert objectives.vicreg_loss(x, x + 1, (25.0, 0.0, 0.0)).item() == pytest.approx(25, rel=1e-4)
    copies = x[:, :1].expand(-1, 8)  # variance 4 in each of 8 x 7 off-diagonal entries, in both views
    assert objectives.vicreg_loss(copies, copies, (0.0, 0.0, 1.0)).item() == pytest.approx(2 * 56 * 16 / 8, rel=1e-3)


def test_the_pull_of_vicreg_is_weak_enough_that_no_dimension_shrinks():
    """The loss of a dimension whose branches do not correlate is least at deviation 1 or above, not at a quarter."""
    a, b = torch.randn(2, 4000, 1, generator=generator())

    def least(loss):
        return min((0.1, 0.25, 0.5, 0.75, 1.0), key=lambda s: loss(s * a, s * b).item())

    assert least(objectives.vicreg_loss) == 0.25
    assert least(objectives.VICReg()) == 1.0


def test_infonce_is_the_entropy_of_picking_the_own_partner():
    infonce, eye = objectives.InfoNCE(), torch.eye(5)
    away = -torch.log(torch.exp(torch.tensor(10.0)) / (torch.exp(torch.tensor(10.0)) + 4))
    assert infonce(3 * eye, 0.2 * eye).item() == pytest.approx(away.item(), abs=1e-6)
    assert infonce(eye, torch.ones(5, 5)).item() == pytest.approx(torch.tensor(5.0).log().item(), rel=1e-5)
    a, b = torch.randn(2, 5, 3, generator=generator())
    assert infonce(a, b).item() == pytest.approx(infonce(b, a).item(), rel=1e-6)
    assert infonce.scale.exp().item() == pytest.approx(10)  # a temperature of 0.1


def test_pairs_leave_one_branch_trained_and_the_temperature_learned():
    pictures, drawings = world.render_pairs(64, 0)
    model, infonce = pretraining.encoder("infonce", 0), objectives.InfoNCE()
    before = [parameter.clone() for parameter in model.parameters()]
    objectives.train_pairs(model, pictures, drawings, infonce, 8, Schedule(2, batch=16, rate=1e-2), 0)
    assert not model.training and infonce.scale.exp().item() != pytest.approx(10, abs=1e-4)
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "random"])
def test_a_few_steps_reduce_the_loss_and_repeat_exactly(name):
    first, again = (
        pretraining.train(name, RECIPES[name]._replace(schedule=SHORT, images=128), seed=1) for _ in range(2)
    )
    assert first.curve == again.curve and len(first.curve) == SHORT.steps
    assert sum(first.curve[-4:]) < sum(first.curve[:4])
    for a, b in zip(first.model.state_dict().values(), again.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_tokens_that_no_caption_uses_are_zero():
    trained = pretraining.train("clip", pretraining.plan("clip", steps=2, images=64), seed=0)
    empty = (trained.model.token_embedding.weight == 0).all(1).sum().item()
    assert trained.model.vocab_size - 120 < empty < trained.model.vocab_size - 20


def test_random_weights_come_from_the_seed_and_leave_the_global_state_alone():
    before = torch.get_rng_state()
    a, b, other = (pretraining.encoder("random", seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    image = torch.randn(2, 3, 48, 48, generator=generator())
    with torch.inference_mode():
        assert torch.equal(a.eval()(image), b.eval()(image))
        assert not torch.allclose(a(image), other.eval()(image))


def test_weights_survive_the_disk_and_half_precision(tmp_path, images):
    model = pretraining.encoder("random", 0).eval()
    sha256 = pretraining.save_encoder(model, tmp_path / "random.safetensors")
    assert len(sha256) == 64 and sha256 == pretraining.save_encoder(model, tmp_path / "again.safetensors")
    back = pretraining.restored(model, tmp_path / "random.safetensors")
    similarity = F.cosine_similarity(pretraining.encode(model, images), pretraining.encode(back, images))
    assert similarity.min() > 0.999


def test_what_is_not_trained_again_stays_in_the_index_whose_writing_is_atomic(tmp_path):
    pretraining.write_index({"random": {"seed": 0}, "clip": {"seed": 0}}, tmp_path)
    pretraining.write_index({"clip": {"seed": 1}}, tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())
    assert list(index) == ["clip", "random"] and index["clip"]["seed"] == 1 and index["random"]["seed"] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["index.json"], "no half-written file is left"


def test_labels_are_textures_or_classes_that_no_evaluation_has():
    images, labels = pretraining.labelled("texture", 200, 0)
    assert labels.shape == (len(images), 1) and labels.unique().tolist() == list(range(6))
    images, labels = pretraining.labelled("other-classes", 2000, 0)
    assert images.shape == (2000, 3, 48, 48) and labels.unique().tolist() == list(range(128))


def test_errors_name_both_sides(images):
    with pytest.raises(ValueError, match=r"'vicregg'.*vicreg"):
        pretraining.encoder("vicregg", 0)
    with pytest.raises(ValueError, match=r"\(4, 2\) and \(4, 3\)"):
        objectives.vicreg_loss(torch.zeros(4, 2), torch.zeros(4, 3))
    with pytest.raises(ValueError, match="64 images come with 1 captions"):
        objectives.train_clip(pretraining.clip_model(0), images, torch.zeros(1, 32, dtype=torch.long), SHORT, 0)
    with pytest.raises(ValueError, match="64 images come with 3 rows"):
        objectives.train_supervised(torch.nn.Identity(), images, torch.zeros(3, 1, dtype=torch.long), SHORT, 0)
    with pytest.raises(ValueError, match="vicreg cannot be trained for 2 steps on 1 images"):
        pretraining.plan("vicreg", steps=2, images=1)
    with pytest.raises(ValueError, match="no recipe for dino; there are clip, other-classes, infonce, vicreg"):
        pretraining.select(["clip", "dino"])
    with pytest.raises(ValueError, match="nan at step 0 of 2"):
        layer = torch.nn.Linear(2, 2)
        objectives.optimise([layer], lambda step: layer.weight.sum() * float("nan"), Schedule(2))


@pytest.mark.parametrize("name", list(RECIPES))
def test_shipped_weights_are_those_of_the_index(name):
    index = json.loads((EMBEDDED_FOLDER / "index.json").read_text())
    entry = index[name]
    assert entry["architecture"] == RECIPES[name].architecture and entry["settings"] == RECIPES[name].settings
    assert entry["steps"] == RECIPES[name].schedule.steps and entry["learning_rate"] == RECIPES[name].schedule.rate
    model = pretraining.clip_model(0) if name == "clip" else pretraining.encoder(name, 0)
    back = pretraining.restored(model, EMBEDDED_FOLDER / entry["file"])
    assert pretraining.encode(back, world.render("shapes", "val").images[:8]).shape == (8, entry["feature_dim"])


def test_the_weights_are_small_and_the_card_names_them():
    files = list(EMBEDDED_FOLDER.glob("*.safetensors"))
    index = json.loads((EMBEDDED_FOLDER / "index.json").read_text())
    card = (EMBEDDED_FOLDER / "README.md").read_text()
    assert sum(path.stat().st_size for path in files) <= 16 * 2**20
    assert {path.name for path in files} == {entry["file"] for entry in index.values()}
    assert all(entry["sha256"][:12] in card for entry in index.values())


def test_the_card_comes_from_the_index_byte_for_byte(tmp_path):
    (tmp_path / "index.json").write_bytes((EMBEDDED_FOLDER / "index.json").read_bytes())
    assert pretraining.main(["--card", "--folder", str(tmp_path)]) == 0
    card = (tmp_path / "README.md").read_bytes()
    assert card == (EMBEDDED_FOLDER / "README.md").read_bytes(), "run python data/embedded/train.py --card"
    index = json.loads((tmp_path / "index.json").read_text())
    index["clip"]["zero_shot"]["shapes test"]["class"] = 12.3
    (tmp_path / "index.json").write_text(json.dumps(index))
    pretraining.main(["--card", "--folder", str(tmp_path)])
    assert (tmp_path / "README.md").read_text() == card.decode().replace(
        "| shapes test | 50.5 |", "| shapes test | 12.3 |"
    )


def test_a_curve_has_nine_points_from_the_first_to_the_last_step():
    points = pretraining.curve_points([float(step) for step in range(400)])
    assert list(points) == ["0", "50", "100", "150", "200", "250", "300", "350", "399"]
    assert points["200"] == 200 and pretraining.curve_points([]) == {}
    assert pretraining.curve_points([2.0, 1.0]) == {"0": 2.0}


def test_answers_are_correct_about_the_class_the_shape_or_the_texture():
    rendered = world.render("shapes", "val")
    count = len(world.SHAPES)
    other_texture = (rendered.labels + count) % len(world.CLASSNAMES)
    assert pretraining.correct_about(rendered.labels, rendered) == {"class": 100, "shape": 100, "texture": 100}
    assert pretraining.correct_about(other_texture, rendered) == {"class": 0, "shape": 100, "texture": 0}
    captions = [
        "a photo of a red star.",
        "a sketch of a ring.",
        "the digit two.",
        "a dotted drop on a blue background.",
    ]
    rates = {"digit": 25, "sketch": 25, "shape": 100, "colour": 50, "background": 50, "texture": 50}
    assert pretraining.caption_rates(captions) == rates


def test_a_trial_trains_stores_measures_and_writes_the_card(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(world, "IMAGES_PER_CLASS", {"train": 16, "val": 8, "test": 4})
    trial = ["clip", "texture", "--steps", "2", "--images", "64", "--threads", "1", "--folder", str(tmp_path)]
    assert pretraining.main(trial) == 0
    index = json.loads((tmp_path / "index.json").read_text())
    assert list(index) == ["clip", "texture"] and all(entry["steps"] == 2 for entry in index.values())
    cosines = re.findall(r"the least cosine with the features before is ([\d.]+)", capsys.readouterr().out)
    assert len(cosines) == 2 and min(map(float, cosines)) > 0.99
    assert (tmp_path / "embedded-clip.json").exists(), "the folder can stand in for data/embedded"
    assert set(index["clip"]["zero_shot"]) == {"shapes val", "shapes test", *world.VERSIONS} - {
        "shapes",
        "shapes-novel",
    }
    assert len(index["clip"]["groups"]) == 4 and set(index["clip"]["digits"]) == {"val", "test"}
    entry = index["texture"]
    assert list(entry["validation"]) == ["2"] and 0 <= entry["validation"]["2"] <= 100
    for dataset in ("shapes", "digits"):
        assert list(entry["measured"][dataset]) == ["1", "4", "16"]
        for row in entry["measured"][dataset].values():
            assert row["amu"][0] - row["zero_shot"][0] == pytest.approx(row["gain"][0], abs=0.02)
            assert row["either"][0] >= max(row["head"][0], row["zero_shot"][0]) and row["head"][1] >= 0
    card = (tmp_path / "README.md").read_text()
    assert "The default auxiliary encoder of `digits` is `texture`" in " ".join(card.split())
    assert index["clip"]["sha256"][:12] in card


def test_a_draw_takes_the_same_number_of_each_class_and_leaves_the_rest():
    labels = torch.tensor([2, 0, 1, 2, 1, 0, 2, 0, 1, 2])
    taken, rest = pretraining._draw(labels, 2, generator(5))
    assert labels[taken].tolist() == [0, 0, 1, 1, 2, 2] and sorted([*taken.tolist(), *rest.tolist()]) == list(range(10))
    assert any(not torch.equal(taken, pretraining._draw(labels, 2, generator(seed))[0]) for seed in range(5))


def test_data_sets_name_encoders_that_ship_and_digits_the_best_by_validation():
    index = json.loads((EMBEDDED_FOLDER / "index.json").read_text())
    table = json.loads((ROOT / "data" / "benchmarks.json").read_text())["generated"]
    for dataset in ("shapes", "digits"):
        assert sorted(table[dataset]["aux"]) == sorted(f"embedded:{name}" for name in index if name != "clip")
    assert table["digits"]["aux"][0] == f"embedded:{best_for_digits(index)}"


def test_former_names_are_refused_with_the_present_ones(monkeypatch):
    monkeypatch.setattr(encoders, "EMBEDDED_FOLDER", EMBEDDED_FOLDER)
    with pytest.raises(ValueError, match=r"'embedded:supervised'; it no longer ships, use embedded:texture$"):
        encoders.resolve("embedded:supervised")
    with pytest.raises(ValueError, match=r"use embedded:infonce or embedded:vicreg$"):
        encoders.resolve("embedded:mae")
    renamed = json.loads((EMBEDDED_FOLDER / "renamed.json").read_text())
    assert set(renamed) == {"supervised", "supervised-colour", "mae"} and not set(renamed) & set(RECIPES)
    for name in {name for names in renamed.values() for name in names}:
        assert encoders.resolve(f"embedded:{name}").weights.name == f"{name}.safetensors"


@pytest.mark.parametrize("arguments", [["--steps", "2"], ["dino"], ["vicreg", "--images", "1"]])
def test_a_run_that_cannot_be_meant_is_refused_before_any_work(arguments, capsys):
    with pytest.raises(SystemExit):
        pretraining.main(arguments)
    message = capsys.readouterr().err.splitlines()[-1]
    assert any(part in message for part in ("name another --folder", "no recipe for dino", "on 1 images"))
