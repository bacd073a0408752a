"""The embedded world: the same bytes twice, balanced labels, no image in two streams, captions that say little."""

import hashlib

import draw as drawing
import numpy as np
import others
import pytest
import torch
import world
from sklearn.datasets import load_digits

from lib.features import sources

SEVERITIES = [f"shapes-corrupted-{severity}" for severity in range(1, 6)]


OTHERS_DIGEST = "e3e5f4538c"  # of 400 images of seed 3


def digest(images: torch.Tensor) -> list[bytes]:
    return [hashlib.sha256(image.numpy().tobytes()).digest() for image in images]


@pytest.fixture(scope="module")
def test_set() -> world.Rendered:
    return world.render("shapes", "test")


@pytest.fixture(scope="module")
def captioned() -> tuple[torch.Tensor, list[str]]:
    return world.render_captioned(4000, seed=11)


def test_names_are_distinct_and_novel_ones_share_one_factor_at_most():
    assert len(set(world.CLASSNAMES)) == len(world.SHAPES) * len(world.TEXTURES) == 72
    assert not set(world.NOVEL_CLASSNAMES) & set(world.CLASSNAMES)
    for name in world.NOVEL_CLASSNAMES:
        texture, shape = name.split()
        assert (texture in world.TEXTURES) + (shape in world.SHAPES) == 1
    assert all(template.count("{}") == 1 for template in world.TEMPLATES + world.DIGIT_TEMPLATES)


@pytest.mark.parametrize(
    ("version", "split"), [("shapes", "val"), ("shapes-sketch", "test"), ("shapes-spurious", "val")]
)
def test_same_bytes_at_every_call(version, split):
    first, second = world.render(version, split), world.render(version, split)
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.labels, second.labels)


def test_global_random_state_is_left_alone():
    before, torch_before = np.random.get_state()[1].copy(), torch.get_rng_state()
    world.render("shapes", "val")
    world.render_captioned(8, seed=0)
    assert (np.random.get_state()[1] == before).all()
    assert torch.equal(torch.get_rng_state(), torch_before)


@pytest.mark.parametrize("version", world.VERSIONS)
def test_each_version_is_balanced_and_large_enough(version):
    drawn = world.render(version, "test")
    counts = torch.bincount(drawn.labels, minlength=len(drawn.classnames))
    assert drawn.images.shape == (2016, 3, 48, 48) and drawn.images.dtype == torch.uint8
    assert counts.min() == counts.max() > 0
    assert all(len(values) == 2016 for values in drawn.attributes.values())
    assert drawn.images.float().std() > 20


@pytest.mark.parametrize(("split", "each"), [("train", 32), ("val", 8)])
def test_training_and_validation_are_balanced(split, each):
    labels = world.render("shapes", split).labels
    assert torch.bincount(labels).tolist() == [each] * 72


def test_labels_follow_the_attributes(test_set):
    for row in range(0, 2016, 97):
        texture, shape = test_set.classnames[test_set.labels[row]].split()
        assert world.TEXTURES[test_set.attributes["texture"][row]] == texture
        assert world.SHAPES[test_set.attributes["shape"][row]] == shape
    assert (test_set.attributes["colour"] != test_set.attributes["background"]).all()


def test_corruptions_keep_the_labels_and_grow(test_set):
    distances = []
    for version in SEVERITIES:
        spoilt = world.render(version, "test")
        assert torch.equal(spoilt.labels, test_set.labels)
        assert len(spoilt.attributes["corruption"].unique()) == len(world.CORRUPTIONS)
        distances.append((spoilt.images.float() - test_set.images.float()).abs().mean().item())
    assert distances == sorted(distances) and distances[0] > 0


