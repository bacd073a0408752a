"""Data sets: names, layouts on disk, splits, prompts, few-shot draws, and what a decoder makes of odd images."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import world
from conftest import REAL, ROOT
from PIL import Image
from PIL import features as pillow
from small_models import photo, write_folder

from lib.__main__ import main
from lib.features import datasets, images, sources

GENERATED = [name for name, card in sources.cards().items() if card["family"] == "generated"]
TEN = [name for name, card in sources.cards().items() if card["family"] == "benchmark"]
# Class sizes of CoOp's EuroSAT split, and the rows that shots 1 of seed 1 took of its train and its val
# (indices/eurosat/shot_1-seed_1.json of linzhiqiu/cross_modal_adaptation, MIT).
EUROSAT_TRAIN = [1500, 1500, 1500, 1250, 1250, 1000, 1250, 1500, 1250, 1500]
DRAWN_TRAIN = [275, 2665, 3129, 5022, 5991, 7507, 8920, 10217, 11527, 12429]
DRAWN_VAL = [96, 1099, 1229, 2257, 2727, 2999, 3421, 3702, 4656, 5256]
DRAWN_4_SEED_2 = [115, 187, 173, 739, 1846, 2871, 2131, 2015, 4240, 3434, 4242, 3073]


def save(path: Path, seed: int, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    photo(seed, (12, 10)).save(path, **options)


def write_coop(root: Path, name: str, each: int = 3) -> dict:
    """Write a benchmark in the layout of CoOp's instructions, two classes of it, with its split file."""
    card = sources.cards()[name]
    classes = [("a_first_class", 0), ("second", 1)]
    split, number = {}, 0
    for part in ("train", "val", "test"):
        split[part] = []
        for shot in range(each):
            for folder, label in classes:
                path = f"{folder}/{part}_{shot}.jpg"
                save(root / card["images"][0] / path, number)
                split[part].append([path, label, folder])
                number += 1
    (root / Path(card["images"][0]) / ".." / card["split"]).resolve().write_text(json.dumps(split))
    if len(Path(card["images"][0]).parts) == 1:  # stanford_cars: paths are relative to the folder of the split file
        (root / card["split"]).rename(root / card["images"][0] / card["split"])
    return split


# ---- names --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("shape", "unknown data set 'shape'; did you mean 'shapes'.* known: .*features:PATH"),
        ("Caltech101", "did you mean 'caltech101'"),
        ("features:somewhere", "holds no images; features.load reads it"),
        ("folder:/nowhere/at/all", "no folder /nowhere/at/all"),
        ("csv:/nowhere/at/all.csv", "no file /nowhere/at/all.csv"),
        ("folder:", "unknown data set"),
        ("shapes-sketch@4/1", "no train and val to draw from, only test"),
        ("shapes@64/1", "64 shots asked for, but class '[a-z]+ [a-z]+' has 32 images"),
    ],
)
def test_wrong_names_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        data = datasets.load(name)
        data.images("train")


def test_test_only_sets_are_not_learned_from():
    with pytest.raises(ValueError, match=r"can be tested on \(test='shapes-v2'\), not learned from"):
        datasets.load("shapes-v2").images("train")


# ---- generated sets -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GENERATED)
def test_a_generated_set_is_what_the_world_renders(name):
    data = datasets.load(name)
    for split in data.splits:
        rendered = world.digits(split) if name == "digits" else world.render(name, split)
        images_of = data.images(split)
        assert data.classnames == rendered.classnames
        assert torch.equal(images_of.labels, rendered.labels), "row i is the i-th image of the generator"
        for row in range(0, len(images_of), 50):
            assert np.array_equal(np.asarray(images_of[row]), rendered.images[row].permute(1, 2, 0).numpy())
    with pytest.raises(ValueError, match="has no split 'training'"):
        data.images("training")
    assert data.aux[0] == "embedded:other-classes" and len(data.aux) == 5
    assert data.templates == (world.DIGIT_TEMPLATES if name == "digits" else world.TEMPLATES)


