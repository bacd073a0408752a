"""Extraction that survives: images to cached features in numbered shards, resumed after any interruption.

The fingerprint of an entry covers the images' manifest, the split, the encoder's name, weights and preprocessing, the
precision, the views and the version of this code. While an entry's folder grows it holds
`shard-00012-SHA256.safetensors`: features [views, m, D] and the row numbers [m] of up to SHARD images, the file's own
sha256 in its name; one whose content does not match its name is computed again. When no shard is missing they are
joined into `features.safetensors`, and `manifest.json` is written last. Batches never cross shards: on one device and
with one batch size, an interrupted run ends with the same bytes as an uninterrupted one. Locks are held by shard, so as
many processes as are started on the same images, on one machine or on several, share the work.
"""

import hashlib
import json
import math
import re
import shutil
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass
from itertools import chain, islice
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

from lib.features.encoders import Encoder, EncoderSpec, load_encoder
from lib.features.images import ImageSplit
from lib.files import file_hash, locked, one_line, replace_file, write_json

VERSION = 1  # raise it when the same images and weights would give other features
SHARD = 256  # images
AUGMENTATION_SEED = 1
Entry = tuple[Float[Tensor, "..."], Int64[Tensor, " n"], dict[str, Any]]  # features (mapped), labels, manifest


@dataclass(frozen=True)
class Job:
    """An entry of the cache."""

    encoder: str
    folder: Path
    ingredients: Mapping[str, Any]  # of its fingerprint
    fingerprint: str


def make_job(spec: EncoderSpec, place: Path, precision: str, **further: Any) -> Job:
    """The entry below `place` whose features depend on the encoder, the precision and `further`."""
    ingredients = {"version": VERSION, "encoder": spec.name, "weights": spec.weights_hash, "precision": precision}
    ingredients |= {"preprocess": dict(spec.preprocess), "settings": dict(spec.settings), **further}
    digest = fingerprint(ingredients)
    return Job(spec.name, place / f"{slug(spec.name)}-{digest[:16]}", ingredients, digest)


def fingerprint(ingredients: Mapping[str, Any]) -> str:
    """sha256 of a mapping that JSON can hold."""
    return hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()


def slug(text: str) -> str:
    """A file name of at most 80 characters."""
    return re.sub(r"[^A-Za-z0-9.@_-]+", "_", text)[-80:]


def cached(jobs: Sequence[Job], make: Callable[[list[Job]], None], shared: bool = False) -> list[Entry]:
    """The entries of `jobs`; those that are missing are handed to `make`.

    Their folders are locked meanwhile, unless `make` itself shares the work with other processes (`shared`).
    """
    missing = {job.folder: job for job in jobs if read(job) is None}
    with ExitStack() as stack:
        for folder in sorted(missing):
            stack.enter_context(locked(folder))
        todo = [job for job in missing.values() if read(job) is None]  # another process may have made it
        for job in todo:
            (job.folder / "manifest.json").unlink(missing_ok=True)  # of a damaged entry
        if shared:
            stack.close()
        if todo:
            make(todo)
    return [read(job) for job in jobs]


def read(job: Job) -> Entry | None:
    """A finished entry, or None if it must be made; a damaged one is named in a warning and counts as not made."""
    path = job.folder / "features.safetensors"
    if not (job.folder / "manifest.json").is_file():
        return None
    try:
        manifest = json.loads((job.folder / "manifest.json").read_text())
        if manifest["fingerprint"] != job.fingerprint:
            raise ValueError(f"its fingerprint is {manifest['fingerprint'][:12]}…, not {job.fingerprint[:12]}…")
        if file_hash(path) != manifest["sha256"]:
            raise ValueError(f"sha256 is {file_hash(path)[:12]}…, the manifest says {manifest['sha256'][:12]}…")
        with safe_open(path, framework="pt") as stored:
            return stored.get_tensor("x"), stored.get_tensor("y"), manifest
    except (ValueError, KeyError, TypeError, OSError, SafetensorError) as error:
        warnings.warn(f"damaged cache {path} ({error}); extracting again", stacklevel=3)
        return None


