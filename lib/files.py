"""Where things lie, and files that are whole or not there: roots, paths a user typed, hashes, locks, atomic writes."""

import difflib
import hashlib
import json
import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

ROOT = Path(__file__).resolve().parents[1]


def data_root(root: Path | None = None) -> Path:
    """Folder of data sets: the argument, else LOGIT_BIAS_DATA, else data/downloads."""
    return Path(root or os.environ.get("LOGIT_BIAS_DATA") or ROOT / "data" / "downloads")


def cache_root(cache: Path | None = None) -> Path:
    """Folder of cached features: the argument, else LOGIT_BIAS_CACHE, else data/cache."""
    return Path(cache or os.environ.get("LOGIT_BIAS_CACHE") or ROOT / "data" / "cache")


def find_path(text: str | Path) -> Path:
    """Path that a user typed; a relative one is looked for where the command was given, then below the root."""
    path = Path(text).expanduser()  # a kernel runs in the root: LOGIT_BIAS_CWD is where its command was given
    here = Path(os.environ.get("LOGIT_BIAS_CWD") or Path.cwd()) / path
    return here if path.is_absolute() or here.exists() else ROOT / path


def file_hash(path: Path) -> str:
    """sha256 of a file; computed again only where its size or time of change differ."""
    stat = path.stat()
    return _file_hash(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=256)
def _file_hash(path: Path, *_: int) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def commit() -> str:
    """Commit of the workbook, with `+` where files differ from it, the gallery aside; empty outside a checkout."""
    command = "git status --porcelain=v2 --branch -- . :(exclude)figures/*.*g :(exclude)figures/*.json"
    try:
        lines = subprocess.run(
            command.split(), cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return ""
    return lines[0].removeprefix("# branch.oid ") + "+" * any(not line.startswith("#") for line in lines)


@contextmanager
def locked(folder: Path, variable: str = "LOGIT_BIAS_CACHE") -> Iterator[None]:
    """Hold `folder`, made where it is missing, for one writer; a second process waits for the first to end or die.

    Where the folder cannot be written, a ValueError names `variable`, by which the user chooses another.
    """
    lock = FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout:
        print(f"another process is making {folder}; waiting for it", file=sys.stderr)
        lock.acquire()
    except NotImplementedError:  # a file system without locks: two writers then do the same work, harmlessly
        pass
    except OSError as error:
        raise ValueError(f"{folder} cannot be written ({error.strerror}); name another by {variable}") from error
    try:
        yield
    finally:
        lock.release()


def replace_file(path: Path, write: Callable[[BinaryIO], object]) -> Path:
    """Write a file so that it is either whole under its name, or not there; an OSError names it."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with open(partial, "wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path}: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)
    return path


def write_json(path: Path, value: object) -> Path:
    """Write JSON in one step; NaN and infinity are refused."""
    text = json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    return replace_file(path, lambda stream: stream.write(text.encode()))


def nearest(name: str, names: Iterable[str], count: int = 1) -> str:
    """Hint for an unknown name: `did you mean 'x'? known: x, y, z`; more than 60 names are not spelt out."""
    names = list(names)
    close = difflib.get_close_matches(name, names, n=count, cutoff=0.4)
    hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
    return f"{hint}known: {', '.join(names) if len(names) <= 60 else f'{len(names)} names'}"


def one_line(error: BaseException | str) -> str:
    """A message, or that of an error, on one line, at most 300 characters."""
    return " ".join(str(error).split())[:300] or type(error).__name__
