"""Features: the same bytes at every call, a cache that is never mistaken, banks, and other people's caches."""

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REAL
from safetensors.torch import load_file, save_file
from small_models import write_folder
from torch.nn.functional import normalize

from lib import features, methods, tasks
from lib.__main__ import main
from lib.features import FeatureBank, banks, datasets, encoders, extraction, images
from lib.features.encoders import Encoder, load_encoder
from lib.files import cache_root, file_hash


@pytest.fixture(autouse=True)
def small(small_encoders, monkeypatch):
    monkeypatch.setattr(extraction, "SHARD", 5)


@pytest.fixture
def own(tmp_path):
    """Three classes of four images in each split."""
    return f"folder:{write_folder(tmp_path / 'own')}"


def files(folder) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != ".lock"
    }


# ---- extraction and cache ---------------------------------------------------------------------------------------


def test_features_are_what_the_encoder_gives_image_by_image(own):
    found = features.load(own, "test", "embedded:vit", device="cpu")
    data, encoder = datasets.load(own), load_encoder("embedded:vit", device="cpu")
    split = data.images("test")
    expected = torch.cat([encoder.encode_images(encoder.transform(image)[None]) for image in split])
    torch.testing.assert_close(found.x, expected)
    assert torch.equal(found.y, split.labels) and found.x.dtype == torch.float32
    assert found.classnames == ("class 0", "class 1", "class 2") and found.encoder == "embedded:vit"
    assert (found.dataset, found.split, found.quarantined) == (own, "test", ())
    assert found.x.norm(dim=1).min() > 2, "nothing is normalised silently"


def test_the_same_call_gives_the_same_bytes_and_encodes_once(own, tmp_path, monkeypatch):
    first = features.load(own, "val", "embedded:clip", device="cpu")
    kept = files(tmp_path / "cache")
    monkeypatch.setattr(extraction, "load_encoder", lambda *_, **__: pytest.fail("the cache was not read"))
    second = features.load(own, "val", "embedded:clip", device="cpu")
    assert torch.equal(first.x, second.x) and first.fingerprint == second.fingerprint
    assert kept == files(tmp_path / "cache")
    assert not [name for name in kept if "shard" in name], "shards are gone once they are joined"