def write(job: Job, shape: Sequence[int], chunks: Iterable[Tensor], **facts: Any) -> None:
    """Write an entry piece by piece, then its manifest: labels (int64) first, then features (float32) of `shape`.

    safetensors itself writes from memory only, and an entry may be larger than that. Its format: the header's length
    as 8 bytes, the header as JSON padded to a multiple of 8, the tensors' bytes.
    """
    n, size = shape[-2], 4 * math.prod(shape)
    y = {"dtype": "I64", "shape": [n], "data_offsets": [0, 8 * n]}
    x = {"dtype": "F32", "shape": list(shape), "data_offsets": [8 * n, 8 * n + size]}
    header = json.dumps({"y": y, "x": x}).encode()
    header += b" " * (-len(header) % 8)
    digest = hashlib.sha256()

    def write_pieces(stream: BinaryIO) -> None:
        for piece in (len(header).to_bytes(8, "little"), header, *(chunk.contiguous().numpy() for chunk in chunks)):
            digest.update(piece)
            stream.write(piece)

    replace_file(job.folder / "features.safetensors", write_pieces)
    manifest = {"fingerprint": job.fingerprint, "sha256": digest.hexdigest(), "shape": list(shape), **facts}
    write_json(job.folder / "manifest.json", manifest | {"ingredients": dict(job.ingredients)})


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
    """Make several entries of the same images, decoding each image once; see `load.load_many` for the options."""
    encoders = [load_encoder(job.encoder, device, precision) for job in jobs]
    for job, encoder in zip(jobs, encoders, strict=True):
        _require_room(job.folder, len(images) * views * encoder.dim * 4)
    count, size = math.ceil(len(images) / SHARD), max(1, batch_size // views)
    whole = [set(_shards(job.folder)) for job in jobs]
    missing = [shard for shard in range(count) if any(shard not in there for there in whole)]
    decoder = _Decoder(images, [e.transform if views == 1 else e.augment for e in encoders], views)
    bar = tqdm(total=len(images), unit="img", desc=", ".join(job.encoder for job in jobs), disable=None)
    bar.update(len(images) - sum(len(_rows(shard, len(images))) for shard in missing))
    for wait in (False, True):  # first what nobody else works on, then what another process may have left behind
        claimed: deque[_Claim] = deque()
        with ExitStack() as stack, bar if wait else nullcontext():
            batches = _claim(missing, jobs, len(images), size, wait, claimed, stack)
            generator = torch.Generator()  # the loader would otherwise draw from the caller's
            options = {"num_workers": num_workers, "collate_fn": list, "generator": generator}
            loader = DataLoader(decoder, batch_sampler=batches, **options)
            decoded = stack.enter_context(closing(batch for batch in loader))  # closing ends the workers at once
            for head in decoded:
                claim = claimed.popleft()
                items = chain([head], islice(decoded, len(claim.batches) - 1))
                _encode_shard(claim, items, jobs, images, encoders, views, quarantine, bar)
    for job, encoder in zip(jobs, encoders, strict=True):
        with locked(job.folder):
            if read(job) is None:
                _join(job, images, encoder, views, count)
            for lock in job.folder.glob(".shard-*.lock"):
                lock.unlink(missing_ok=True)


@dataclass
class _Claim:
    """A shard that this process computes, for the jobs whose lock on it it holds."""

    shard: int
    locks: dict[int, FileLock]  # by the job's number
    batches: list[range]  # row numbers


def _rows(shard: int, count: int) -> range:
    return range(count)[shard * SHARD :][:SHARD]


def _claim(
    missing: Iterable[int],
    jobs: Sequence[Job],
    count: int,
    size: int,
    wait: bool,
    claimed: deque[_Claim],
    stack: ExitStack,
) -> Iterator[range]:
    """The batches of all shards that can be claimed, each claim put into `claimed` before its first batch is given.

    A shard that another process holds is passed over, or waited for; `stack` releases all claims in the end.
    """
    for shard in missing:
        locks = {}
        for i, job in enumerate(jobs):
            lock = FileLock(job.folder / f".shard-{shard:05d}.lock")
            try:
                lock.acquire(blocking=wait)
            except Timeout:
                continue
            except NotImplementedError:  # a file system without locks: the same work twice, harmlessly
                pass
            stack.callback(lock.release)
            if any(job.folder.glob(f"shard-{shard:05d}-*")) or (job.folder / "manifest.json").exists():
                lock.release()
            else:
                locks[i] = lock
        if locks:
            rows = _rows(shard, count)
            claimed.append(_Claim(shard, locks, [rows[start : start + size] for start in range(0, len(rows), size)]))
            yield from claimed[-1].batches


def _encode_shard(
    claim: _Claim,
    decoded: Iterable[list],
    jobs: Sequence[Job],
    images: ImageSplit,
    encoders: Sequence[Encoder],
    views: int,
    quarantine: bool,
    bar: tqdm,
) -> None:
    """Write one shard of each claimed job from decoded batches."""
    parts: dict[int, list[Tensor]] = {i: [] for i in claim.locks}
    kept: list[int] = []
    bad: dict[str, str] = {}
    for batch, items in zip(claim.batches, decoded, strict=True):
        bad |= {images.ids[row]: error for row, error, _ in items if error}
        if bad and not quarantine:
            raise ValueError(_undecodable(bad))
        rows = [row for row, error, _ in items if not error]
        kept += rows
        for i, encoded in parts.items() if rows else ():
            inputs = torch.stack([tensors[i] for _, error, tensors in items if not error])
            encoded.append(_encode(encoders[i], inputs, [images.ids[row] for row in rows]))
        bar.update(len(batch))
    for i, encoded in parts.items():
        x = torch.cat(encoded, dim=1) if encoded else torch.empty(views, 0, encoders[i].dim)
        data = save({"x": x, "rows": torch.tensor(kept, dtype=torch.int64)}, {"bad": json.dumps(bad)})
        path = jobs[i].folder / f"shard-{claim.shard:05d}-{hashlib.sha256(data).hexdigest()}.safetensors"
        replace_file(path, lambda stream, data=data: stream.write(data))
        claim.locks[i].release()


@dataclass
class _Decoder(Dataset):
    """Row number to (row, error, one tensor [views, 3, h, w] per encoder); runs in the loader's workers."""

    images: ImageSplit
    transforms: Sequence[Callable[..., Tensor]]
    views: int

    def __getitem__(self, row: int) -> tuple[int, str, list[Tensor]]:
        try:
            image = self.images[row]
            return row, "", [self._views(image, transform, row) for transform in self.transforms]
        except Exception as error:  # decoders raise anything; the caller names the file and decides
            return row, f"{type(error).__name__}: {one_line(error)}", []

    def _views(self, image: Any, transform: Callable[..., Tensor], row: int) -> Tensor:
        if self.views == 1:
            return transform(image)[None]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(AUGMENTATION_SEED + row)  # every encoder sees the same crops, whoever decodes
            return torch.stack([transform(image) for _ in range(self.views)])


def _encode(encoder: Encoder, batch: Float[Tensor, "b v 3 h w"], ids: Sequence[str]) -> Float[Tensor, "v b D"]:
    x = encoder.encode_images(batch.flatten(0, 1)).unflatten(0, batch.shape[:2]).transpose(0, 1)
    wrong = [name for name, finite in zip(ids, torch.isfinite(x).all(dim=2).all(dim=0), strict=True) if not finite]
    if wrong:
        raise ValueError(f"{encoder.name} gives NaN or infinite features for {len(wrong)} images, first {wrong[0]}")
    return x


def _shards(folder: Path) -> dict[int, Path]:
    """The whole shards of a folder; others are deleted and named in a warning."""
    shards = {path: path.stem.split("-") for path in sorted(folder.glob("shard-*.safetensors"))}
    damaged = [path for path, (_, _, digest) in shards.items() if file_hash(path) != digest]
    for path in damaged:
        warnings.warn(f"damaged shard {path}; computing it again", stacklevel=4)
        path.unlink(missing_ok=True)
    return {int(number): path for path, (_, number, _) in shards.items() if path not in damaged}


def _join(job: Job, images: ImageSplit, encoder: Encoder, views: int, count: int) -> None:
    """Write the entry from its shards, one view after another, then drop the shards."""
    paths = _shards(job.folder)
    opened = [safe_open(paths[shard], framework="pt") for shard in range(count)]
    kept = torch.cat([torch.empty(0, dtype=torch.int64), *(stored.get_tensor("rows") for stored in opened)])
    bad = {image: why for stored in opened for image, why in json.loads(stored.metadata()["bad"]).items()}
    if len(kept) == 0:
        raise ValueError(f"no image could be decoded: {_undecodable(bad)}" if bad else "the split holds no images")

    def chunks() -> Iterator[Tensor]:
        yield images.labels[kept]
        for view in range(views):
            for stored in opened:
                yield stored.get_slice("x")[view : view + 1]

    shape = [len(kept), encoder.dim] if views == 1 else [views, len(kept), encoder.dim]
    write(job, shape, chunks(), images=len(kept), views=views, quarantined=bad, device=encoder.device.type)
    for leftover in (*job.folder.glob("shard-*"), *job.folder.glob(".*.tmp")):
        leftover.unlink(missing_ok=True)


def _require_room(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free + sum(path.stat().st_size for path in folder.glob("shard-*"))
    if free < 2 * size:
        lack = f"{folder} has {free / 1e6:.1f} MB free, extraction needs {2 * size / 1e6:.1f} MB (shards, then all)"
        raise ValueError(f"{lack}; make room or name another cache by LOGIT_BIAS_CACHE")


def _undecodable(failed: Mapping[str, str]) -> str:
    image, why = next(iter(failed.items()))
    more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
    return f"image {image}{more} cannot be decoded: {why}; repair it, or leave such images out by quarantine=True"
