"""Extraction under kills, damaged files, full and read-only disks, rivals: nothing lost, nothing silently wrong."""

import errno
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings

import pytest
import torch
from conftest import ROOT
from PIL import Image
from small_models import write_folder

from lib import features
from lib.features import extraction
from lib.features.encoders import Encoder
from lib.files import file_hash, locked

FORK = multiprocessing.get_context("fork") if sys.platform == "linux" else None
needs_fork = pytest.mark.skipif(FORK is None, reason="fork is safe with torch on Linux only")


@pytest.fixture(autouse=True)
def small(small_encoders, monkeypatch):
    monkeypatch.setattr(extraction, "SHARD", 6)


@pytest.fixture
def own(tmp_path):
    """Three classes of ten images, test only: five shards."""
    return f"folder:{write_folder(tmp_path / 'own', images=10, splits=('test',))}"


def extract(own, cache, **options):
    return features.load(own, "test", "embedded:vit", device="cpu", batch_size=4, cache=cache, **options)


def bank(cache) -> dict[str, bytes]:
    return {
        p.name: p.read_bytes() for p in cache.rglob("*") if p.is_file() and p.suffix != ".lock" and p.name != ".lock"
    }


def count_encoded(patch) -> list[int]:
    """Return a list that grows by the size of every batch from now on."""
    sizes, encode = [], Encoder.encode_images
    patch.setattr(Encoder, "encode_images", lambda self, batch: sizes.append(len(batch)) or encode(self, batch))
    return sizes


def in_child(act) -> int:
    """Run `act` in a forked child and return its exit code, negative for a signal."""
    child = FORK.Process(target=act)
    child.start()
    child.join()
    return child.exitcode


# ---- killed ------------------------------------------------------------------------------------------------------


@needs_fork
def test_killed_at_random_moments_it_resumes_and_ends_with_the_same_bytes(tmp_path, monkeypatch):
    own = f"folder:{write_folder(tmp_path / 'own', classes=4, images=60, splits=('test',))}"
    extract(own, tmp_path / "whole")
    moments, kills = random.Random(5), 0

    def slowly():  # 60 batches of 20 ms: a run that is killed within 0.4 s cannot finish them alone
        encode = Encoder.encode_images
        Encoder.encode_images = lambda self, batch: time.sleep(0.02) or encode(self, batch)
        extract(own, tmp_path / "broken")

    for _ in range(40):
        child = FORK.Process(target=slowly)
        child.start()
        child.join(moments.uniform(0.02, 0.4))
        if child.exitcode is None:
            os.kill(child.pid, signal.SIGKILL)
            kills += 1
        child.join()
        if child.exitcode == 0:
            break
    before = [name for name in bank(tmp_path / "broken") if name.startswith("shard")]
    extract(own, tmp_path / "broken")
    assert kills >= 2, f"killed {kills} times, with {before} left"
    assert bank(tmp_path / "broken") == bank(tmp_path / "whole")


