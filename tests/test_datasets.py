"""Data sets: names, layouts on disk, splits, prompts, few-shot draws, and what a decoder makes of odd images."""

import json
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REAL
from PIL import Image
from scipy.io import savemat
from small_models import photo, write_folder

from lib import features
from lib.features import datasets, images, sources
from lib.__main__ import main

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
        ("shape", "unknown data set 'shape'; near: shapes.*features:PATH"),
        ("Caltech101", "near: caltech101"),
        ("features:somewhere", "holds no images; features.load reads it"),
        ("folder:/nowhere/at/all", "no folder /nowhere/at/all"),
        ("csv:/nowhere/at/all.csv", "no file /nowhere/at/all.csv"),
        ("folder:", "unknown data set"),
        ("shapes-sketch@4/1", "no train and val to draw from, only test"),
        ("shapes@64/1", "64 shots asked for, but class .* has 32 images"),
    ],
)
def test_wrong_names_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        data = datasets.load(name)
        data.images("train")


def test_the_embedded_world_comes_by_name():
    for name in datasets.EMBEDDED:
        data = datasets.load(name)
        split = data.images("test")
        assert len(split) == len(split.labels) == len(split.ids)
        assert int(split.labels.max()) < len(data.classnames)
        assert split[3].size == (48, 48) and split[3].mode == "RGB"
        with pytest.raises(ValueError, match="has no split 'training'"):
            data.images("training")
    assert np.array_equal(np.asarray(split[3]), split.pixels[3].permute(1, 2, 0).numpy())


def test_the_manifest_follows_pixels_labels_and_ids():
    split = datasets.load("digits").images("val")
    changed = split.pixels.clone()
    changed[0, 0, 0, 0] ^= 1
    labels = split.labels.clone()
    labels[0] = (labels[0] + 1) % 10
    others = [
        images.ImageSplit(split.labels, split.ids, pixels=changed),
        images.ImageSplit(labels, split.ids, pixels=split.pixels),
        images.ImageSplit(split.labels, split.ids[::-1], pixels=split.pixels),
    ]
    assert len({split.manifest, *(other.manifest for other in others)}) == 4
    assert datasets.load("digits").images("val").manifest == split.manifest


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


@pytest.mark.parametrize("name", sources.cards())
def test_a_missing_benchmark_says_what_to_get_and_where(name, tmp_path):
    with pytest.raises(ValueError, match=f"{name}: no .* in .*get it.*https://") as caught:
        datasets.load(name, root=tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_split_file_is_named(tmp_path):
    write_coop(tmp_path, "ucf101")
    (tmp_path / "ucf101" / "split_zhou_UCF101.json").unlink()
    with pytest.raises(ValueError, match=r"ucf101: no ucf101/split_zhou_UCF101.json"):
        datasets.load("ucf101", root=tmp_path)


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


def test_class_folders_serve_where_the_split_file_is_missing(tmp_path):
    for name, kept in (("eurosat", "AnnualCrop"), ("caltech101", "airplanes")):
        place = tmp_path / sources.cards()[name]["images"][0]
        for folder in (kept, "BACKGROUND_Google", "River"):
            for number in range(10):
                save(place / folder / f"{number}.jpg", number)
    euro, caltech = (datasets.load(name, root=tmp_path) for name in ("eurosat", "caltech101"))
    assert euro.classnames == ("Annual Crop Land", "BACKGROUND Google", "River")
    assert caltech.classnames == ("River", "airplane"), "the background class is not one of the 100"
    assert [len(caltech.images(split)) for split in caltech.splits] == [10, 4, 6]
    assert "for want of split_zhou_Caltech101.json; each class divided 50 : 20 : 30" in caltech.source
    rows = [set(caltech.images(split).ids) for split in caltech.splits]
    assert len(set.union(*rows)) == 20, "the splits are disjoint and complete"
    assert caltech.images("train").ids == datasets.load("caltech101", root=tmp_path).images("train").ids


def test_torchvisions_downloads_serve_where_the_split_file_is_missing(tmp_path):
    names = ["apple_pie", "ramen"]
    for part, count in (("train", 5), ("test", 2)):
        listed = {name: [f"{name}/{part}{i}" for i in range(count)] for name in names}
        (tmp_path / "food-101/meta").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"food-101/meta/{part}.json").write_text(json.dumps(listed))
        for path in (path for paths in listed.values() for path in paths):
            save(tmp_path / f"food-101/images/{path}.jpg", len(path))
    data = datasets.load("food101", root=tmp_path)
    assert data.classnames == ("apple pie", "ramen")
    assert [len(data.images(split)) for split in data.splits] == [8, 2, 4]
    assert "torchvision, for want of split_zhou_Food101.json; val is a fifth" in data.source
    assert data.images("test")[0].size == (12, 10)

    pets = tmp_path / "oxford-iiit-pet"
    (pets / "annotations").mkdir(parents=True)
    for part in ("trainval", "test"):
        rows = [
            f"{breed}_{part}{i} {label} 1 1" for label, breed in ((1, "Abyssinian"), (2, "beagle")) for i in range(5)
        ]
        (pets / "annotations" / f"{part}.txt").write_text("\n".join(rows))
        for row in rows:
            save(pets / "images" / f"{row.split()[0]}.jpg", len(row))
    assert datasets.load("oxford_pets", root=tmp_path).classnames == ("Abyssinian", "Beagle")

    for part in ("train", "val", "test"):
        (tmp_path / "dtd/dtd/labels").mkdir(parents=True, exist_ok=True)
        paths = [f"{name}/{name}_{part}.jpg" for name in ("banded", "zigzagged")]
        (tmp_path / f"dtd/dtd/labels/{part}1.txt").write_text("\n".join(paths))
        for path in paths:
            save(tmp_path / "dtd/dtd/images" / path, len(path))
    assert datasets.load("dtd", root=tmp_path).images("val").ids == (
        "dtd/dtd/images/banded/banded_val.jpg",
        "dtd/dtd/images/zigzagged/zigzagged_val.jpg",
    )

    sun = tmp_path / "SUN397"
    (sun).mkdir()
    (sun / "ClassName.txt").write_text("/a/abbey\n/b/bar\n")
    for path in (f"{c}/sun_{i}.jpg" for c in ("a/abbey", "b/bar") for i in range(10)):
        save(sun / path, len(path))
    assert datasets.load("sun397", root=tmp_path).classnames == ("abbey", "bar")


