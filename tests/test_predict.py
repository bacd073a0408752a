"""New images through a saved method: one row each, whatever the batches, whatever is killed or broken on the way."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from small_models import photo, write_folder

from lib import __main__ as cli
from lib import methods, predict, tasks
from lib.features import save_bank


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture
def photos(tmp_path):
    return write_folder(tmp_path / "photos")


@pytest.fixture
def fitted(small_encoders, photos, tmp_path):
    """A method fitted on those photos under two auxiliary encoders, the folder it is saved in, its task."""
    source = tasks.load_source(f"folder:{photos}", aux="embedded:conv,embedded:vit")
    [task] = tasks.draw(source, 4, 1)
    method = methods.build("amu", epochs=3, beta=20.0).fit(task)
    return method, method.save(tmp_path / "fitted"), task


def test_rows_agree_with_the_method_on_cached_features(fitted, photos, tmp_path):
    method, folder, task = fitted
    rows = predict.predict(folder, [str(photos / "test")], tmp_path / "deep" / "p.csv")
    logits, s0 = method.logits(task.test), task.test.zero_shot
    assert [row["class"] for row in rows] == [task.classnames[c] for c in logits.argmax(1).tolist()]
    assert [row["zero_shot"] for row in rows] == [task.classnames[c] for c in s0.argmax(1).tolist()]
    p = torch.tensor([float(row["probability"]) for row in rows])
    torch.testing.assert_close(p, logits.softmax(1).amax(1), atol=1e-4, rtol=0)
    for row, answer, first, added in zip(rows, logits.argmax(1), s0.argmax(1), logits - s0, strict=True):
        assert float(row["push"]) == pytest.approx((added[answer] - added[first]).item(), abs=1e-3)
    assert rows_of(tmp_path / "deep" / "p.csv") == rows and len(rows) == 12


def test_batches_of_any_size_give_the_same_rows(fitted, photos, tmp_path, monkeypatch):
    _, folder, _ = fitted
    tables = []
    for size in (1, 5, 64):
        monkeypatch.setattr(predict, "BATCH", size)
        tables.append(predict.predict(folder, [str(photos)], tmp_path / f"{size}.csv"))
    for table in tables[1:]:
        for one, other in zip(tables[0], table, strict=True):
            assert (one["path"], one["class"], one["zero_shot"]) == (other["path"], other["class"], other["zero_shot"])
            assert float(one["probability"]) == pytest.approx(float(other["probability"]), abs=2e-4)
            assert float(one["push"]) == pytest.approx(float(other["push"]), abs=2e-3)


def test_what_cannot_be_decoded_is_listed_and_not_lost(fitted, photos, tmp_path, monkeypatch, capsys):
    _, folder, _ = fitted
    monkeypatch.setattr(predict, "BATCH", 4)
    broken = [photos / "test" / "class_0" / f"{name}.png" for name in ("a", "b", "c", "d")]  # a batch of nothing else
    for path in broken:
        path.write_bytes(b"no picture")
    (photos / "test" / "class_0" / "._a.png").touch()  # what macOS leaves behind is no image
    notes = tmp_path / "notes, a page.txt"
    notes.write_text("words")
    out = tmp_path / "p.csv"
    places = [str(photos / "test"), str(notes), str(photos / "test" / "class_1")]
    assert cli.main(["predict", str(folder), *places, "--out", str(out)]) == 0
    rows = rows_of(out)
    assert len(rows) == len({row["path"] for row in rows}) == 17
    bad = [row for row in rows if row["reason"]]
    assert [row["path"] for row in bad] == [*map(str, broken), str(notes)]
    assert all(row["class"] == row["probability"] == "" and "UnidentifiedImageError" in row["reason"] for row in bad)
    printed = capsys.readouterr().out
    assert "rows 17," in printed and "could not be decoded: 5\n" in printed and str(notes) in printed


def test_a_second_start_computes_only_what_is_missing(fitted, photos, tmp_path, monkeypatch):
    _, folder, _ = fitted
    monkeypatch.setattr(predict, "BATCH", 5)
    out = tmp_path / "p.csv"
    predict.predict(folder, [str(photos)], out)
    whole = out.read_bytes()
    for cut in (len(whole) // 2, len(whole) - 3, 4, whole.index(b"\n") + 1):  # in a row, in the last, in the header
        out.write_bytes(whole[:cut])
        predict.predict(folder, [str(photos)], out)
        assert out.read_bytes() == whole
    monkeypatch.setattr(predict, "_networks", lambda *_: pytest.fail("nothing is left to compute"))
    assert len(predict.predict(folder, [str(photos)], out)) == 36


def test_a_killed_run_loses_no_finished_row(fitted, embedded, photos, tmp_path):
    _, folder, _ = fitted
    for seed in range(40):
        photo(900 + seed).save(photos / "test" / f"more_{seed}.png")
    script = f"""