def test_another_cache_ends_with_the_same_bytes(own, tmp_path):
    for place in ("one", "two"):
        features.load(own, "test", "embedded:conv", device="cpu", cache=tmp_path / place)
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_the_fingerprint_tells_everything_apart(own, embedded, tmp_path, monkeypatch):
    def prints(**options):
        return features.load(own, "test", "embedded:vit", device="cpu", **options).fingerprint

    seen = [prints(), prints(precision="bf16"), prints(views=2), prints(views=3)]
    seen.append(features.load(own, "val", "embedded:vit", device="cpu").fingerprint)
    seen.append(features.load(own, "test", "embedded:conv", device="cpu").fingerprint)
    (tmp_path / "own/test/class_0/image_000.png").write_bytes(
        (tmp_path / "own/train/class_0/image_000.png").read_bytes()
    )
    seen.append(prints())
    copy = tmp_path / "copy"
    shutil.copytree(embedded, copy)
    monkeypatch.setattr(encoders, "EMBEDDED_FOLDER", copy)
    index = json.loads((copy / "index.json").read_text())
    index["vit"]["mean"] = [0.5, 0.5, 0.5]
    (copy / "index.json").write_text(json.dumps(index))
    seen.append(prints())
    state = load_file(copy / "vit.safetensors")
    state["cls_token"] = state["cls_token"] + 1
    save_file(state, copy / "vit.safetensors")
    index["vit"]["sha256"] = file_hash(copy / "vit.safetensors")
    (copy / "index.json").write_text(json.dumps(index))
    seen.append(prints())
    monkeypatch.setattr(extraction, "VERSION", extraction.VERSION + 1)
    seen.append(prints())
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "missing", "manifest"])
def test_a_damaged_cache_is_named_and_made_again(own, tmp_path, damage):
    first = features.load(own, "val", "embedded:vit", device="cpu")
    before, expected = files(tmp_path / "cache"), first.x.clone()
    path = next((tmp_path / "cache").rglob("features.safetensors"))
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-7] ^= 4
        path.write_bytes(data)
    elif damage == "missing":
        path.unlink()
    elif damage == "manifest":
        (path.parent / "manifest.json").write_text("{")
    else:
        path.write_bytes(data[: 0 if damage == "empty" else len(data) // 2])
    with pytest.warns(UserWarning, match=r"damaged cache .*features.safetensors .*extracting again"):
        second = features.load(own, "val", "embedded:vit", device="cpu")
    assert torch.equal(second.x, expected)
    assert files(tmp_path / "cache") == before


def test_several_encoders_decode_each_image_once(own, monkeypatch):
    names = ["embedded:clip", "embedded:vit", "embedded:conv"]
    alone = [features.load(own, "train", name, device="cpu").x.clone() for name in names]
    monkeypatch.setenv("LOGIT_BIAS_CACHE", str(cache_root()) + "-together")
    read = []
    decode = images.decode
    monkeypatch.setattr(images, "decode", lambda path: read.append(path) or decode(path))
    features.load(own, "train", "embedded:vit", device="cpu")
    assert len(read) == 12
    together = features.load_many(own, "train", names, device="cpu")
    assert len(read) == 24, "one pass for the two that were missing"
    assert all(torch.equal(one, other.x) for one, other in zip(alone, together, strict=True))
    features.load_many(own, "train", names, device="cpu")
    assert len(read) == 24


@pytest.mark.parametrize("workers", [0, 2])
def test_views_are_random_crops_that_every_encoder_shares(own, workers, tmp_path):
    options = {"device": "cpu", "views": 3, "num_workers": workers, "cache": tmp_path / f"w{workers}"}
    state = torch.get_rng_state()
    vit, clip = features.load_many(own, "train", ["embedded:vit", "embedded:clip"], **options)
    assert torch.equal(state, torch.get_rng_state())
    assert vit.x.shape == (3, 12, 48) and clip.x.shape == (3, 12, 24) and len(vit.y) == 12
    assert not torch.allclose(vit.x[0], vit.x[1])
    encoder = load_encoder("embedded:vit", device="cpu")
    with torch.random.fork_rng():
        torch.manual_seed(extraction.AUGMENTATION_SEED + 7)
        crops = torch.stack([encoder.augment(datasets.load(own).images("train")[7]) for _ in range(3)])
    torch.testing.assert_close(vit.x[:, 7], encoder.encode_images(crops))
    plain = features.load_many(own, "train", ["embedded:vit"], **options | {"batch_size": 4, "cache": tmp_path / "b"})
    torch.testing.assert_close(plain[0].x, vit.x)


def test_workers_change_no_byte(own, tmp_path):
    for workers in (0, 2):
        features.load(own, "test", "embedded:vit", device="cpu", num_workers=workers, cache=tmp_path / str(workers))
    assert files(tmp_path / "0") == files(tmp_path / "2")


def test_an_encoder_that_gives_nan_is_stopped_before_anything_is_kept(own, monkeypatch, tmp_path):
    encode = Encoder.encode_images

    def poisoned(self, batch):
        x = encode(self, batch)
        x[0, 3] = float("nan")
        return x

    monkeypatch.setattr(Encoder, "encode_images", poisoned)
    with pytest.raises(
        ValueError, match=r"embedded:vit gives NaN or infinite features for 1 images, first test/class_0"
    ):
        features.load(own, "test", "embedded:vit", device="cpu")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    monkeypatch.setattr(Encoder, "encode_images", encode)
    assert torch.isfinite(features.load(own, "test", "embedded:vit", device="cpu").x).all()


def test_wrong_arguments_are_refused_before_any_work(own, tmp_path):
    with pytest.raises(ValueError, match="views and batch_size are 1 or more, not 0 and 64"):
        features.load(own, "test", "embedded:vit", views=0)
    with pytest.raises(ValueError, match="has no split 'tset'"):
        features.load(own, "tset", "embedded:vit")
    with pytest.raises(ValueError, match="unknown encoder 'vit'"):
        features.load(own, "test", "vit")
    with pytest.raises(ValueError, match="precision is fp32 or bf16"):
        features.load(own, "test", "embedded:vit", precision="half")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_a_draw_shares_the_test_features_of_its_data_set(tmp_path):
    root = write_folder(tmp_path / "own", images=9, splits=())
    whole, drawn = f"folder:{root}", f"folder:{root}@2/1"
    first = features.load(whole, "test", "embedded:vit", device="cpu")
    assert features.load(drawn, "test", "embedded:vit", device="cpu").fingerprint == first.fingerprint
    support = features.load(drawn, "train", "embedded:vit", device="cpu")
    assert len(support.y) == 6
    train = features.load(whole, "train", "embedded:vit", device="cpu")
    assert all((row == train.x).all(dim=1).any() for row in support.x)


def test_features_are_mapped_not_read(own):
    found = features.load(own, "test", "embedded:vit", device="cpu")
    again = features.load(own, "test", "embedded:vit", device="cpu")
    found.x[0, 0] = 99.0  # nobody should; the file must not change
    assert again.x[0, 0] != 99.0
    assert features.load(own, "test", "embedded:vit", device="cpu").x[0, 0] != 99.0


# ---- text -------------------------------------------------------------------------------------------------------


def test_text_features_are_the_normalised_mean_of_normalised_prompts():
    found = features.load_text("digits", "embedded:clip", device="cpu")
    encoder, data = load_encoder("embedded:clip", device="cpu"), datasets.load("digits")
    for row, name in zip(found.x, data.classnames, strict=True):
        x = normalize(encoder.encode_text([template.format(name) for template in data.templates]), dim=1)
        torch.testing.assert_close(row, normalize(x.mean(dim=0), dim=0))
    assert found.templates == data.templates and found.classnames == data.classnames
    assert found.logit_scale == encoder.logit_scale
    again = features.load_text("digits", "embedded:clip", device="cpu")
    assert torch.equal(again.x, found.x) and again.fingerprint == found.fingerprint


def test_text_features_follow_the_prompts():
    own = features.load_text("digits", "embedded:clip", device="cpu")
    other = features.load_text("digits", "embedded:clip", ["a {}."], device="cpu")
    seven = features.load_text("digits", "embedded:clip", "7", device="cpu")
    names = datasets.load("digits").classnames
    told = features.load_text("digits", "embedded:clip", {n: [f"a {n}."] for n in names}, device="cpu")
    assert len({own.fingerprint, other.fingerprint, seven.fingerprint}) == 3
    assert torch.equal(told.x, other.x) and told.templates == ("10 sentences about 10 classes",)
    assert len(seven.templates) == 7


def test_each_prompt_keeps_its_own_row(monkeypatch):
    found = features.load_text("digits", "embedded:clip", device="cpu")
    data = datasets.load("digits")
    assert found.prompts.shape == (10, len(data.templates), found.x.shape[1])
    assert torch.equal(normalize(found.prompts.mean(dim=1), dim=1), found.x), "the mean of the rows is the class's row"
    encoder = load_encoder("embedded:clip", device="cpu")
    x = normalize(encoder.encode_text([template.format(data.classnames[3]) for template in data.templates]), dim=1)
    torch.testing.assert_close(found.prompts[3], x)
    told = {name: [f"a {name}."] * (1 + (name == "two")) for name in data.classnames}
    uneven = features.load_text("digits", "embedded:clip", told, device="cpu")
    assert uneven.prompts is None and uneven.x.shape == found.x.shape, "classes that differ in number have none"
    monkeypatch.setattr(Encoder, "encode_text", None)  # both are read
    assert torch.equal(features.load_text("digits", "embedded:clip", device="cpu").prompts, found.prompts)


def test_a_cache_of_an_earlier_version_gets_its_prompts(tmp_path):
    """Entries of classes alone stay as they are; those of their prompts are made beside them."""
    first = features.load_text("digits", "embedded:clip", device="cpu", cache=tmp_path)
    [apart] = [path.parent for path in tmp_path.rglob("manifest.json") if first.fingerprint not in path.read_text()]
    shutil.rmtree(apart)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")}
    again = features.load_text("digits", "embedded:clip", device="cpu", cache=tmp_path)
    assert torch.equal(again.prompts, first.prompts) and again.fingerprint == first.fingerprint
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items()), "nothing else is written"


def test_text_features_that_cannot_be_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="embedded:vit encodes images only"):
        features.load_text("digits", "embedded:vit", device="cpu")
    with pytest.raises(ValueError, match=r"a template has one \{\}"):
        features.load_text("digits", "embedded:clip", ["a digit"], device="cpu")
    monkeypatch.setattr(Encoder, "encode_text", lambda self, texts: torch.full((len(texts), 4), float("inf")))
    with pytest.raises(ValueError, match="NaN or infinite features for one of"):
        features.load_text("digits", "embedded:clip", ["the {}"], device="cpu")