@needs_fork
@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_at_every_rename_it_resumes_without_doing_whole_shards_again(own, tmp_path, monkeypatch, when):
    extract(own, tmp_path / "whole")
    expected, rename, calls = bank(tmp_path / "whole"), os.replace, []
    for step in range(7):  # five shards, the bank, its manifest

        def die(source, target, step=step):
            if when == "after":
                rename(source, target)
            if len(calls) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            calls.append(target)
            if when == "before":
                rename(source, target)

        def act(cache=tmp_path / f"broken{step}", die=die):
            os.replace = die
            extract(own, cache)

        cache = tmp_path / f"broken{step}"
        assert in_child(act) == -signal.SIGKILL
        whole = len([name for name in bank(cache) if name.startswith("shard")])
        assert whole == min(5, step + (when == "after"))
        with monkeypatch.context() as patch:
            encoded = count_encoded(patch)
            extract(own, cache)
        finished = when == "after" and step == 6
        assert sum(encoded) == (0 if finished else 6 * (5 - whole)), "whole shards are not encoded again"
        left = bank(cache)
        assert left if finished else left == expected
        assert {name: data for name, data in left.items() if name in expected} == expected


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_a_damaged_shard_is_named_and_computed_again(own, tmp_path, monkeypatch, damage):
    extract(own, tmp_path / "whole")
    with monkeypatch.context() as patch:  # stop when all shards are there
        patch.setattr(extraction, "_join", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            extract(own, tmp_path / "broken")
    shard = next((tmp_path / "broken").rglob("shard-00002-*"))
    data = bytearray(shard.read_bytes())
    data[-3] ^= 16
    shard.write_bytes(data if damage == "flip" else data[: len(data) // 3 if damage == "truncate" else 0])
    encoded = count_encoded(monkeypatch)
    with pytest.warns(UserWarning, match=r"damaged shard .*shard-00002-.*; computing it again"):
        extract(own, tmp_path / "broken")
    assert sum(encoded) == 6
    assert bank(tmp_path / "broken") == bank(tmp_path / "whole")


@needs_fork
def test_two_processes_make_one_bank(own, tmp_path):
    extract(own, tmp_path / "whole")
    children = [FORK.Process(target=extract, args=(own, tmp_path / "shared")) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert bank(tmp_path / "shared") == bank(tmp_path / "whole")


@needs_fork
def test_processes_share_the_shards_of_one_bank(own, tmp_path, monkeypatch):
    encode = extraction._encode_shard

    def logged(claim, *rest):
        encode(claim, *rest)
        with open(tmp_path / "log", "a") as log:
            log.write(f"{claim.shard} {os.getpid()}\n")
        time.sleep(0.2)

    monkeypatch.setattr(extraction, "_encode_shard", logged)
    children = [FORK.Process(target=extract, args=(own, tmp_path / "shared")) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0]
    shards, workers = zip(*(line.split() for line in (tmp_path / "log").read_text().splitlines()), strict=True)
    assert sorted(map(int, shards)) == [0, 1, 2, 3, 4], "each shard once"
    assert len(set(workers)) == 2, "both worked"
    extract(own, tmp_path / "whole")
    assert bank(tmp_path / "shared") == bank(tmp_path / "whole")


@needs_fork
def test_a_dead_rival_does_not_hold_the_lock(own, tmp_path):
    def hang():
        Encoder.encode_images = lambda *_: time.sleep(60)
        extract(own, tmp_path / "shared")

    child = FORK.Process(target=hang)
    child.start()
    for _ in range(200):
        if list((tmp_path / "shared").rglob(".lock")):
            break
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert len(extract(own, tmp_path / "shared").y) == 30


# ---- images ------------------------------------------------------------------------------------------------------


def spoil(tmp_path, kind: str) -> str:
    path = tmp_path / "own/test/class_1/image_004.png"
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:-60])
    elif kind == "truncated jpeg":
        Image.open(path).resize((300, 300)).save(path, format="JPEG")
        path.write_bytes(path.read_bytes()[:-2000])
    elif kind == "text":
        path.write_text("<html>not found</html>")
    elif kind == "float":
        Image.new("F", (8, 8)).save(path, format="TIFF")
    return "test/class_1/image_004.png"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["empty", "truncated", "truncated jpeg", "text", "float"])
def test_an_image_that_cannot_be_decoded_is_named(own, tmp_path, kind, workers):
    name = spoil(tmp_path, kind)
    with pytest.raises(ValueError, match=f"image {name} cannot be decoded: .*quarantine=True") as caught:
        extract(own, None, num_workers=workers)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").rglob("features.safetensors"))


def test_quarantine_leaves_out_the_image_with_its_label_and_says_so(own, tmp_path):
    whole = extract(own, tmp_path / "whole")
    name = spoil(tmp_path, "truncated")
    found = extract(own, None, quarantine=True)
    keep = torch.arange(30) != 14
    assert found.quarantined == (name,)
    torch.testing.assert_close(found.x, whole.x[keep])
    assert torch.equal(found.y, whole.y[keep])
    both = features.load_many(own, "test", ["embedded:vit", "embedded:clip"], device="cpu", quarantine=True)
    assert torch.equal(both[0].y, both[1].y), "every encoder leaves out the same images"
    with pytest.raises(
        ValueError, match=r"lack 1 images that could not be decoded \(first: test/class_1/image_004.png\)"
    ):
        extract(own, None)
    (tmp_path / "own" / name).write_bytes((tmp_path / "own/test/class_0/image_000.png").read_bytes())
    assert len(extract(own, None).y) == 30, "a repaired image is another data set"


def test_nothing_to_decode_is_an_error_even_in_quarantine(tmp_path):
    root = write_folder(tmp_path / "own", classes=1, images=2, splits=("test",))
    for path in root.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"no image could be decoded: image test/class_0/image_000.png"):
        extract(f"folder:{root}", None, quarantine=True)


