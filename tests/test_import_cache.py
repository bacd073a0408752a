"""Other people's caches become banks, or say what is wrong with them and what a bank of them lacks."""

import json
import subprocess
import sys

import import_cache
import numpy as np
import pytest
import torch
from conftest import REAL, ROOT
from safetensors.torch import load_file
from torch.nn.functional import normalize

from lib import features


def write_tip_adapter(folder, shots=2, classes=4, dim=6, extra=""):
    folder.mkdir(parents=True, exist_ok=True)
    labels = torch.arange(classes).repeat_interleave(shots)
    keys = normalize(torch.randn(len(labels), dim), dim=1).T.half()
    torch.save(keys, folder / f"keys_{shots}shots.pt")
    torch.save(torch.nn.functional.one_hot(labels, classes).half(), folder / f"values_{shots}shots.pt")
    for split in ("val", "test"):
        torch.save(torch.randn(9, dim).half(), folder / f"{split}_f.pt")
        torch.save(torch.arange(9) % classes, folder / f"{split}_l.pt")
    return keys


def test_a_tip_adapter_folder_becomes_a_bank(tmp_path):
    keys = write_tip_adapter(tmp_path / "cache-folder")
    names = ["a", "b", "c", "d"]
    made = import_cache.import_tip_adapter(
        tmp_path / "cache-folder", tmp_path / "bank", shots=2, class_names=names, text=torch.randn(4, 6)
    )
    found = features.load(f"features:{made}", "train", "clip")
    assert torch.equal(found.x, keys.T.float()) and found.y.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert "train_shot_index" not in load_file(made / "labels.safetensors")
    assert features.load_text(f"features:{made}", "clip").x.shape == (4, 6)


def test_a_tip_adapter_folder_is_not_believed(tmp_path):
    source, names = tmp_path / "source", ["a", "b", "c", "d"]

    def importing(message):
        with pytest.raises(ValueError, match=message):
            import_cache.import_tip_adapter(source, tmp_path / "bank", shots=2, class_names=names)

    write_tip_adapter(source)
    importing_of = source / "keys_2shots.pt"
    torch.save(torch.randn(9, 8), importing_of)
    importing(r"keys_2shots.pt has 9 dimensions, test_f.pt has 6")
    torch.save(torch.randn(6, 7), importing_of)
    importing(r"keys are \(6, 7\), values \(8, 4\)")
    write_tip_adapter(source)
    torch.save(torch.full((8, 4), 0.25), source / "values_2shots.pt")
    importing("is not one-hot")
    values = torch.eye(4)[[0, 0, 0, 1, 2, 2, 3, 3]]
    torch.save(values, source / "values_2shots.pt")
    importing("2 shots by name, but class 0 has 3 rows")
    torch.save({"keys": values}, source / "values_2shots.pt")
    importing("holds a dict, expected one tensor")
    (source / "values_2shots.pt").write_bytes(b"cos\nsystem\n(S'touch run_by_the_pickle'\ntR.")
    importing(r"values_2shots.pt is no plain tensor file and was not run")
    (source / "values_2shots.pt").unlink()
    importing(r"no file .*values_2shots.pt")
    assert not (tmp_path / "bank").exists()


def test_amu_tunings_folder_becomes_a_bank(tmp_path):
    source = tmp_path / "amu"
    source.mkdir()
    y, test = torch.arange(3).repeat_interleave(2), torch.arange(5) % 3
    for name, dim in (("clip", 6), ("aux", 11)):
        torch.save(torch.randn(5, dim), source / f"{name}_test_f.pt")
        torch.save(test, source / f"{name}_test_l.pt")
    torch.save(torch.randn(6, 11), source / "aux_feature_2shots.pt")
    torch.save(y, source / "aux_labels_2shots.pt")
    names = ["a", "b", "c"]
    made = import_cache.import_amu(source, tmp_path / "bank", shots=2, class_names=names)
    assert features.load(f"features:{made}", "train", "aux").x.shape == (6, 11)
    with pytest.raises(ValueError, match="has no split 'train'; it has test"):
        features.load(f"features:{made}", "train", "clip")
    keys = write_tip_adapter(tmp_path / "tip", classes=3)
    made = import_cache.import_amu(
        source, tmp_path / "whole", shots=2, class_names=names, clip_keys=tmp_path / "tip" / "keys_2shots.pt"
    )
    assert torch.equal(features.load(f"features:{made}", "train", "clip").x, keys.T.float())
    torch.save(test.flip(0), source / "aux_test_l.pt")
    with pytest.raises(ValueError, match=r"clip_test_l.pt and aux_test_l.pt hold different labels"):
        import_cache.import_amu(source, tmp_path / "third", shots=2, class_names=names)