# ---- banks ------------------------------------------------------------------------------------------------------


def small_bank(path, **changes):
    rng = torch.Generator().manual_seed(0)
    sizes = {"train": 6, "val": 3, "test": 9}
    clip = {split: torch.randn(n, 8, generator=rng) for split, n in sizes.items()}
    aux = {split: torch.randint(0, 256, (n, 5), generator=rng, dtype=torch.uint8) for split, n in sizes.items()}
    labels = {split: torch.arange(n) % 3 for split, n in sizes.items()}
    parts = {"clip": {"clip_a": clip}, "aux": {"aux_b": aux}, "text": {"clip_a": torch.randn(3, 8, generator=rng)}}
    parts |= {"labels": labels, "class_names": ["one", "two", "three"]} | changes
    return banks.save_bank(path, **parts), parts


def test_a_bank_written_is_a_bank_read(tmp_path):
    path, parts = small_bank(tmp_path / "bank", source="a test")
    name = f"features:{path}"
    bank = FeatureBank(name)
    assert (bank.clip_encoders, bank.aux_encoders) == (("clip_a",), ("aux_b",))
    assert (bank.name, bank.class_names, bank.splits) == ("bank", ("one", "two", "three"), ("train", "val", "test"))
    clip, aux = features.load(name, "test", "clip_a"), features.load(name, "test", "aux_b")
    assert torch.equal(clip.x, parts["clip"]["clip_a"]["test"]) and torch.equal(clip.y, parts["labels"]["test"])
    assert aux.x.dtype == torch.float32 and torch.equal(aux.x, parts["aux"]["aux_b"]["test"].float())
    text = features.load_text(name, "clip_a")
    torch.testing.assert_close(text.x, normalize(parts["text"]["clip_a"], dim=1))
    assert text.logit_scale == 100.0 and text.classnames == ("one", "two", "three")
    prints = {features.load(name, s, e).fingerprint for s in ("train", "val", "test") for e in ("clip_a", "aux_b")}
    assert len(prints) == 6
    assert json.loads((path / "meta.json").read_text())["source"] == "a test"