import time
from pathlib import Path
from lib import predict
from lib.features import encoders
encoders.EMBEDDED_FOLDER = Path({str(embedded)!r})
decode, predict.BATCH = predict.decode, 2
predict.decode = lambda path: (time.sleep(0.03), decode(path))[1]
predict.predict(Path({str(folder)!r}), [{str(photos)!r}], Path({str(tmp_path / "p.csv")!r}))
"""
    out, whole = tmp_path / "p.csv", tmp_path / "whole.csv"
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stderr=subprocess.PIPE)
    while not (out.exists() and len(out.read_bytes().splitlines()) > 7):
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.01)
    with pytest.raises(ValueError, match="another process is writing"):
        predict.predict(folder, [str(photos)], out)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    survived = out.read_bytes()
    assert 7 <= len(survived.splitlines()) - 1 < 76
    size = predict.BATCH
    predict.BATCH = 2
    try:
        predict.predict(folder, [str(photos)], out)
        predict.predict(folder, [str(photos)], whole)
    finally:
        predict.BATCH = size
    assert out.read_bytes().startswith(survived[: survived.rindex(b"\n") + 1])
    assert out.read_bytes() == whole.read_bytes() and len(rows_of(out)) == 76


def test_another_table_and_another_methods_rows_are_not_mixed(fitted, photos, tmp_path):
    _, folder, task = fitted
    out = tmp_path / "p.csv"
    out.write_text("name,age\nx,3\n")
    with pytest.raises(ValueError, match="another table, with columns name, age"):
        predict.predict(folder, [str(photos)], out)
    out.unlink()
    predict.predict(folder, [str(photos)], out)
    other = methods.build("gda").fit(task).save(tmp_path / "other")
    with pytest.raises(ValueError, match=r"holds rows of amu-\w{8}, this is gda-\w{8}; name another --out"):
        predict.predict(other, [str(photos)], out)
    with pytest.raises(ValueError, match="no image or folder"):
        predict.predict(folder, [str(tmp_path / "nowhere")], out)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no images in .*empty"):
        predict.predict(folder, [str(tmp_path / "empty")], out)


def test_features_of_a_bank_or_of_arrays_predict_no_image(make_arrays, make_task, photos, tmp_path):
    arrays = make_arrays()
    parts = {split: arrays[name] for split, name in (("train", "support"), ("val", "val"), ("test", "test"))}
    bank = save_bank(
        tmp_path / "bank",
        clip={"clip_x": {split: part["clip"] for split, part in parts.items()}},
        aux={"aux_y": {split: part["aux"] for split, part in parts.items()}},
        labels={split: part["y"] for split, part in parts.items()},
        class_names=[f"class {c}" for c in range(5)],
        text={"clip_x": arrays["text"]},
    )
    [task] = tasks.draw(tasks.load_source(f"features:{bank}"), 4, 1)
    for i, (one, words) in enumerate(((task, "a bank's files clip_x, aux_y"), (make_task(), "plain arrays"))):
        method = methods.build("gda").fit(one)
        folder = method.save(tmp_path / str(i))
        assert torch.equal(methods.load(folder).logits(one.test), method.logits(one.test))
        with pytest.raises(ValueError, match=f"gda was fitted on {words}"):
            predict.predict(folder, [str(photos)], tmp_path / "p.csv")
    assert not Path(tmp_path / "p.csv").exists()