def test_npz_files_become_a_bank(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {}
    for split, n in (("train", 6), ("val", 3), ("test", 9)):
        arrays[f"{split}_features"] = rng.normal(size=(n, 4)).astype(np.float32)
        arrays[f"{split}_labels"] = np.arange(n) % 3
    np.savez(tmp_path / "clip.npz", **arrays, text=rng.normal(size=(3, 4)), class_names=np.array(["x", "y", "z"]))
    np.savez(
        tmp_path / "aux.npz", X_train=rng.normal(size=(6, 7)), X_test=rng.normal(size=(9, 7)), y_test=np.arange(9) % 3
    )
    made = import_cache.import_npz(tmp_path / "clip.npz", tmp_path / "bank", aux=tmp_path / "aux.npz")
    found = features.load(f"features:{made}", "test", "clip")
    assert torch.equal(found.x, torch.from_numpy(arrays["test_features"])) and found.classnames == ("x", "y", "z")
    assert features.load(f"features:{made}", "test", "aux").x.shape == (9, 7)
    assert features.load_text(f"features:{made}", "clip").x.dtype == torch.float32
    np.savez(tmp_path / "aux.npz", X_test=rng.normal(size=(9, 7)), y_test=np.zeros(9))
    with pytest.raises(ValueError, match=r"labels of test differ between clip.npz and aux.npz"):
        import_cache.import_npz(tmp_path / "clip.npz", tmp_path / "other", aux=tmp_path / "aux.npz")
    np.savez(tmp_path / "odd.npz", pixels=np.zeros(3))
    with pytest.raises(ValueError, match="no arrays such as train_features; it has pixels"):
        import_cache.import_npz(tmp_path / "odd.npz", tmp_path / "other")
    np.savez(tmp_path / "pickled.npz", train_features=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="cannot be read as npz"):
        import_cache.import_npz(tmp_path / "pickled.npz", tmp_path / "other")


def test_the_real_tip_adapter_folder_becomes_a_bank(tmp_path):
    source = REAL / "tip_adapter_cache"
    if not source.exists():
        pytest.skip("the real cache folder is not on this machine")
    names = [f"texture {i}" for i in range(47)]
    made = f"features:{import_cache.import_tip_adapter(source, tmp_path / 'bank', shots=1, class_names=names)}"
    support = features.load(made, "train", "clip")
    promised = json.loads((source / "meta.json").read_text())["expected"]["K1"]["nearest_key"]
    for split in ("test", "val"):
        found = features.load(made, split, "clip")
        nearest = support.y[(normalize(found.x, dim=1) @ normalize(support.x, dim=1).T).argmax(dim=1)]
        assert 100 * (nearest == found.y).double().mean().item() == pytest.approx(promised[split], abs=0.005)
    with pytest.raises(ValueError, match=r"no file text.safetensors"):
        features.load_text(made, "clip")


# ---- what is missing, and the command line ------------------------------------------------------------------------


@pytest.fixture
def tip(tmp_path):
    """A Tip-Adapter folder of 4 classes and the file of their names."""
    write_tip_adapter(tmp_path / "tip")
    (tmp_path / "names.txt").write_text("a\nb\nc\nd\n\n")
    return ["tip-adapter", str(tmp_path / "tip"), str(tmp_path / "bank"), "--shots", "2"]


def test_the_command_says_what_a_bank_lacks_and_how_it_is_made(tip, tmp_path):
    command = [sys.executable, str(ROOT / "data" / "import_cache.py"), *tip, "--classes", str(tmp_path / "names.txt")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"features:{tmp_path / 'bank'}\n"), done.stderr
    text, aux = done.stderr.splitlines()
    assert "no text.safetensors" in text and "zero-shot" in text and "--text FILE" in text
    assert "no aux_NAME.safetensors" in aux and "aux=clip" in aux
    bank = features.FeatureBank(tmp_path / "bank")
    assert bank.aux_encoders == () and not bank.has_text("clip")
    assert len(features.load(f"features:{tmp_path / 'bank'}", "test", "clip").y) == 9
    with pytest.raises(ValueError, match=r"no file text.safetensors .*--text FILE"):
        features.load_text(f"features:{tmp_path / 'bank'}", "clip")


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("ending", ["pt", "npy"])
def test_class_texts_are_imported_whichever_way_they_lie(tip, tmp_path, capsys, turned, ending):
    text = torch.randn(4, 6)
    stored = text.T.contiguous() if turned else text
    if ending == "pt":
        torch.save(stored, tmp_path / "text.pt")
    else:
        np.save(tmp_path / "text.npy", stored.numpy())
    options = ["--classes", str(tmp_path / "names.txt"), "--text", str(tmp_path / f"text.{ending}")]
    assert import_cache.main([*tip, *options]) == 0
    assert "text" not in capsys.readouterr().err
    assert torch.equal(features.FeatureBank(tmp_path / "bank").text("clip"), text)


def test_the_command_refuses_in_one_line(tip, tmp_path, capsys):
    def refused(message, *options):
        assert import_cache.main([*tip, *options]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and message in error, error
        assert not (tmp_path / "bank").exists()

    names = ["--classes", str(tmp_path / "names.txt")]
    refused("give --classes FILE")
    refused("cannot read the class names in /nope.txt", "--classes", "/nope.txt")
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    refused("latin.txt", "--classes", str(tmp_path / "latin.txt"))
    (tmp_path / "five.txt").write_text("a\nb\nc\nd\nextra\n")
    refused("5 class names are given", "--classes", str(tmp_path / "five.txt"))
    (tmp_path / "twice.txt").write_text("a\nb\na\nd\n")
    refused("'a' is there more than once", "--classes", str(tmp_path / "twice.txt"))
    refused("no file /nope.pt", *names, "--text", "/nope.pt")
    torch.save(torch.randn(4, 5), tmp_path / "text.pt")
    refused("text features have 5 dimensions, clip has 6", *names, "--text", str(tmp_path / "text.pt"))
    torch.save(torch.arange(9).float() % 4, tmp_path / "tip" / "test_l.pt")
    refused("test_l.pt holds torch.float32", *names)


def test_too_many_names_are_refused_for_every_kind(tmp_path):
    source = tmp_path / "amu"
    source.mkdir()
    for name in ("clip", "aux"):
        torch.save(torch.randn(5, 6), source / f"{name}_test_f.pt")
        torch.save(torch.arange(5) % 3, source / f"{name}_test_l.pt")
    torch.save(torch.randn(3, 6), source / "aux_feature_1shots.pt")
    torch.save(torch.arange(3), source / "aux_labels_1shots.pt")
    np.savez(tmp_path / "c.npz", test_features=np.ones((3, 2), dtype=np.float32), test_labels=np.arange(3))
    names = ["a", "b", "c", "d"]
    with pytest.raises(ValueError, match=r"4 class names are given, .*amu has 3 classes"):
        import_cache.import_amu(source, tmp_path / "bank", shots=1, class_names=names)
    with pytest.raises(ValueError, match=r"4 class names are given, .*c.npz has 3 classes"):
        import_cache.import_npz(tmp_path / "c.npz", tmp_path / "bank", class_names=names)
    np.savez(tmp_path / "half.npz", test_features=np.ones((3, 2), dtype=np.float32), test_labels=np.array([0, 0.5, 1]))
    with pytest.raises(ValueError, match="labels of test are not whole numbers"):
        import_cache.import_npz(tmp_path / "half.npz", tmp_path / "bank")
    made = import_cache.import_amu(source, tmp_path / "bank", shots=1, class_names=names[:3])
    lines = import_cache.lacking(made)
    assert any("clip has no train features; --clip-keys FILE adds train" in line for line in lines)
    assert any("no val split" in line for line in lines)