def test_a_bank_may_bring_prompts(tmp_path):
    rows = torch.randn(3, 4, 8)
    plain, _ = small_bank(tmp_path / "plain")
    path, _ = small_bank(tmp_path / "bank", prompts={"clip_a": rows})
    text, bare = (features.load_text(f"features:{each}", "clip_a") for each in (path, plain))
    torch.testing.assert_close(text.prompts, normalize(rows, dim=2))
    assert bare.prompts is None and torch.equal(text.x, bare.x) and text.fingerprint != bare.fingerprint
    digest = {"class_names": ("one", "two", "three"), "text": file_hash(plain / "text.safetensors")}
    assert bare.fingerprint == extraction.fingerprint(digest), "as before there were prompts"
    shared = load_file(path / "prompts.safetensors")["clip_a"]
    save_file({"prompts": shared}, plain / "prompts.safetensors")  # one tensor for all CLIP files
    assert torch.equal(features.load_text(f"features:{plain}", "clip_a").prompts, text.prompts)
    (plain / "prompts.safetensors").unlink()
    source = tasks.load_source(f"features:{path}")
    task = tasks.sample(source, 1, 1)
    assert torch.allclose(task.prompts, text.prompts) and task.text.shape == (3, 8)
    assert methods.build("timo", "fixed").fit(task).logits(task.test).shape == (9, 3)
    without = tasks.sample(tasks.load_source(f"features:{plain}"), 1, 1)
    skipped = {"timo", "prompt_weights"}
    assert set(methods.offered(task)) - set(methods.offered(without)) == skipped
    with pytest.raises(ValueError, match=r"timo: TIMO needs prompts kept apart, the same number in each class; .*bank"):
        methods.build("timo").fit(replace(task, prompts=None))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_names": ["one", "two"]}, "labels run from 0 to 2, there are 2 class names"),
        (
            {"text": {"clip_a": torch.ones(4, 8)}},
            r"text of clip_a: features are \(4, 8\), expected one row for each of 3 class names",
        ),
        ({"text": {"clip_z": torch.ones(3, 8)}}, "'clip_z' has no text features; CLIP files are clip_a"),
        (
            {"prompts": {"clip_a": torch.ones(3, 8)}},
            r"prompts of clip_a are \[3, 8\], expected \[3, P, 8\] as its text has, P the same in every class",
        ),
        ({"prompts": {"clip_a": torch.ones(2, 4, 8)}}, r"are \[2, 4, 8\], expected \[3, P, 8\]"),
        ({"prompts": {"clip_a": torch.ones(3, 0, 8)}}, r"are \[3, 0, 8\], expected \[3, P, 8\]"),
        ({"prompts": {"clip_a": torch.full((3, 4, 8), torch.nan)}}, "prompts of clip_a: 4 of 4 rows hold NaN"),
        ({"text": None, "prompts": {"clip_a": torch.ones(3, 4, 8)}}, "no file text.safetensors"),
        ({"aux": {"dino": {}}}, "aux features are named aux…, not 'dino'"),
        (
            {"aux": {"aux_b": {"test": torch.ones(8, 5)}}},
            r"aux_b, test: features are \(8, 5\), expected one row for each of 9 labels",
        ),
        ({"aux": {"aux_b": {"test": torch.full((9, 5), float("nan"))}}}, "9 of 9 rows hold NaN"),
        (
            {"aux": {"aux_b": {"extra": torch.ones(9, 5)}}},
            "aux_b has split 'extra'; splits are train, val, test, labels have train",
        ),
    ],
)
def test_a_bank_whose_parts_disagree_is_not_written(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        small_bank(tmp_path / "bank", **changes)
    assert not (tmp_path / "bank").exists()


def rewrite(path, stem, change):
    """Change a file of a bank and its hash in meta.json, as if somebody had made the bank so."""
    tensors = {key: value.clone() for key, value in load_file(path / f"{stem}.safetensors").items()}
    change(tensors)
    save_file(tensors, path / f"{stem}.safetensors")
    meta = json.loads((path / "meta.json").read_text())
    del meta["sha256"]
    (path / "meta.json").write_text(json.dumps(meta))


def put(key, value):
    return lambda tensors: tensors.__setitem__(key, value)


@pytest.mark.parametrize(
    ("stem", "change", "message"),
    [
        (
            "labels",
            put("test", torch.zeros(8, dtype=torch.int64)),
            r"features are \(9, 8\), expected one row for each of 8 labels",
        ),
        ("labels", put("test", torch.full((9,), 3)), "labels run from 3 to 3, there are 3 class names"),
        ("labels", put("test", torch.full((9,), -1)), "labels run from -1 to -1"),
        ("clip_a", put("test", torch.ones(9, 7)), "dimensions differ between splits"),
        ("clip_a", put("test", torch.full((9, 8), float("inf"))), "9 of 9 rows hold NaN or infinite"),
        ("clip_a", lambda tensors: tensors.pop("test"), "has no split 'test'; it has train, val"),
        ("labels", lambda tensors: tensors.pop("test"), "has no split 'test'; it has train, val"),
    ],
)
def test_a_bank_whose_parts_disagree_is_refused(tmp_path, stem, change, message):
    path, _ = small_bank(tmp_path / "bank")
    rewrite(path, stem, change)
    with pytest.raises(ValueError, match=message):
        features.load(f"features:{path}", "test", "clip_a")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            put("clip_a", torch.ones(2, 8)),
            r"text of clip_a: features are \(2, 8\), expected one row for each of 3 class names",
        ),
        (put("clip_a", torch.ones(3, 9)), "text features have 9 dimensions, clip_a has 8"),
        (put("clip_a", torch.full((3, 8), float("nan"))), "text of clip_a: 3 of 3 rows hold NaN"),
    ],
)
def test_text_features_of_a_bank_must_fit_it(tmp_path, change, message):
    path, _ = small_bank(tmp_path / "bank")
    rewrite(path, "text", change)
    with pytest.raises(ValueError, match=message):
        features.load_text(f"features:{path}", "clip_a")