def test_spurious_background_goes_with_the_texture_only_before_the_test():
    for split, agreement in (("train", 0.9), ("val", 0.9), ("test", 0.5)):
        group = world.render("shapes-spurious", split).attributes["group"]
        agrees = (group // 2 == group % 2).float().mean().item()
        assert agrees == pytest.approx(agreement, abs=0.03), split
    assert torch.bincount(group).tolist() == [504] * 4


def test_no_image_is_in_two_streams(test_set):
    sets = [test_set.images, world.render("shapes", "train").images, world.render("shapes", "val").images]
    sets += [world.render_captioned(500, 0)[0], world.render_others(500, 0)[0], world.render_labelled(500, 0)[0]]
    sets += [world.render_captioned(500, 1)[0]]
    digests = [each for images in sets for each in digest(images)]
    assert len(set(digests)) == len(digests)


def test_captions_name_factors_at_the_stated_rates(captioned):
    images, captions = captioned
    things = [c for c in captions if not any(digit in c for digit in world.DIGIT_CLASSNAMES)]
    drawn = [c for c in things if "sketch" not in c]
    foreground = [c.split(" on a ")[0] for c in drawn]
    assert len(images) == len(captions) == 4000
    assert 1 - len(things) / 4000 == pytest.approx(world.DIGIT_RATE, abs=0.02)
    assert (len(things) - len(drawn)) / 4000 == pytest.approx(world.SKETCH_RATE, abs=0.015)
    assert all(any(shape in c for shape in world.SHAPES) for c in things)
    named = {
        "texture": np.mean([any(t in c for t in world.TEXTURES) for c in drawn]),
        "colour": np.mean([any(f" {colour} " in c for colour in world.COLOURS) for c in foreground]),
        "background": np.mean(["background" in c for c in drawn]),
    }
    for factor, rate in named.items():
        assert rate == pytest.approx(world.CAPTION_RATES[factor], abs=0.03), factor


def test_captions_agree_with_the_pixels():
    rng = np.random.default_rng(0)
    images, captions = world.render_captioned(200, seed=5)
    again, _ = world.render_captioned(200, seed=5)
    assert torch.equal(images, again)
    for row in rng.integers(200, size=30):
        words = captions[row].strip(".").split()
        if "on" in words and words[-2] in world.COLOURS:  # "... on a COLOUR background"
            colour = torch.tensor(drawing.PALETTE[words[-2]])
            corners = images[row][:, [0, 0, -1, -1], [0, -1, 0, -1]].float().mean(1)
            similarity = torch.nn.functional.cosine_similarity(colour, corners, dim=0)
            assert similarity > 0.7, captions[row]


def test_shapes_and_textures_differ_to_the_eye(test_set):
    """Mean images of shapes, seen in sketches, differ from one another by more than their own spread."""
    drawn = world.render("shapes-sketch", "test")
    grey = drawn.images.float().mean(1)
    means = torch.stack([grey[drawn.attributes["shape"] == index].mean(0).flatten() for index in range(12)])
    assert torch.pdist(means).min() > 100


def test_digits_are_the_real_ones_with_a_fixed_division():
    parts = {split: world.digits(split) for split in world.SPLITS}
    assert {split: len(part.labels) for split, part in parts.items()} == {"train": 600, "val": 200, "test": 997}
    assert torch.bincount(parts["train"].labels).tolist() == [60] * 10
    assert torch.equal(parts["val"].images, world.digits("val").images)
    images = torch.cat([part.images for part in parts.values()])
    assert images.shape == (1797, 3, 48, 48) and torch.equal(images[:, 0], images[:, 2])
    bunch = load_digits()
    coarse = torch.from_numpy(bunch.images).float()
    shrunk = torch.nn.functional.interpolate(images[:, :1].float(), size=8, mode="area")[:, 0]
    labels = torch.cat([part.labels for part in parts.values()])
    for digit in range(10):
        means = [coarse[torch.from_numpy(bunch.target) == digit].mean(0), shrunk[labels == digit].mean(0)]
        assert torch.corrcoef(torch.stack(means).flatten(1))[0, 1] > 0.96, digit


def test_the_cards_of_the_data_sets_say_what_the_world_draws():
    cards = {name: card for name, card in sources.cards().items() if card["family"] == "generated"}
    assert tuple(cards) == (*world.VERSIONS, "digits")
    for name in world.VERSIONS:
        card = cards[name]
        names = world.NOVEL_CLASSNAMES if name == "shapes-novel" else world.CLASSNAMES
        assert tuple(card["classnames"]) == names and tuple(card["templates"]) == world.TEMPLATES
    assert tuple(cards["digits"]["classnames"]) == world.DIGIT_CLASSNAMES
    assert tuple(cards["digits"]["templates"]) == world.DIGIT_TEMPLATES


PIXELS = {  # mean and deviation of the first 256 test images
    "shapes": (105.33, 68.10),
    "shapes-v2": (90.34, 69.10),
    "shapes-sketch": (206.12, 65.26),
    "shapes-corrupted-1": (109.03, 65.74),
    "shapes-corrupted-2": (110.72, 63.39),
    "shapes-corrupted-3": (111.18, 63.47),
    "shapes-corrupted-4": (110.94, 61.62),
    "shapes-corrupted-5": (112.78, 60.77),
    "shapes-novel": (102.27, 65.89),
    "shapes-spurious": (87.28, 66.09),
}


@pytest.mark.parametrize("name", PIXELS)
def test_other_pixels_need_another_version(name):
    """Whoever changes what is drawn raises `version` in data/benchmarks.json, then this table."""
    assert sources.cards()[name]["version"] == "embedded-1"
    images = world.render(name, "test").images[:256].float()
    assert (images.mean().item(), images.std().item()) == pytest.approx(PIXELS[name], abs=0.03)


def test_errors_name_both_sides():
    with pytest.raises(ValueError, match=r"'shape'.*shapes-v2"):
        world.render("shape", "test")
    with pytest.raises(ValueError, match="shapes-v2 has no split 'train'; it has test"):
        world.render("shapes-v2", "train")
    with pytest.raises(ValueError, match="no split 'all'; it has train, val, test"):
        world.digits("all")
    with pytest.raises(ValueError, match="n=0, seed=3"):
        world.render_captioned(0, 3)
    with pytest.raises(ValueError, match="seed=-1"):
        world.render_others(4, -1)


def test_other_classes_share_no_shape_and_no_texture_with_any_other_stream():
    shapes, textures = set(others.SHAPES), set(others.TEXTURES)
    assert len(shapes) == 16 and len(textures) == 8
    assert not shapes & set(drawing.SHAPES) and not textures & set(drawing.TEXTURES)
    functions = {*others.KINDS.distances.values(), *others.KINDS.tones.values()}
    assert not functions & {*drawing.KINDS.distances.values(), *drawing.KINDS.tones.values()}
    words = {word for name in world.CLASSNAMES + world.NOVEL_CLASSNAMES for word in name.split()}
    assert not words & (shapes | textures)


def test_other_classes_are_the_same_bytes_twice_and_balanced():
    images, labels = world.render_others(400, 3)
    again, same = world.render_others(400, 3)
    assert torch.equal(images, again) and torch.equal(labels, same)
    assert not torch.equal(images, world.render_others(400, 4)[0])
    assert labels.min() >= 0 and labels.max() < 128 and len(labels.unique()) > 100
    assert hashlib.sha256(images.numpy().tobytes()).hexdigest()[:10] == OTHERS_DIGEST


@pytest.mark.parametrize("kind", ["shape", "texture"])
def test_other_shapes_and_textures_differ_to_the_eye(kind):
    """Mean ink of drawings in one pose: any two shapes, and any two textures, differ by more than noise does."""
    count = 16 if kind == "shape" else 8
    style = drawing.SKETCH._replace(rotation=0, size=(0.9, 0.9), aspect=0, noise=0)
    index = np.arange(count)
    zeros = np.zeros(count, int)
    factors = {"shape": zeros, "texture": zeros, "colour": zeros, "background": zeros + 1, kind: index}
    drawn = drawing.draw_shapes(np.random.default_rng(0), factors, style, others.KINDS).astype(float).mean(1)
    gaps = np.abs(drawn[:, None] - drawn[None]).mean((2, 3))
    assert gaps[~np.eye(count, dtype=bool)].min() > 3
    ink = (drawn < 128).mean((1, 2))
    assert ink.min() > 0.01, "every one leaves a mark"


def test_a_polygon_is_as_far_as_its_nearest_edge_and_negative_inside():
    square = [(-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)]
    u, v = (np.array(values, np.float32) for values in ([0, 0.5, 2, 2, -3], [0, 0, 0, 2, 0]))
    expected = [-1, -0.5, 1, 2**0.5, 2]
    np.testing.assert_allclose(others._outline(u, v, square), expected, rtol=1e-5)
    np.testing.assert_allclose(others._outline(u, v, square[::-1]), expected, rtol=1e-5)
