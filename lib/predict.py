"""New images through a saved method: a row of a csv file for each, written batch by batch, continued after a kill.

    push = (s_c - s0_c) - (s_z - s0_z),    c the method's answer, z that of zero-shot CLIP

The push is what the bias adds to the answer against zero-shot CLIP's: 0 where both agree. Batches are cut by the order
of the images, so that a run that was killed ends with the same bytes as one that was not.
"""

import csv
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from lib import methods
from lib.features import load_encoder
from lib.features.encoders import Encoder
from lib.features.images import ENDINGS, decode
from lib.files import one_line, replace_file
from lib.splits import unlabelled

COLUMNS = ("path", "class", "probability", "zero_shot", "push", "reason", "method")
BATCH = 32
TEXT = {"encoding": "utf-8", "errors": "surrogateescape"}  # a file's name may be any bytes
Row = dict[str, str]


def image_paths(places: Sequence[str]) -> list[str]:
    """The images named, and those in folders at any depth; each once, as their paths were typed."""
    paths: dict[str, None] = {}
    for place in map(Path, places):
        if not place.exists():
            raise ValueError(f"no image or folder {place}")
        inside = [p for p in sorted(place.rglob("*")) if p.suffix.lower() in ENDINGS and not p.name.startswith(".")]
        taken = [p for p in inside if p.is_file()] if place.is_dir() else [place]
        if not taken:
            raise ValueError(f"no images in {place}; they end in {', '.join(ENDINGS)}")
        paths |= dict.fromkeys(map(str, taken))
    return list(paths)


def predict(
    folder: Path,  # of a saved method
    places: Sequence[str],
    out: Path,
    encoders: Sequence[str] = (),  # their names now, see `methods.load`
    device: str = "auto",
) -> list[Row]:
    """Write `out`, a row an image, and return all rows in its order; those it already has are not computed again."""
    method, paths = methods.load(folder, encoders), image_paths(places)
    if "encoders" not in method.facts_:
        made_of = f"a bank's files {', '.join(method.facts_['bank'])}" if "bank" in method.facts_ else "plain arrays"
        raise ValueError(
            f"{folder}: {method.name} was fitted on {made_of}, and no encoder is known that turns an image into such "
            f"features; fit on images (folder:, csv:, a benchmark) with encoders by name"
        )
    name = f"{method.name}-{json.loads((folder / 'card.json').read_text())['card_sha256'][:8]}"
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out.with_name(f".{out.name}.lock"))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise ValueError(f"another process is writing {out}; wait for it, or name another --out") from None
    except NotImplementedError:  # a file system without locks
        pass
    try:
        rows = _finished(out, name)
        done = {row["path"] for row in rows}
        parts = [paths[start : start + BATCH] for start in range(0, len(paths), BATCH)]
        todo = [part for part in parts if not done.issuperset(part)]
        nets = _networks(method, device) if todo else []
        bar = tqdm(total=len(paths), initial=sum(path in done for path in paths), unit="img", desc=method.name)
        with open(out, "a", newline="", **TEXT) as stream, bar:
            for part in todo:
                new = [row | {"method": name} for row in _answers(method, nets, part) if row["path"] not in done]
                stream.write(_text(new))
                stream.flush()
                os.fsync(stream.fileno())
                rows += new
                bar.update(len(new))
    finally:
        lock.release()
    return rows


def _networks(method: methods.Method, device: str) -> list[Encoder]:
    entries = method.facts_["encoders"]
    loaded = {entry["name"]: load_encoder(entry["name"], device, entry["precision"]) for entry in entries}
    return [loaded[entry["name"]] for entry in entries]


def _answers(method: methods.Method, nets: Sequence[Encoder], paths: Sequence[str]) -> list[Row]:
    """Rows of a batch; an image that cannot be decoded has an empty class and the reason."""
    rows, inputs = {path: dict.fromkeys(COLUMNS, "") | {"path": path} for path in paths}, {}
    for path in paths:
        try:
            image = decode(Path(path))
            inputs[path] = [net.transform(image) for net in nets]
        except Exception as error:  # decoders raise anything
            rows[path]["reason"] = f"{type(error).__name__}: {one_line(error)}"
    if not inputs:
        return list(rows.values())
    batches = [torch.stack([tensors[i] for tensors in inputs.values()]) for i in range(len(nets))]
    clip, *aux = (net.encode_images(batch) for net, batch in zip(nets, batches, strict=True))
    names = method.facts_["classnames"]
    split = unlabelled(clip, aux, method.text_, len(names), "new images")
    logits, s0 = method.logits(split), split.zero_shot
    answer, first, added = logits.argmax(1), s0.argmax(1), logits - s0
    sure = logits.softmax(1).gather(1, answer[:, None])[:, 0].tolist()
    pushes = (added.gather(1, answer[:, None]) - added.gather(1, first[:, None]))[:, 0].tolist()
    for path, c, z, p, push in zip(inputs, answer.tolist(), first.tolist(), sure, pushes, strict=True):
        rows[path] |= {"class": names[c], "probability": f"{p:.4f}"}
        if method.text_ is not None:
            rows[path] |= {"zero_shot": names[z], "push": f"{push:.3f}"}
    return list(rows.values())


def _finished(out: Path, name: str) -> list[Row]:
    """Rows that an earlier start has finished; what a kill left of a row is cut off, a new file gets its header."""
    content = out.read_bytes().decode(**TEXT) if out.exists() else ""
    reader = csv.DictReader(io.StringIO(content[: content.rfind("\n") + 1], newline=""))
    if reader.fieldnames and tuple(reader.fieldnames) != COLUMNS:
        raise ValueError(f"{out} is another table, with columns {', '.join(reader.fieldnames)}; name another --out")
    rows = [row for row in reader if None not in row and None not in row.values()]
    if others := {row["method"] for row in rows} - {name}:
        raise ValueError(f"{out} holds rows of {', '.join(sorted(others))}, this is {name}; name another --out")
    whole = ",".join(COLUMNS) + "\n" + _text(rows)
    if whole != content:
        replace_file(out, lambda stream: stream.write(whole.encode(**TEXT)))
    return rows


def _text(rows: Sequence[Row]) -> str:
    stream = io.StringIO(newline="")
    csv.DictWriter(stream, COLUMNS, lineterminator="\n").writerows(rows)
    return stream.getvalue()