def test_a_bank_that_lacks_something_says_what(tmp_path):
    path, _ = small_bank(tmp_path / "bank")
    name = f"features:{path}"
    with pytest.raises(ValueError, match=r"has no encoder 'clip_c'; it has clip_a, aux_b"):
        features.load(name, "test", "clip_c")
    with pytest.raises(ValueError, match="holds one row per image, not 4 views"):
        features.load(name, "test", "clip_a", views=4)
    with pytest.raises(ValueError, match="templates cannot be chosen"):
        features.load_text(name, "clip_a", ["a {}"])
    with pytest.raises(ValueError, match="'aux_b' has no text features; CLIP files are clip_a"):
        features.load_text(name, "aux_b")
    with pytest.raises(ValueError, match=r"no meta.json in .*, so it is not a bank"):
        features.load(f"features:{tmp_path}", "test", "clip_a")
    (path / "text.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no file text.safetensors"):
        features.load_text(name, "clip_a")
    (path / "meta.json").write_text('{"name": "x"}')
    with pytest.raises(ValueError, match=r"meta.json lacks class_names"):
        features.load(name, "test", "clip_a")
    (path / "meta.json").write_text("{")
    with pytest.raises(ValueError, match=r"meta.json cannot be read"):
        features.load(name, "test", "clip_a")