def test_what_class_folders_cannot_hold_lies_beside_them():
    split = datasets.load("shapes-spurious").images("test")
    table = pd.read_csv(split.root / "factors.csv").set_index("path").loc[list(split.ids)]
    attributes = world.render("shapes-spurious", "test").attributes
    assert table["group"].tolist() == attributes["group"].tolist()
    assert table["colour"].tolist() == [world.COLOURS[i] for i in attributes["colour"]]
    corrupted = datasets.load("shapes-corrupted-3").images("test").root
    assert set(pd.read_csv(corrupted / "factors.csv")["corruption"]) == set(world.CORRUPTIONS)
    root = datasets.load("shapes").images("val").root
    captions = pd.read_csv(root / "captions.csv")
    rendered, texts = world.render_captioned(8, seed=1)
    assert captions["caption"].tolist() == texts
    first = np.asarray(images.decode(root / captions["path"][0]))
    assert np.array_equal(first, rendered[0].permute(1, 2, 0).numpy())


def test_a_generated_set_has_the_same_manifest_wherever_and_whenever_it_was_made(tmp_path):
    here, there = datasets.load("digits").images("val"), datasets.load("digits", root=tmp_path).images("val")
    assert here.root != there.root and here.manifest == there.manifest
    os.utime(there.root / there.ids[0], (1, 1))
    assert datasets.load("digits", root=tmp_path).images("val").manifest == here.manifest
    pixels = np.asarray(there[0]).copy()
    pixels[0, 0] ^= 1
    Image.fromarray(pixels).save(there.root / there.ids[0])
    assert datasets.load("digits", root=tmp_path).images("val").manifest != here.manifest


def test_the_manifest_follows_pixels_labels_ids_and_the_version_of_the_generator():
    split = datasets.load("digits").images("val")
    labels = split.labels.clone()
    labels[0] = (labels[0] + 1) % 10
    others = [
        images.ImageSplit(labels, split.ids, split.root, split.exact),
        images.ImageSplit(split.labels, split.ids[::-1], split.root, split.exact),
        images.ImageSplit(split.labels, split.ids, split.root, "another version"),
        images.ImageSplit(split.labels, split.ids, split.root),
    ]
    assert len({split.manifest, *(other.manifest for other in others)}) == 5
    assert split.exact in split.root.parts, "another version lies in another folder"
    assert datasets.load("digits").images("val").manifest == split.manifest


def render_command(root: Path) -> list[str]:
    return [sys.executable, str(ROOT / "data/embedded/render.py"), "digits", "--root", str(root)]


def test_a_killed_making_leaves_nothing_that_is_taken_for_a_set(tmp_path):
    process = subprocess.Popen(render_command(tmp_path), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("*/.digits.part/*/*/*.png")) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    process.wait()
    place = tmp_path / sources.cards()["digits"]["version"]
    assert list(place.glob(".digits.part/*/*/*.png")) and not (place / "digits").exists()
    assert [len(datasets.load("digits", root=tmp_path).images(split)) for split in images.SPLITS] == [600, 200, 997]
    assert not (place / ".digits.part").exists()


