"""Extraction that survives: images to a bank of features in numbered shards, resumed after any interruption.

A bank's folder holds, while it grows, `shard-00012-SHA256.safetensors`: features [views, m, D] and the row numbers
[m] of up to SHARD images, the file's own sha256 in its name. A shard is written under a temporary name, synced,
then renamed, so that a file with a final name is whole; one whose content does not match its name is computed
again. When no shard is missing they are joined into `features.safetensors`, and `manifest.json` is written last.
Batches never cross shards: on the same device and with the same batch size, an interrupted run ends with the same
bytes as an uninterrupted one.
"""

import hashlib
import json
import math
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from filelock import FileLock, Timeout
from jaxtyping import Float, Int64
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from lib.features import encoders as backbones
from lib.features.encoders import Encoder
from lib.features.images import ImageSplit
from lib.files import file_hash, replace_file

SHARD = 256  # images
AUGMENTATION_SEED = 1


@dataclass(frozen=True)
class Job:
    """One bank to make: where, under which encoder, and the ingredients of its fingerprint."""

    encoder: str
    folder: Path
    ingredients: Mapping[str, Any]
    fingerprint: str


def extract(
    jobs: Sequence[Job],
    images: ImageSplit,
    *,
    views: int,
    device: str,
    precision: str,
    batch_size: int,
    num_workers: int,
    quarantine: bool,
) -> None:
    """Make several banks of the same images, decoding each image once.

    Args:
        views: 1 for the plain image; more for that many random crops and flips of each.
        batch_size: network inputs at once, views included.
        num_workers: processes that decode; 0 decodes here.
        quarantine: leave out images that cannot be decoded, with their labels, instead of stopping.

    Raises:
        ValueError: the cache cannot be written or has no room, an image cannot be decoded, an encoder gives
            values that are not finite.
    """
    encoders = [backbones.load_encoder(job.encoder, device, precision) for job in jobs]
    for job, encoder in zip(jobs, encoders, strict=True):
        _require_room(job.folder, len(images) * views * encoder.dim * 4)
    total, per_batch = len(images), max(1, batch_size // views)
    shards = set(range(-(-total // SHARD)))
    missing = [shards - set(_shards(job.folder)) for job in jobs]
    batches = {shard: _batches(shard, total, per_batch) for shard in sorted(set().union(*missing))}
    done = total - sum(len(batch) for found in batches.values() for batch in found)
    decoder = _Decoder(images, [e.transform if views == 1 else e.augment for e in encoders], views)
    names = ", ".join(job.encoder for job in jobs)
    bar = tqdm(total=total, initial=done, unit="img", desc=names, disable=None)
    with closing(_decoded(decoder, [b for found in batches.values() for b in found], num_workers)) as decoded, bar:
        for shard, found in batches.items():
            lacking = [shard in lost for lost in missing]
            parts: list[list[Tensor]] = [[] for _ in jobs]
            kept: list[int] = []
            bad: dict[str, str] = {}
            for batch in found:
                inputs = next(decoded)
                failed = {images.ids[row]: error for row, error, _ in inputs if error}
                if failed and not quarantine:
                    raise ValueError(_undecodable(failed))
                bad |= failed
                rows = [row for row, error, _ in inputs if not error]
                kept += rows
                for place, encoder in enumerate(encoders):
                    if rows and lacking[place]:
                        views_of_rows = torch.stack([tensors[place] for _, error, tensors in inputs if not error])
                        parts[place].append(_encode(encoder, views_of_rows, images, rows))
                bar.update(len(batch))
            for place, job in enumerate(jobs):
                if lacking[place]:
                    x = torch.cat(parts[place] or [torch.empty(views, 0, encoders[place].dim)], dim=1)
                    _write_shard(job.folder, shard, x, kept, bad)
    for job, encoder in zip(jobs, encoders, strict=True):
        _join(job, images, encoder, views, len(shards))


def read(job: Job) -> tuple[Float[Tensor, "..."], Int64[Tensor, " n"], dict[str, Any]] | None:
    """Return a finished bank (features mapped into memory, labels, manifest), or None if it must be made.

    A damaged bank is named in a warning and counts as not made.
    """
    manifest_path, data_path = job.folder / "manifest.json", job.folder / "features.safetensors"
    if not manifest_path.is_file():
        return None
    try:
        manifest = json.loads(manifest_path.read_text())
        if manifest["fingerprint"] != job.fingerprint:
            raise ValueError(f"its fingerprint is {manifest['fingerprint'][:12]}…, not {job.fingerprint[:12]}…")
        found = file_hash(data_path)
        if found != manifest["sha256"]:
            raise ValueError(f"sha256 is {found[:12]}…, the manifest says {manifest['sha256'][:12]}…")
        with safe_open(data_path, framework="pt") as stored:
            return stored.get_tensor("x"), stored.get_tensor("y"), manifest
    except (ValueError, KeyError, TypeError, OSError, SafetensorError) as error:
        warnings.warn(f"damaged cache {data_path} ({error}); extracting again", stacklevel=3)
        return None


def write(job: Job, shape: Sequence[int], chunks: Iterable[Tensor], facts: Mapping[str, Any]) -> None:
    """Write a bank piece by piece, then its manifest: labels (int64) first, then features (float32) of `shape`."""
    digests: list[str] = []
    target = job.folder / "features.safetensors"
    replace_file(target, lambda stream: digests.append(_stream(stream, shape, chunks)))
    manifest = {
        "fingerprint": job.fingerprint,
        "sha256": digests[0],
        "shape": list(shape),
        "ingredients": dict(job.ingredients),
        **facts,
    }
    text = json.dumps(manifest, indent=1, sort_keys=True).encode()
    replace_file(job.folder / "manifest.json", lambda stream: stream.write(text))


class locked:
    """Hold a folder for one writer; a second process waits until the first has finished or died."""

    def __init__(self, folder: Path):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(folder / ".lock")
            self._lock.acquire(timeout=0)
        except Timeout:
            print(f"another process is making {folder}; waiting for it", file=sys.stderr)
            self._lock.acquire()
        except NotImplementedError:  # a file system without locks: two writers then do the same work, harmlessly
            pass
        except OSError as error:
            raise ValueError(
                f"the cache {folder} cannot be written ({error.strerror}); name another by LOGIT_BIAS_CACHE"
            ) from error

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        self._lock.release()


class _Decoder(Dataset):
    """Row number to (row, error, one tensor [views, 3, h, w] per encoder); runs in the loader's workers."""

    def __init__(self, images: ImageSplit, transforms: Sequence[Callable[..., Tensor]], views: int):
        self.images, self.transforms, self.views = images, transforms, views

    def __getitem__(self, row: int) -> tuple[int, str, list[Tensor]]:
        try:
            image = self.images[row]
            return row, "", [self._views(image, transform, row) for transform in self.transforms]
        except Exception as error:  # decoders raise anything; the caller names the file and decides
            return row, " ".join(f"{type(error).__name__}: {error}".split()), []

    def _views(self, image: Any, transform: Callable[..., Tensor], row: int) -> Tensor:
        if self.views == 1:
            return transform(image)[None]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(AUGMENTATION_SEED + row)  # every encoder sees the same crops, whoever decodes
            return torch.stack([transform(image) for _ in range(self.views)])


def _decoded(decoder: _Decoder, batches: Sequence[Sequence[int]], num_workers: int) -> Iterator[list[tuple]]:
    """Yield decoded batches in order; closing it ends the worker processes at once."""
    generator = torch.Generator()  # the loader would otherwise draw from the caller's
    loader = DataLoader(decoder, batch_sampler=batches, num_workers=num_workers, collate_fn=list, generator=generator)
    yield from loader


def _encode(
    encoder: Encoder, batch: Float[Tensor, "b v 3 h w"], images: ImageSplit, rows: Sequence[int]
) -> Float[Tensor, "v b D"]:
    x = encoder.encode_images(batch.flatten(0, 1)).unflatten(0, batch.shape[:2]).transpose(0, 1)
    finite = torch.isfinite(x).all(dim=2).all(dim=0)
    if not finite.all():
        first = images.ids[rows[int((~finite).nonzero()[0])]]
        raise ValueError(
            f"{encoder.name} gives NaN or infinite features for {int((~finite).sum())} images, first {first}"
        )
    return x


def _rows(shard: int, total: int) -> range:
    return range(shard * SHARD, min(total, (shard + 1) * SHARD))


def _batches(shard: int, total: int, size: int) -> list[range]:
    rows = _rows(shard, total)
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _shards(folder: Path) -> dict[int, Path]:
    """Return the whole shards of a folder; others are deleted and named in a warning."""
    found = {}
    for path in sorted(folder.glob("shard-*.safetensors")):
        _, number, digest = path.stem.split("-")
        if file_hash(path) == digest:
            found[int(number)] = path
        else:
            warnings.warn(f"damaged shard {path}; computing it again", stacklevel=4)
            path.unlink(missing_ok=True)
    return found


def _write_shard(folder: Path, shard: int, x: Tensor, rows: list[int], bad: Mapping[str, str]) -> None:
    data = save({"x": x.contiguous(), "rows": torch.tensor(rows, dtype=torch.int64)}, {"bad": json.dumps(bad)})
    path = folder / f"shard-{shard:05d}-{hashlib.sha256(data).hexdigest()}.safetensors"
    replace_file(path, lambda stream: stream.write(data))


def _join(job: Job, images: ImageSplit, encoder: Encoder, views: int, count: int) -> None:
    """Write the bank from its shards, one view after another, then the manifest, then drop the shards."""
    paths = _shards(job.folder)
    opened = [safe_open(paths[shard], framework="pt") for shard in range(count)]
    kept = torch.cat([stored.get_tensor("rows") for stored in opened]) if opened else torch.empty(0, dtype=torch.int64)
    bad = {image: why for stored in opened for image, why in json.loads(stored.metadata()["bad"]).items()}
    if len(kept) == 0:
        raise ValueError(f"no image could be decoded: {_undecodable(bad)}" if bad else "the split holds no images")

    def chunks() -> Iterator[Tensor]:
        yield images.labels[kept]
        for view in range(views):
            for stored in opened:
                yield stored.get_slice("x")[view : view + 1]

    shape = [len(kept), encoder.dim] if views == 1 else [views, len(kept), encoder.dim]
    facts = {"images": len(kept), "views": views, "quarantined": bad, "device": encoder.device.type}
    write(job, shape, chunks(), facts)
    for leftover in (*job.folder.glob("shard-*"), *job.folder.glob(".*.tmp")):
        leftover.unlink(missing_ok=True)


def _stream(stream: BinaryIO, shape: Sequence[int], chunks: Iterable[Tensor]) -> str:
    """Write a safetensors file with `y` (int64) then `x` (float32) piece by piece; return its sha256.

    The library writes from memory only, and a bank may be larger than that. The format: the header's length as
    8 bytes, the header as JSON padded to a multiple of 8, the tensors' bytes.
    """
    n, size = shape[-2], 4 * math.prod(shape)
    layout = {
        "y": {"dtype": "I64", "shape": [n], "data_offsets": [0, 8 * n]},
        "x": {"dtype": "F32", "shape": list(shape), "data_offsets": [8 * n, 8 * n + size]},
    }
    header = json.dumps(layout).encode()
    header += b" " * (-len(header) % 8)
    digest = hashlib.sha256()
    for piece in (len(header).to_bytes(8, "little"), header, *(chunk.contiguous().numpy() for chunk in chunks)):
        digest.update(piece)
        stream.write(piece)
    return digest.hexdigest()


def _require_room(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free + sum(path.stat().st_size for path in folder.glob("shard-*"))
    if free < 2 * size:
        raise ValueError(
            f"{folder} has {free / 1e6:.1f} MB free, extraction needs {2 * size / 1e6:.1f} MB (shards, then the bank); "
            "make room or name another cache by LOGIT_BIAS_CACHE"
        )


def _undecodable(failed: Mapping[str, str]) -> str:
    image, why = next(iter(failed.items()))
    more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
    return f"image {image}{more} cannot be decoded: {why}; repair it, or leave such images out by quarantine=True"