def test_odd_images_are_extracted_like_any_other(tmp_path):
    root = write_folder(tmp_path / "own", classes=1, images=1, splits=("test",))
    place = root / "test/class_0"
    Image.new("RGB", (1, 1), "red").save(place / "dot.png")
    Image.new("L", (50, 3), 77).save(place / "flat.jpg")
    Image.new("CMYK", (9, 9)).save(place / "cmyk.jpg")
    Image.new("RGBA", (9, 9)).save(place / "clear.png")
    Image.new("P", (9, 9)).save(place / "palette.gif")
    Image.new("I;16", (9, 9), 40_000).save(place / "deep.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = extract(f"folder:{root}", None)
    assert len(found.y) == 7 and torch.isfinite(found.x).all()


# ---- disks -------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte, where mounting is allowed."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True)
    if done.returncode:
        pytest.skip("mounting a small disk is not allowed here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_disk_too_small_is_refused_before_any_work(own, small_disk, monkeypatch):
    filler = small_disk / "filler"
    filler.write_bytes(bytes(2**20 - 16_384))
    monkeypatch.setattr(Encoder, "encode_images", lambda *_: pytest.fail("work began"))
    with pytest.raises(ValueError, match=r"has 0.0 MB free, extraction needs 0.5 MB .*LOGIT_BIAS_CACHE"):
        extract(own, small_disk / "cache", views=40)


def test_a_disk_that_fills_up_meanwhile_leaves_whole_shards_only(own, small_disk, tmp_path, monkeypatch):
    extract(own, tmp_path / "whole", views=40)
    monkeypatch.setattr(extraction, "_require_room", lambda *_: None)
    filler = small_disk / "filler"
    filler.write_bytes(bytes(2**20 - 180_000))
    with pytest.raises(OSError, match=r"cannot write .*shard-0000.*: No space left on device") as caught:
        extract(own, small_disk / "cache", views=40)
    assert caught.value.errno == errno.ENOSPC
    assert not [p for p in (small_disk / "cache").rglob("*") if p.name.endswith(".tmp")]
    shards = list((small_disk / "cache").rglob("shard-*"))
    assert shards and all(file_hash(path) in path.name for path in shards)
    filler.unlink()
    extract(own, small_disk / "cache", views=40)
    assert bank(small_disk / "cache") == bank(tmp_path / "whole")


def test_a_read_only_cache_is_read_and_a_missing_bank_refused(own, small_disk):
    first = extract(own, small_disk / "cache")
    expected = first.x.clone()
    del first
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert torch.equal(extract(own, small_disk / "cache").x, expected)
    with pytest.raises(
        ValueError, match=r"/disk/cache/.* cannot be written \(Read-only file system\).*LOGIT_BIAS_CACHE"
    ):
        features.load(own, "test", "embedded:conv", device="cpu", cache=small_disk / "cache")
    with pytest.raises(ValueError, match="cannot be written"):
        features.load_text("digits", "embedded:clip", device="cpu", cache=small_disk / "cache")


def test_a_bank_that_does_not_fit_leaves_nothing_half_made(small_disk):
    parts = {
        "clip": {"clip": {"test": torch.randn(3000, 100)}},
        "labels": {"test": torch.zeros(3000, dtype=torch.int64)},
    }
    with pytest.raises(OSError, match=rf"cannot write {small_disk}/bank: .*No space left"):
        features.save_bank(small_disk / "bank", **parts, class_names=["one"])
    assert list(small_disk.iterdir()) == []
    with pytest.raises(ValueError, match="is not empty"):
        features.save_bank(__file__, **parts, class_names=["one"])


def test_a_second_writer_says_once_that_it_waits(tmp_path, capsys):
    begun = threading.Event()

    def wait():
        with locked(tmp_path / "folder"):
            begun.set()

    with locked(tmp_path / "folder"):
        rival = threading.Thread(target=wait)
        rival.start()
        assert not begun.wait(0.3)
    rival.join()
    assert begun.is_set()
    assert capsys.readouterr().err == f"another process is making {tmp_path / 'folder'}; waiting for it\n"
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(ValueError, match=r"file/a cannot be written .*; name another by LOGIT_BIAS_DATA"),
        locked(tmp_path / "file" / "a", "LOGIT_BIAS_DATA"),
    ):
        pytest.fail("a file is no folder")


def test_a_cache_path_that_is_a_file_is_refused(own, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="cannot be written"):
        extract(own, tmp_path / "file")


def test_progress_is_shown_to_a_person(own, tmp_path):
    """A terminal sees images, rate and time left; a log file sees nothing."""
    code = (
        "import sys; from lib import features\n"
        f"features.load({own!r}, 'test', 'timm:test_byobnet/random', device='cpu', cache={str(tmp_path / 'c')!r})"
    )
    pty, termios = pytest.importorskip("pty"), pytest.importorskip("termios")
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, 120))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stderr=follower, stdout=subprocess.PIPE, check=False)
    os.close(follower)
    shown = b""
    try:
        while chunk := os.read(leader, 4096):
            shown += chunk
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(leader)
    assert done.returncode == 0, shown
    assert all(part in shown.decode() for part in ("30/30", "img/s", "timm:test_byobnet/random"))