@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_a_damaged_bank_is_refused_and_left_alone(tmp_path, damage):
    path, _ = small_bank(tmp_path / "bank")
    data = bytearray((path / "clip_a.safetensors").read_bytes())
    data[-3] ^= 1
    damaged = bytes(data) if damage == "flip" else bytes(data[:-40])
    (path / "clip_a.safetensors").write_bytes(damaged)
    with pytest.raises(ValueError, match=r"clip_a.safetensors has sha256 .*meta.json says .*restore it"):
        features.load(f"features:{path}", "test", "clip_a")
    assert (path / "clip_a.safetensors").read_bytes() == damaged
    rewritten = json.loads((path / "meta.json").read_text())
    del rewritten["sha256"]
    (path / "meta.json").write_text(json.dumps(rewritten))
    if damage == "truncate":
        with pytest.raises(ValueError, match=r"clip_a.safetensors cannot be read"):
            features.load(f"features:{path}", "test", "clip_a")


def test_a_bank_is_never_written_over(tmp_path):
    path, _ = small_bank(tmp_path / "bank")
    with pytest.raises(ValueError, match="is not empty"):
        small_bank(path)


def test_the_real_bank_gives_the_zero_shot_accuracies_it_promises(caltech70):
    name = f"features:{caltech70}"
    text = features.load_text(name, "clip_vit_b32")
    promised = json.loads((caltech70 / "meta.json").read_text())["expected"]["zero_shot"]
    for split in ("test", "val", "train"):
        found = features.load(name, split, "clip_vit_b32")
        correct = (normalize(found.x, dim=1) @ text.x.T).argmax(dim=1) == found.y
        assert 100 * correct.double().mean().item() == pytest.approx(promised[split], abs=0.005)
    assert FeatureBank(name).aux_encoders == ("aux_mobilenet_v2", "aux_mobilenet_v1", "aux_inat_bird")
    assert features.load(name, "test", "aux_inat_bird").x.max() > 2, "raw activations stay as they are"


def test_two_encoders_of_three_splits_read_the_card_and_each_file_once(tmp_path, monkeypatch):
    path, _ = small_bank(tmp_path / "bank")
    read, mapped, hashed = [], [], []
    read_text, safe_open, hash_file = Path.read_text, banks.safe_open, banks.file_hash
    monkeypatch.setattr(Path, "read_text", lambda self, **options: read.append(self) or read_text(self, **options))
    monkeypatch.setattr(
        banks, "safe_open", lambda file, **options: mapped.append(file.stem) or safe_open(file, **options)
    )
    bank = FeatureBank(path)
    for split in ("train", "val", "test"):
        for encoder in ("clip_a", "aux_b"):
            bank.rows(split, encoder)
    bank.text("clip_a")
    assert [file.name for file in read] == ["meta.json"] and sorted(mapped) == ["aux_b", "clip_a", "labels", "text"]
    read.clear(), mapped.clear()
    monkeypatch.setattr(banks, "file_hash", lambda file: hashed.append(file.stem) or hash_file(file))
    for split in ("train", "val", "test"):
        features.load_many(f"features:{path}", split, ["clip_a", "aux_b"])
    features.load_text(f"features:{path}", "clip_a")
    assert [file.name for file in read] == ["meta.json"] and sorted(mapped) == ["aux_b", "clip_a", "labels", "text"]