def test_two_processes_make_a_set_once(tmp_path):
    processes = [subprocess.Popen(render_command(tmp_path), stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert len({process.communicate()[0] for process in processes}) == 1
    assert [process.returncode for process in processes] == [0, 0]
    folder = tmp_path / sources.cards()["digits"]["version"] / "digits"
    assert len(list(folder.rglob("*.png"))) == 1797 and not folder.with_name(".digits.part").exists()
    changed = {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")}
    assert max(changed.values()) <= folder.stat().st_ctime_ns, "nothing was written after it got its name"


def test_a_set_that_cannot_be_made_says_why(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(
        ValueError, match=r"digits could not be made: .*file.*; try python data/embedded/render.py digits"
    ):
        datasets.load("digits", root=tmp_path / "file").images("test")


def test_a_generated_set_that_lost_a_class_or_cannot_be_decoded_is_named(tmp_path):
    made = datasets.load("digits").images("val").root
    shutil.copytree(made, tmp_path / made.parent.name / "digits")
    split = datasets.load("digits", root=tmp_path).images("val")
    (split.root / split.ids[3]).write_bytes(b"no image")
    with pytest.raises(ValueError, match=f"{split.ids[3]} cannot be decoded"):
        _ = split.manifest
    (split.root / "val" / "nine").rename(split.root / "val" / "ten")
    with pytest.raises(ValueError, match=r"val lacks 1 of 10 class folders, first nine"):
        datasets.load("digits", root=tmp_path).images("val")


# ---- benchmarks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in TEN if name != "fgvc_aircraft"])
def test_a_benchmark_is_read_in_coops_layout(name, tmp_path):
    split = write_coop(tmp_path, name)
    data = datasets.load(name, root=tmp_path)
    assert data.classnames == ("a first class", "second")
    assert data.splits == ("train", "val", "test")
    assert data.templates[0].count("{}") == 1 and "split_zhou" in data.source and "Tip-Adapter" in data.source
    found = data.images("test")
    assert found.ids == tuple(path for path, _, _ in split["test"])
    assert found.labels.tolist() == [label for _, label, _ in split["test"]]
    assert found[0].size == (12, 10) and len(found.manifest) == 64


@pytest.mark.parametrize("name", [name for name in sources.cards() if name not in GENERATED])
def test_a_missing_benchmark_says_what_to_get_and_where(name, tmp_path):
    with pytest.raises(ValueError, match=f"{name}: no .* in .*get it.*https://") as caught:
        datasets.load(name, root=tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_split_file_is_named(tmp_path):
    write_coop(tmp_path, "ucf101")
    (tmp_path / "ucf101" / "split_zhou_UCF101.json").unlink()
    need = r"ucf101: no ucf101/split_zhou_UCF101.json in .*; get it with split_zhou_UCF101.json from https://"
    with pytest.raises(ValueError, match=f"{need}.*; numbers on another division do not compare"):
        datasets.load("ucf101", root=tmp_path)
    save(tmp_path / "stanford_cars/cars_train/00001.jpg", 1)
    with pytest.raises(ValueError, match=r"stanford_cars: no stanford_cars/split_zhou_StanfordCars.json in"):
        datasets.load("stanford_cars", root=tmp_path)


def test_missing_images_of_a_split_are_counted_before_any_work(tmp_path):
    write_coop(tmp_path, "dtd")
    (tmp_path / "dtd/images/second/test_1.jpg").unlink()
    with pytest.raises(ValueError, match=r"1 of 6 images are not in .*dtd/images, first second/test_1.jpg"):
        _ = datasets.load("dtd", root=tmp_path).images("test").manifest


def test_a_split_file_that_contradicts_itself_is_refused(tmp_path):
    write_coop(tmp_path, "dtd")
    path = tmp_path / "dtd" / "split_zhou_DescribableTextures.json"
    split = json.loads(path.read_text())
    split["test"][0][2] = "other"
    path.write_text(json.dumps(split))
    with pytest.raises(ValueError, match="label 0 is both 'a_first_class' and 'other'"):
        datasets.load("dtd", root=tmp_path)
    path.write_text(json.dumps({"train": [["a", 0, "a"], ["b", 2, "b"]]}))
    with pytest.raises(ValueError, match="labels are not 0 to 1: 0 to 2"):
        datasets.load("dtd", root=tmp_path)


def test_aircraft_is_read_from_its_official_lists(tmp_path):
    folder = tmp_path / "fgvc_aircraft"
    variants = ["737-200", "A340 600"]
    for number, part in enumerate(("train", "val", "test")):
        rows = [f"{number}{label} {variant}" for label, variant in enumerate(variants)]
        for row in rows:
            save(folder / "images" / f"{row.split()[0]}.jpg", int(row.split()[0]))
        (folder / f"images_variant_{part}.txt").write_text("\n".join(rows) + "\n")
    with pytest.raises(ValueError, match=r"no variants.txt"):
        datasets.load("fgvc_aircraft", root=tmp_path)
    (folder / "variants.txt").write_text("\n".join(variants) + "\n")
    data = datasets.load("fgvc_aircraft", root=tmp_path)
    assert data.classnames == tuple(variants)
    assert data.images("val").ids == ("10.jpg", "11.jpg") and data.images("val").labels.tolist() == [0, 1]


def test_class_folders_do_not_serve_where_the_split_file_is_missing(tmp_path):
    for name in ("eurosat", "caltech101", "food101", "dtd"):
        for number in range(10):
            save(tmp_path / sources.cards()[name]["images"][0] / "River" / f"{number}.jpg", number)
        with pytest.raises(ValueError, match=f"no .*/{sources.cards()[name]['split']} in"):
            datasets.load(name, root=tmp_path)


# ---- ImageNet -----------------------------------------------------------------------------------------------


def blank(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def test_imagenet_keeps_its_validation_images_for_the_test(tmp_path):
    codes = sources._wordnet_ids()
    assert len(set(codes)) == 1000 and codes == tuple(sorted(codes))
    place = tmp_path / "imagenet/images"
    for code in codes:
        blank(place / f"val/{code}/ILSVRC2012_val.JPEG")
        for i in range(18 if code == codes[3] else 17):
            blank(place / f"train/{code}/{code}_{i:02d}.JPEG")
    data = datasets.load("imagenet", root=tmp_path)
    assert data.classnames[0] == "tench" and data.codes == codes and len(data.templates) == 7
    assert data.templates[0] == "itap of a {}."
    train, val, test = (data.images(split) for split in ("train", "val", "test"))
    assert (len(train), len(val), len(test)) == (1001, 16_000, 1000)
    assert not set(train.ids) & set(val.ids)
    assert "val is the last 16 images of each training class" in data.source
    (tmp_path / "imagenet/classnames.txt").write_text("\n".join(f"{code} thing {i}" for i, code in enumerate(codes)))
    assert datasets.load("imagenet", root=tmp_path).classnames[999] == "thing 999"
    (place / f"val/{codes[0]}/ILSVRC2012_val.JPEG").unlink()
    with pytest.raises(ValueError, match=f"no images in .*{codes[0]}"):
        datasets.load("imagenet", root=tmp_path).images("test")
    (place / f"val/{codes[0]}").rmdir()
    with pytest.raises(ValueError, match=r"imagenet has 1000 classes, .*val has 999 folders"):
        datasets.load("imagenet", root=tmp_path)


def test_the_variants_of_imagenet_have_the_same_names(tmp_path):
    codes = sources._wordnet_ids()
    for index, code in enumerate(codes):
        blank(tmp_path / f"imagenetv2/imagenetv2-matched-frequency-format-val/{index}/a.jpeg")
        blank(tmp_path / f"imagenet-sketch/images/{code}/a.JPEG")
        if index % 5 == 0:
            blank(tmp_path / f"imagenet-adversarial/imagenet-a/{code}/a.jpg")
            blank(tmp_path / f"imagenet-rendition/imagenet-r/{code}/a.jpg")
    (tmp_path / "imagenet-rendition/imagenet-r/README.txt").write_text("not a class")
    loaded = {
        name: datasets.load(name, root=tmp_path)
        for name in ("imagenetv2", "imagenet-sketch", "imagenet-a", "imagenet-r")
    }
    assert loaded["imagenetv2"].classnames == loaded["imagenet-sketch"].classnames
    assert loaded["imagenetv2"].images("test").ids[10] == "10/a.jpeg"
    assert loaded["imagenetv2"].images("test").labels[10] == 10
    assert loaded["imagenet-a"].codes == loaded["imagenet-r"].codes == codes[::5]
    assert loaded["imagenet-a"].classnames == loaded["imagenet-sketch"].classnames[::5]
    assert all(data.splits == ("test",) for data in loaded.values())
    blank(tmp_path / "imagenet-rendition/imagenet-r/n99999999/a.jpg")
    with pytest.raises(ValueError, match=r"imagenet-r has 200 classes, .* has 201 folders"):
        datasets.load("imagenet-r", root=tmp_path)


# ---- one's own images -----------------------------------------------------------------------------------------


def test_a_folder_with_splits_or_without(tmp_path):
    data = datasets.load(f"folder:{write_folder(tmp_path / 'three')}")
    assert data.classnames == ("class 0", "class 1", "class 2") and data.splits == ("train", "val", "test")
    assert data.images("val").ids[0] == "val/class_0/image_000.png" and data.templates == ("a photo of a {}.",)
    two = datasets.load(f"folder:{write_folder(tmp_path / 'two', images=5, splits=('train', 'test'))}")
    assert [len(two.images(split)) for split in two.splits] == [12, 3, 15]
    assert "val is a fifth" in two.source
    none = datasets.load(f"folder:{write_folder(tmp_path / 'none', images=10, splits=())}")
    assert [len(none.images(split)) for split in none.splits] == [15, 6, 9]
    only = datasets.load(f"folder:{write_folder(tmp_path / 'only', splits=('test',))}")
    assert only.splits == ("test",)


def test_a_folder_that_cannot_be_right_is_refused(tmp_path):
    root = write_folder(tmp_path / "own")
    (root / "test/class_9").mkdir()
    with pytest.raises(ValueError, match="test has class 'class_9', train has not"):
        datasets.load(f"folder:{root}")
    (root / "train/class_9").mkdir()
    (root / "train/class_9/notes.txt").write_text("no image")
    with pytest.raises(ValueError, match=r"no images in .*train/class_9"):
        datasets.load(f"folder:{root}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no class folders"):
        datasets.load(f"folder:{tmp_path / 'empty'}")
    with pytest.raises(ValueError, match="class 'class 0' has 2 images, too few to divide into 3 parts"):
        datasets.load(f"folder:{write_folder(tmp_path / 'few', images=2, splits=())}")


def test_hidden_and_foreign_files_are_not_images(tmp_path):
    root = write_folder(tmp_path / "own")
    for name in (".DS_Store", "._image_000.png", "Thumbs.db", "readme.txt"):
        (root / "train/class_0" / name).write_text("x")
    (root / "train/.ipynb_checkpoints").mkdir()
    assert len(datasets.load(f"folder:{root}").images("train")) == 12


def test_folders_called_like_validation_are_the_validation_images(tmp_path):
    for name in ("valid", "validation", "dev"):
        root = write_folder(tmp_path / name, splits=("train", name, "test"))
        data = datasets.load(f"folder:{root}")
        assert data.splits == ("train", "val", "test") and len(data.images("train")) == 12
        assert data.images("val").ids[0] == f"{name}/class_0/image_000.png"
    write_folder(tmp_path / "valid", splits=("val",))
    with pytest.raises(ValueError, match="has both val and valid"):
        datasets.load(f"folder:{tmp_path / 'valid'}")
    for number in range(4):
        save(tmp_path / "classes" / "dev" / f"{number}.png", number)
        save(tmp_path / "classes" / "ops" / f"{number}.png", 10 + number)
    assert datasets.load(f"folder:{tmp_path / 'classes'}").classnames == ("dev", "ops")


def test_class_folders_that_become_one_name_are_refused(tmp_path):
    for place in ("dog a", "dog_a"):
        save(tmp_path / "train" / place / "1.png", len(place))
        save(tmp_path / "test" / place / "2.png", len(place))
    with pytest.raises(ValueError, match="'dog a' and 'dog_a' are two classes of one name, 'dog a'"):
        datasets.load(f"folder:{tmp_path}")


def test_a_folder_lists_jfif_and_avif(tmp_path):
    endings = [ending for ending in ("jfif", "avif") if ending != "avif" or pillow.check("avif")]
    for split in ("train", "val", "test"):
        for number, ending in enumerate(endings):
            save(tmp_path / split / "cat" / f"{number}.{ending}", number, format="AVIF" if ending == "avif" else "JPEG")
    split = datasets.load(f"folder:{tmp_path}").images("test")
    assert [Path(name).suffix for name in split.ids] == [f".{ending}" for ending in endings]
    assert all(split[row].size == (12, 10) for row in range(len(split)))
    if "avif" not in endings:
        pytest.skip("this Pillow cannot write AVIF; jfif was checked")


def test_a_link_that_leads_nowhere_is_named(tmp_path, capsys):
    root = write_folder(tmp_path / "own")
    (root / "test/class_1/loop.png").symlink_to("loop.png")
    (root / "test/class_9").symlink_to("class_9")
    assert main(["datasets", f"folder:{root}"]) == 2
    assert "1 of 13 images are not in" in (printed := capsys.readouterr().err) and "class_1/loop.png" in printed
    assert main(["datasets", write_csv(tmp_path / "l.csv", ["gone.png,cat,train", "b.png,cat,val"])]) == 2
    assert "1 of 1 images are not in" in (printed := capsys.readouterr().err) and "gone.png" in printed


def write_csv(path: Path, rows: list[str], header: str = "path,label,split") -> str:
    path.write_text("\n".join([header, *rows]), encoding="utf-8-sig")
    return f"csv:{path}"


def test_a_csv_lists_images_beside_it(tmp_path):
    rows = [
        f"img/{split}_{label}.png,{label},{split}" for split in ("train", "val", "test") for label in ("big_cat", "dog")
    ]
    for row in rows:
        save(tmp_path / row.split(",")[0], len(row))
    data = datasets.load(write_csv(tmp_path / "list.csv", rows))
    assert data.classnames == ("big cat", "dog") and data.splits == ("train", "val", "test")
    assert data.images("test").ids == ("img/test_big_cat.png", "img/test_dog.png")
    assert data.images("test")[1].size == (12, 10)
    numbered = datasets.load(write_csv(tmp_path / "n.csv", [f"a{i}.png,{i},test" for i in (10, 2, 1)]))
    assert numbered.classnames == ("1", "2", "10")
    squared = datasets.load(write_csv(tmp_path / "s.csv", [f"{i}.png,{i},test" for i in ("²", "3")]))
    assert squared.classnames == ("3", "²")
    noted = datasets.load(write_csv(tmp_path / "c.csv", ["a.png,cat,test,blurred"], "path,label,split,note"))
    assert noted.classnames == ("cat",), "further columns have a name"


@pytest.mark.parametrize(
    ("rows", "header", "message"),
    [
        (
            ["a.png,cat,train"],
            "file,label,split",
            "has the columns file, label, split, but path, label, split are needed",
        ),
        (["a.png,cat,train", "b.png,,test"], "path,label,split", "line 3: path 'b.png', label ''"),
        (["a.png,cat,training"], "path,label,split", "line 2: .* split 'training'"),
        (
            ["a.png,cat,train", "a.png,cat,test"],
            "path,label,split",
            r"a.png is in train as 'cat' \(line 2\) and in test as 'cat' \(line 3\)",
        ),
        (
            ["a.png,cat,train", "./a.png,dog,train"],
            "path,label,split",
            r"'cat' \(line 2\) and in train as 'dog' \(line 3\)",
        ),
        (["a.png,cat,train", "a.png,cat,train"], "path,label,split", r"\(line 2\) and in train as 'cat' \(line 3\)"),
        (
            ["a.png,cat,train", "b.png,dog,test,0.9"],
            "path,label,split",
            "line 3: 3 fields are expected, '0.9' is one more",
        ),
        (["a.png,big cat,train", "b.png,big_cat,test"], "path,label,split", "'big cat' and 'big_cat' are two classes"),
        ([], "path,label,split", "list.csv lists no images"),
        (["a.png,cat"], "path,label,split", "line 2"),
    ],
)
def test_a_csv_that_cannot_be_right_is_refused(rows, header, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        datasets.load(write_csv(tmp_path / "list.csv", rows, header))


def test_a_csv_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "latin.csv").write_bytes("path,label,split\na.png,café,train\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.csv is not a CSV file in UTF-8: .*0xe9"):
        datasets.load(f"csv:{tmp_path / 'latin.csv'}")


# ---- few-shot draws ---------------------------------------------------------------------------------------------


def test_the_draw_is_the_fields_own():
    train = torch.arange(10).repeat_interleave(torch.tensor(EUROSAT_TRAIN))
    val = torch.arange(10).repeat_interleave(torch.tensor(EUROSAT_TRAIN) * 2 // 5)
    rng = random.Random(1)
    assert images.draw(train, 1, rng).tolist() == DRAWN_TRAIN
    assert images.draw(val, 1, rng).tolist() == DRAWN_VAL, "one generator goes through train, then val"
    assert images.draw(train, 4, random.Random(2)).tolist()[:12] == DRAWN_4_SEED_2
    with pytest.raises(ValueError, match="1001 shots asked for, but class 5 has 1000 images"):
        images.draw(train, 1001, rng)
    with pytest.raises(ValueError, match="1001 shots asked for, but class 'Pasture' has 1000 images"):
        images.draw(train, 1001, rng, [*"01234", "Pasture", *"6789"])


def test_a_name_with_a_draw_gives_that_support():
    whole, drawn = datasets.load("shapes"), datasets.load("shapes@2/1")
    train, val = drawn.images("train"), drawn.images("val")
    assert torch.equal(train.labels.bincount(), torch.full((72,), 2)) and len(val) == 144
    rng = random.Random(1)
    rows = images.draw(whole.images("train").labels, 2, rng)
    assert train.ids == whole.images("train").rows(rows).ids
    assert val.ids == whole.images("val").rows(images.draw(whole.images("val").labels, 2, rng)).ids
    assert drawn.images("test").manifest == whole.images("test").manifest
    assert train.manifest != datasets.load("shapes@2/2").images("train").manifest
    assert drawn.base == "shapes" and "seed 1" in drawn.source
    assert len(datasets.load("shapes@8/1").images("val")) == 72 * 4


def test_the_same_picture_on_both_sides_is_found(tmp_path):
    data = datasets.load(f"folder:{write_folder(tmp_path / 'own')}")
    train, test = data.images("train"), data.images("test")
    assert images.shared(train, test) == []
    (tmp_path / "own/test/class_1/image_001.png").write_bytes(
        (tmp_path / "own/train/class_2/image_003.png").read_bytes()
    )
    assert images.shared(train, test) == [("train/class_2/image_003.png", "test/class_1/image_001.png")]
    shapes = datasets.load("shapes")
    assert images.shared(shapes.images("train"), shapes.images("test")) == []
    assert len(images.shared(shapes.images("val"), shapes.images("val"))) == 576


# ---- prompts ----------------------------------------------------------------------------------------------------


def test_prompts_by_name_by_file_and_by_hand(tmp_path):
    data = datasets.load("digits")
    assert datasets.prompts(None, data) == data.templates
    assert len(datasets.prompts("7", data)) == 7 and len(datasets.prompts("80", data)) == 80
    assert all(template.count("{}") == 1 for template in datasets.prompts("80", data))
    assert datasets.prompts(["a {}."], data) == ("a {}.",)
    (tmp_path / "own.txt").write_text("a {}.\n\nthe {}!\n")
    assert datasets.prompts(str(tmp_path / "own.txt"), data) == ("a {}.", "the {}!")
    (tmp_path / "list.json").write_text('["one {}"]')
    assert datasets.prompts(str(tmp_path / "list.json"), data) == ("one {}",)
    sentences = {name.upper(): [f"It looks like {name}.", "Round."] for name in data.classnames} | {"more": ["x"]}
    (tmp_path / "told.json").write_text(json.dumps(sentences))
    found = datasets.prompts(str(tmp_path / "told.json"), data)
    assert list(found) == list(data.classnames) and found["nine"] == ("It looks like nine.", "Round.")


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (["a photo"], "a template has one {} for the class name; got 'a photo'"),
        (["{} and {}"], "got '{} and {}'"),
        ([], "no templates"),
        ("missing.json", "no prompts .*missing.json; give 7, 80"),
        ({"one": ["a"]}, "sentences are given for 1 classes, digits has 10; 9 have none, first 'zero'"),
    ],
)
def test_prompts_that_cannot_be_used_are_refused(choice, message):
    with pytest.raises(ValueError, match=message):
        datasets.prompts(choice, datasets.load("digits"))


@pytest.mark.parametrize("text", ["{", '{"zero": "a sentence"}', "[1, 2]"])
def test_a_prompt_file_of_another_form_is_refused(text, tmp_path):
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(ValueError, match=r"is not JSON|neither a list of templates nor"):
        datasets.prompts(str(tmp_path / "p.json"), datasets.load("digits"))


# ---- decoding -----------------------------------------------------------------------------------------------------


def mean_of(path: Path) -> np.ndarray:
    image = images.decode(path)
    assert image.mode == "RGB"
    return np.asarray(image).reshape(-1, 3).mean(axis=0)


def test_every_kind_of_image_becomes_upright_rgb(tmp_path):
    grey = Image.new("L", (6, 4), 100)
    grey.save(tmp_path / "grey.png")
    Image.fromarray(np.full((4, 6), 100 * 257, np.uint16)).save(tmp_path / "grey16.png")
    Image.new("CMYK", (6, 4), (0, 0, 0, 155)).save(tmp_path / "cmyk.jpg")
    grey.convert("P").save(tmp_path / "palette.png")
    Image.new("1", (6, 4), 1).save(tmp_path / "bit.png")
    Image.new("RGBA", (6, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("LA", (6, 4), (0, 128)).save(tmp_path / "half.png")
    Image.new("RGB", (1, 1), (9, 8, 7)).save(tmp_path / "dot.png")
    for name in ("grey.png", "grey16.png", "palette.png"):
        assert np.allclose(mean_of(tmp_path / name), 100), name
    assert np.allclose(mean_of(tmp_path / "cmyk.jpg"), 100, atol=3)
    assert np.allclose(mean_of(tmp_path / "bit.png"), 255)
    assert np.allclose(mean_of(tmp_path / "clear.png"), 255), "what is transparent lies on white"
    assert np.allclose(mean_of(tmp_path / "half.png"), 127, atol=1)
    assert mean_of(tmp_path / "dot.png").tolist() == [9, 8, 7]


def test_exif_orientation_turns_the_image_upright(tmp_path):
    image = Image.new("RGB", (6, 4), "black")
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    upright = images.decode(tmp_path / "turned.png")
    assert upright.size == (4, 6) and upright.getpixel((3, 0)) == (255, 255, 255)


def test_pixels_without_a_known_range_are_refused(tmp_path):
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "float.tif")
    Image.fromarray(np.full((4, 4), 70_000, np.int32)).save(tmp_path / "int.tif")
    with pytest.raises(ValueError, match="floating-point"):
        images.decode(tmp_path / "float.tif")
    with pytest.raises(ValueError, match="grey values run from 70000"):
        images.decode(tmp_path / "int.tif")


# ---- the command line ---------------------------------------------------------------------------------------------


def test_the_command_line_says_what_is_here_and_what_is_not(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LOGIT_BIAS_DATA", str(tmp_path))
    write_coop(tmp_path, "dtd")
    assert main(["datasets"]) == 0
    shown = capsys.readouterr().out
    assert "shapes               here: 72 classes, train, val, test" in shown
    assert "dtd                  here: 2 classes, train, val, test" in shown
    assert "food101              missing: no food-101/images" in shown
    own = write_folder(tmp_path / "own")
    (own / "test/class_0/image_000.png").write_bytes((own / "train/class_0/image_000.png").read_bytes())
    assert main(["datasets", f"folder:{own}"]) == 0
    shown = capsys.readouterr().out
    assert "3 classes, train 12, val 12, test 12" in shown
    assert "images in both train and test: 1, such as train/class_0/image_000.png" in shown
    assert main(["datasets", "nothing"]) == 2
    assert "unknown data set 'nothing'" in capsys.readouterr().err


def test_real_photos_in_caltechs_layout(tmp_path):
    real = REAL / "caltech101_mini"
    if not real.exists():
        pytest.skip("the real photos are not on this machine")
    (tmp_path / "caltech-101").symlink_to(real)
    data = datasets.load("caltech101", root=tmp_path)
    assert data.classnames[:4] == ("motorbike", "airplane", "butterfly", "car side") and data.templates == (
        "a photo of a {}.",
    )
    assert [len(data.images(split)) for split in data.splits] == [192, 60, 108]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grey = sum(
            np.ptp(np.asarray(image), axis=2).max() == 0 for split in data.splits for image in data.images(split)
        )
    assert grey >= 39, "39 of the files are grey"
    assert images.shared(data.images("train"), data.images("test")) == []
