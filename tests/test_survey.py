"""The door: a folder of photographs is looked at, its splits are kept in a table, and the printed commands work."""

import re
import shlex
import shutil

import pytest
from conftest import ROOT
from small_models import photo, write_folder

from lib import __main__ as cli
from lib.features import datasets, sources, survey


@pytest.fixture
def messy(tmp_path):
    """Eight photos of each of three classes, among them a broken one, copies, and what is no photo."""
    root = write_folder(tmp_path / "my photos", images=8, splits=())
    (root / "class_0" / "broken.png").write_bytes((root / "class_0" / "image_000.png").read_bytes()[:90])
    shutil.copy(root / "class_0" / "image_000.png", root / "class_0" / "zz_copy.png")
    photo(8).save(root / "class_2" / "zz_other.bmp")  # class_1's first picture in another format
    (root / "notes.txt").touch()
    (root / "class_1" / "camera.heic").touch()
    photo(99).save(root / "loose.png")
    return root


def test_what_is_broken_doubled_and_unused_is_named(messy):
    labels, items = sources.folder_items(messy)
    looked = survey.look(messy, items)
    assert list(looked.broken) == ["class_0/broken.png"] and set(looked.sizes.values()) == {(40, 36)}
    kinds = {kind: [[image for _, image, _ in group] for group in found] for kind, found in looked.doubles().items()}
    assert kinds == {
        "within a split": [["class_0/image_000.png", "class_0/zz_copy.png"]],
        "under two classes": [["class_1/image_000.png", "class_2/zz_other.bmp"]],
    }
    assert looked.left_out == {"class_0/broken.png", "class_0/zz_copy.png", "class_2/zz_other.bmp"}
    assert survey.unused(messy, items) == {".txt": 1, ".heic": 1, "images elsewhere": 1}
    assert list(labels) == ["class_0", "class_1", "class_2"]


def test_a_picture_in_two_splits_stays_in_test(tmp_path):
    root = write_folder(tmp_path / "photos")
    shutil.copy(root / "test" / "class_1" / "image_000.png", root / "train" / "class_1" / "leak.png")
    _, items = sources.folder_items(root)
    looked = survey.look(root, items)
    assert list(looked.doubles()) == ["in two splits"]
    assert looked.left_out == {"train/class_1/leak.png"}


def test_the_table_is_read_back_as_the_same_splits(messy, tmp_path):
    listing = sources.folder(messy, {"class_0/broken.png"})
    table = survey.write_splits(tmp_path / "photos.csv", listing)
    read, plain = datasets.load(f"csv:{table}"), listing.splits
    assert read.classnames == listing.classnames
    for split in ("train", "val", "test"):
        images = read.images(split)
        names = [
            (str(images.root / name), label) for name, label in zip(images.ids, images.labels.tolist(), strict=True)
        ]
        assert names == [(str(messy / name), label) for name, label in plain[split]()]
    assert not any("broken" in image for part in plain.values() for image, _ in part())


def test_a_newcomer_gets_from_photos_to_predictions_by_the_printed_commands(
    messy, small_encoders, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    encoders = ["--clip", "embedded:clip", "--aux", "embedded:conv"]
    assert cli.main(["start", str(messy), *encoders]) == 0
    printed = capsys.readouterr().out
    assert "27 images of 3 classes; 'class_1' has 8, 'class_0' has 10" in printed
    assert "broken: 1" in printed and "the same picture more than once: 2" in printed
    assert "not used: 1 .txt" in printed or "not used: 1 .heic" in printed
    assert "train 12, val 6, test 6" in printed
    assert "zero-shot embedded:clip: " in printed
    command = shlex.split(re.search(r"^next: python -m lib (.*)$", printed, re.M)[1])
    assert command[:2] == ["fit", f"csv:{tmp_path / 'my photos.csv'}"] and command[2:6] == encoders
    assert cli.main([*command, "--method", "gda"]) == 0
    printed = capsys.readouterr().out
    assert (
        "GDA: fitted on 12 images of 3 classes\n" in printed
        and "chosen on 6 validation images" in printed
        and "of 6 test images" in printed
    )
    command = shlex.split(re.search(r"^next: python -m lib (.*)$", printed, re.M)[1].replace("IMAGES", f"'{messy}'"))
    assert cli.main(command) == 0
    assert "rows 28," in capsys.readouterr().out and (tmp_path / "predictions.csv").exists()


def test_an_edited_table_is_kept(messy, small_encoders, capsys):
    assert cli.main(["start", str(messy), "--clip", "embedded:clip", "--aux", "clip"]) == 0
    table = messy.with_name("my photos.csv")
    lines = table.read_text().splitlines(keepends=True)
    table.write_text("".join(lines[:1] + lines[2:]))
    edited = table.read_text()
    capsys.readouterr()
    assert cli.main(["start", str(messy), "--clip", "embedded:clip", "--aux", "clip"]) == 0
    printed = capsys.readouterr().out
    assert "is kept as it is" in printed and "train 11, val 6, test 6" in printed and table.read_text() == edited


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--method", "transclip"], "transclip cannot be saved to classify new images: under TransCLIP"),
        (["--shots", "few"], "--shots is a number or all, not 'few'"),
        (["--shots", "9"], "9 shots asked for"),
        (["--method", "amuu"], "no method 'amuu'; did you mean 'amu'"),
    ],
)
def test_what_cannot_be_fitted_or_saved_is_refused(options, words, small_encoders, tmp_path, capsys):
    photos = write_folder(tmp_path / "photos")
    arguments = ["fit", f"folder:{photos}", "--clip", "embedded:clip", "--aux", "embedded:conv"]
    assert cli.main([*arguments, "--to", str(tmp_path / "m"), *options]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "m").exists()


def test_a_folder_without_classes_says_how_it_should_look(tmp_path, capsys):
    photo(1).save(tmp_path / "a.png")
    assert cli.main(["start", str(tmp_path)]) == 2
    assert "the images of a class lie in a sub-folder of its name" in capsys.readouterr().err


def test_the_readme_works_as_printed(tmp_path, monkeypatch, capsys):
    section = (ROOT / "README.md").read_text().split("## Your own images\n")[1].split("\n## ")[0]
    assert len(section.strip().splitlines()) < 15
    commands = re.findall(r"^    .venv/bin/python -m lib (.*)$", section, re.M)
    assert [command.split()[0] for command in commands] == ["start", "fit", "predict"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOGIT_BIAS_CACHE", str(tmp_path / "cache"))
    write_folder(tmp_path / "photos", images=8, splits=())
    for command in commands:
        assert cli.main(shlex.split(command)) == 0, command
    assert f"next: python -m lib {commands[1].replace(' --method amu --shots all', '')}" in capsys.readouterr().out
    assert len((tmp_path / "predictions.csv").read_text().splitlines()) == 25