def test_a_bank_that_changes_is_read_anew(tmp_path):
    path, parts = small_bank(tmp_path / "bank")
    before = features.load(f"features:{path}", "test", "clip_a")
    rewrite(path, "clip_a", put("test", parts["clip"]["clip_a"]["test"] + 1))
    after = features.load(f"features:{path}", "test", "clip_a")
    assert torch.equal(after.x, parts["clip"]["clip_a"]["test"] + 1) and after.fingerprint != before.fingerprint


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ([], r"must hold a mapping, not \[\]"),
        (3, "must hold a mapping, not 3"),
        ({"class_names": ["a"]}, "lacks name"),
        ({"name": 7}, "name must be a string, not 7"),
        ({"class_names": "one"}, "class_names must be a list of strings, not 'one'"),
        ({"class_names": {"one": 0}}, "class_names must be a list of strings"),
        ({"class_names": ["one", 2, "three"]}, r"class_names must be a list of strings, not \['one', 2"),
        ({"class_names": ["one", "two", "two"]}, "class_names must differ, 'two' is there more than once"),
        ({"class_names": []}, "class_names must be a list of strings"),
        ({"sha256": []}, r"sha256 must be a mapping to strings, not \[\]"),
        ({"sha256": {"labels.safetensors": 3}}, "sha256 must be a mapping to strings, not {'labels"),
        ({"backbones": 3}, "backbones must be a list or a mapping, not 3"),
        ({"text": "x"}, "text must be a mapping .*, not 'x'"),
        ({"text": {"logit_scale": "hot"}}, "text must be a mapping .*, not {'logit_scale': 'hot'}"),
        ({"text": {"prompt": ["a {}"]}}, "text must be a mapping"),
    ],
)
def test_a_card_of_another_shape_is_refused_by_field(tmp_path, card, message):
    path, _ = small_bank(tmp_path / "bank")
    whole = json.loads((path / "meta.json").read_text())
    if isinstance(card, dict):
        card = {"class_names": card["class_names"]} if "lacks" in message else whole | card
    (path / "meta.json").write_text(json.dumps(card))
    for act in (FeatureBank, lambda bank: features.load(f"features:{bank}", "test", "clip_a")):
        with pytest.raises(ValueError, match=rf"{path}/meta.json:? {message}"):
            act(path)