def test_flowers_and_cars_are_read_from_their_mat_files(tmp_path):
    flowers = tmp_path / "flowers-102"
    flowers.mkdir()
    for i in range(1, 7):
        save(flowers / f"jpg/image_{i:05d}.jpg", i)
    savemat(flowers / "imagelabels.mat", {"labels": np.array([[1, 2, 1, 2, 1, 2]])})
    savemat(flowers / "setid.mat", {"trnid": [[1, 2]], "valid": [[3, 4]], "tstid": [[5, 6]]})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torchvision.datasets.flowers102.check_integrity", lambda *_: True)
        data = datasets.load("oxford_flowers", root=tmp_path)
    assert data.images("val").labels.tolist() == [0, 1] and len(data.classnames) == 102

    cars = tmp_path / "stanford_cars"
    (cars / "devkit").mkdir(parents=True)
    savemat(cars / "devkit/cars_meta.mat", {"class_names": np.array(["Ford A 1999", "BMW B 2000"], dtype=object)})
    rows = [{"class": 1 + i % 2, "fname": f"{i:05d}.jpg"} for i in range(10)]
    savemat(cars / "devkit/cars_train_annos.mat", {"annotations": rows})
    savemat(cars / "cars_test_annos_withlabels.mat", {"annotations": rows})
    for place in ("cars_train", "cars_test"):
        for i in range(10):
            save(cars / place / f"{i:05d}.jpg", i)
    data = datasets.load("stanford_cars", root=tmp_path)
    assert data.classnames == ("Ford A 1999", "BMW B 2000") and len(data.images("test")) == 10


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
    with pytest.raises(ValueError, match="class 0 has 2 images, too few to divide into 3 parts"):
        datasets.load(f"folder:{write_folder(tmp_path / 'few', images=2, splits=())}")


def test_hidden_and_foreign_files_are_not_images(tmp_path):
    root = write_folder(tmp_path / "own")
    for name in (".DS_Store", "._image_000.png", "Thumbs.db", "readme.txt"):
        (root / "train/class_0" / name).write_text("x")
    (root / "train/.ipynb_checkpoints").mkdir()
    assert len(datasets.load(f"folder:{root}").images("train")) == 12


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
            r"a.png is in train \(line 2\) and in test \(line 3\)",
        ),
        (["a.png,cat"], "path,label,split", "line 2"),
    ],
)
def test_a_csv_that_cannot_be_right_is_refused(rows, header, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        datasets.load(write_csv(tmp_path / "list.csv", rows, header))


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
    assert "food101              missing: no food-101/images" in shown and "--download food101" in shown
    own = write_folder(tmp_path / "own")
    (own / "test/class_0/image_000.png").write_bytes((own / "train/class_0/image_000.png").read_bytes())
    assert main(["datasets", f"folder:{own}"]) == 0
    shown = capsys.readouterr().out
    assert "3 classes, train 12, val 12, test 12" in shown
    assert "images in both train and test: 1, such as train/class_0/image_000.png" in shown
    assert main(["datasets", "nothing"]) == 2
    assert "unknown data set 'nothing'" in capsys.readouterr().err
    assert main(["datasets", "--download", "imagenet-a"]) == 2
    assert "torchvision cannot download 'imagenet-a'; get it from" in capsys.readouterr().err


def test_a_download_that_fails_gives_one_line(tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    with pytest.raises(ValueError, match=r"dtd: torchvision could not download it .*get it with split_zhou") as caught:
        sources.download("dtd", tmp_path)
    assert "\n" not in str(caught.value)


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