def test_a_shot_index_changes_nothing(tmp_path):
    path, _ = small_bank(tmp_path / "bank")
    plain = features.load(f"features:{path}", "train", "clip_a")
    rewrite(path, "labels", put("train_shot_index", torch.zeros(2, dtype=torch.int64)))
    with_index = features.load(f"features:{path}", "train", "clip_a")
    assert torch.equal(plain.x, with_index.x) and torch.equal(plain.y, with_index.y)
    assert FeatureBank(path).splits == ("train", "val", "test")
    index = {"train_shot_index": torch.zeros(6, dtype=torch.int64)}
    with pytest.raises(ValueError, match="labels has split 'train_shot_index'; splits are train, val, test"):
        small_bank(tmp_path / "other", labels=small_bank(tmp_path / "third")[1]["labels"] | index)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_labels_of_any_integer_type_are_read_as_int64(tmp_path, dtype):
    _, parts = small_bank(tmp_path / "first")
    path, _ = small_bank(tmp_path / "bank", labels={key: y.to(dtype) for key, y in parts["labels"].items()})
    y = features.load(f"features:{path}", "test", "aux_b").y
    assert y.dtype == torch.int64 and torch.equal(y, parts["labels"]["test"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_labels_of_another_type_are_refused_by_name(tmp_path, dtype):
    _, parts = small_bank(tmp_path / "first")
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(ValueError, match=rf"{tmp_path}/bank, clip_a, train: labels must be integers .*not {kind}"):
        small_bank(tmp_path / "bank", labels={key: y.to(dtype) for key, y in parts["labels"].items()})
    assert sorted(place.name for place in tmp_path.iterdir()) == ["first"], "nothing half-made is left"


def test_numpy_arrays_and_string_paths_are_taken(tmp_path, monkeypatch):
    _, parts = small_bank(tmp_path / "tensors")
    arrays = {
        kind: {encoder: {key: x.numpy() for key, x in splits.items()} for encoder, splits in parts[kind].items()}
        for kind in ("clip", "aux")
    }
    for x in arrays["clip"]["clip_a"].values():
        x.setflags(write=False)
    arrays["text"] = {"clip_a": np.asfortranarray(parts["text"]["clip_a"].numpy())}
    arrays["labels"] = {key: y.numpy().astype(np.int32) for key, y in parts["labels"].items()}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "arrays").mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = features.save_bank("arrays", **arrays, class_names=np.array(parts["class_names"]))
    assert made == tmp_path / "arrays"
    for split in ("train", "val", "test"):
        for encoder in ("clip_a", "aux_b"):
            first, second = (features.load(f"features:{name}", split, encoder) for name in ("tensors", "arrays"))
            assert torch.equal(first.x, second.x) and torch.equal(first.y, second.y)
    assert torch.equal(FeatureBank("arrays").text("clip_a"), parts["text"]["clip_a"])
    arrays["labels"]["test"] = np.array([object()] * 9)
    with pytest.raises(ValueError, match="labels, test: "):
        features.save_bank("objects", **arrays, class_names=parts["class_names"])


def test_empty_val_is_read_and_empty_test_refused(tmp_path):
    _, parts = small_bank(tmp_path / "first")

    def empty(split):
        cut = {key: {s: x[:0] if s == split else x for s, x in parts[key]["clip_a"].items()} for key in ("clip",)}
        labels = {s: y[:0] if s == split else y for s, y in parts["labels"].items()}
        return {"clip": {"clip_a": cut["clip"]}, "aux": {}, "labels": labels}

    path, _ = small_bank(tmp_path / "val", **empty("val"))
    assert features.load(f"features:{path}", "val", "clip_a").x.shape == (0, 8)
    with pytest.raises(ValueError, match="clip_a, test: no images to test on"):
        small_bank(tmp_path / "test", **empty("test"))


def test_a_bank_of_clip_features_alone_is_read(tmp_path):
    _, parts = small_bank(tmp_path / "first")
    made = features.save_bank(
        tmp_path / "bank", clip=parts["clip"], labels=parts["labels"], class_names=parts["class_names"]
    )
    bank = FeatureBank(made)
    assert bank.aux_encoders == () and not bank.has_text("clip_a") and not bank.has_text("aux_b")
    assert torch.equal(bank.rows("val", "clip_a")[0], parts["clip"]["clip_a"]["val"])
    with pytest.raises(ValueError, match=r"no file text.safetensors .* clip_a; encode prompts .*save_bank\(text=…\)"):
        features.load_text(f"features:{made}", "clip_a")
    assert FeatureBank(tmp_path / "first").has_text("clip_a")


@pytest.mark.parametrize("name", ["clip/b32", "clip_a/../../x", "clips/"])
def test_a_name_that_is_no_file_name_is_refused(tmp_path, name):
    _, parts = small_bank(tmp_path / "first")
    (tmp_path / "clip").mkdir()
    with pytest.raises(ValueError, match="that becomes a file's name, without '/'"):
        small_bank(tmp_path / "bank", clip={name: parts["clip"]["clip_a"]}, text={})
    assert sorted(place.name for place in tmp_path.iterdir()) == ["clip", "first"]


# ---- command line, real photos ------------------------------------------------------------------------------------


def test_the_command_line_extracts(own, capsys):
    assert main(["extract", own, "embedded:vit", "embedded:clip", "--splits", "val", "--device", "cpu"]) == 0
    assert f"{own}, val, embedded:clip: (12, 24)" in capsys.readouterr().out
    assert main(["extract", own, "embedded:vit", "--splits", "none"]) == 2
    assert "has no split 'none'" in capsys.readouterr().err


def test_the_command_line_lists_encoders(capsys):
    assert main(["encoders", "TIMM", "dinov3", "small"]) == 0
    assert "timm:vit_small_patch16_dinov3.lvd1689m" in capsys.readouterr().out.split()
    assert main(["encoders", "openai", "rn50"]) == 0
    shown = capsys.readouterr().out.split()
    assert "open_clip:RN50-quickgelu/openai" in shown and "open_clip:RN50/openai" not in shown
    assert main(["encoders", "embedded"]) == 0
    assert capsys.readouterr().out.split() == ["embedded:clip", "embedded:conv", "embedded:vit"]


def test_real_photos_under_real_architectures(tmp_path):
    """Random weights, but the real preprocessing, file layout and tensor sizes."""
    real = REAL / "caltech101_mini"
    if not real.exists():
        pytest.skip("the real photos are not on this machine")
    data_root = tmp_path / "data"
    data_root.mkdir()
    (data_root / "caltech-101").symlink_to(real)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOGIT_BIAS_DATA", str(data_root))
        names = ["open_clip:RN50-quickgelu/random", "timm:vit_tiny_patch16_224/random", "embedded:clip"]
        found = features.load_many("caltech101@1/1", "val", names, device="cpu", batch_size=12)
    assert [f.x.shape for f in found] == [(12, 1024), (12, 192), (12, 24)]
    assert found[0].y.tolist() == list(range(12)) and found[0].classnames[3] == "car side"
    assert all(torch.equal(f.y, found[0].y) for f in found)
