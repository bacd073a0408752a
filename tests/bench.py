"""Measuring speed: paired runs of two ways to one result, what the machine can do at all, and the plain loops to beat.

A shared machine is noisy, so two ways are run in turns and their ratio is taken pair by pair. The plain loops are
what one writes first, with the same arithmetic and nothing slow added; ours must give what they give.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int64
from PIL import Image
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from lib import features, methods, tasks
from lib.tasks import FewShotTask

ZERO_SHOT, AUXILIARY = 3.0, 7.0  # how far classes lie apart: of 100 classes zero-shot finds two thirds


def machine() -> dict[str, object]:
    """Return what a timing depends on: processor, cores, torch's threads, memory in GiB, torch."""
    cpu, memory = platform.processor() or platform.machine(), None
    if (info := Path("/proc/cpuinfo")).exists():
        cpu = re.search(r"model name\s*:\s*(.*)", info.read_text() + "model name: " + cpu)[1]
        memory = round(int(re.search(r"MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text())[1]) / 2**20, 1)
    return {
        "processor": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory": memory,
        "torch": torch.__version__,
    }


def in_turns(ways: Mapping[str | int, Callable[[], object]], repeats: int) -> pd.DataFrame:
    """Time every way `repeats` times, one after another in turns.

    Returns:
        One row per repetition, one column of seconds per way.
    """
    rows = []
    for turn in range(repeats):
        names = list(ways) if turn % 2 == 0 else list(reversed(ways))
        rows.append({name: seconds(ways[name]) for name in names})
    return pd.DataFrame(rows, columns=list(ways))


def seconds(way: Callable[[], object]) -> float:
    """Return the wall-clock seconds of one call."""
    begin = time.perf_counter()
    way()
    return time.perf_counter() - begin


def on_threads(count: int, way: Callable[[], object]) -> object:
    """Return what `way()` returns while torch may use `count` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return way()
    finally:
        torch.set_num_threads(before)


def ratio(slow: pd.Series, fast: pd.Series) -> tuple[float, float, float]:
    """Return median, least and largest of the ratios slow / fast of the pairs."""
    each = slow / fast
    return float(each.median()), float(each.min()), float(each.max())


def product_rate(size: int = 2048, repeats: int = 5) -> float:
    """Return the rate of a square float32 matrix product in GFLOP/s, the best of a few."""
    a, b, out = torch.rand(3, size, size)
    torch.mm(a, b, out=out)
    return 2e-9 * size**3 / min(seconds(lambda: torch.mm(a, b, out=out)) for _ in range(repeats))


def bandwidth(size: int = 2**26, repeats: int = 5) -> float:
    """Return how fast memory is copied, bytes read plus bytes written, in GB/s, the best of a few."""
    a, out = torch.rand(2, size)
    return 8e-9 * size / min(seconds(lambda: out.copy_(a)) for _ in range(repeats))


def import_seconds(module: str, repeats: int = 3) -> float:
    """Return the median time a fresh Python needs to import a module, beyond the time it needs to start."""
    spent = [
        seconds(lambda code=code: subprocess.run([sys.executable, "-c", code], check=True))
        for _ in range(repeats)
        for code in ("", f"import {module}")
    ]
    return float(np.median(np.subtract(spent[1::2], spent[::2])))


def random_arrays(
    classes: int, shots: int, dim: int = 1024, aux_dim: int = 2048, test_images: int = 2000, seed: int = 0
) -> dict[str, Tensor | dict[str, Tensor]]:
    """Return learnable features as `FewShotTask.from_arrays` takes them; val has min(shots, 4) images per class."""
    generator = torch.Generator().manual_seed(seed)
    text, means = (torch.randn(classes, d, generator=generator) / d**0.5 for d in (dim, aux_dim))

    def part(y: Int64[Tensor, " n"]) -> dict[str, Tensor]:
        noise = (torch.randn(len(y), d, generator=generator) for d in (dim, aux_dim))
        return {"clip": next(noise).add_(ZERO_SHOT * text[y]), "aux": next(noise).add_(AUXILIARY * means[y]), "y": y}

    support, val = (torch.arange(classes).repeat_interleave(k) for k in (shots, min(shots, 4)))
    parts = {"support": support, "val": val, "test": torch.arange(test_images) % classes}
    return {"text": text} | {name: part(y) for name, y in parts.items()}


def random_task(seed: int = 0, **sizes: int) -> FewShotTask:
    """Return a task of such features; see `random_arrays` for the sizes."""
    return FewShotTask.from_arrays(**random_arrays(seed=seed, **sizes), seed=seed, name="random features")


def random_bank(folder: Path, **sizes: int) -> str:
    """Write the same as a bank of features; return the data set's name."""
    arrays = random_arrays(**sizes)
    splits = {"train": arrays["support"], "val": arrays["val"], "test": arrays["test"]}
    features.save_bank(
        folder,
        clip={"clip_random": {split: part["clip"] for split, part in splits.items()}},
        aux={"aux_random": {split: part["aux"] for split, part in splits.items()}},
        text={"clip_random": arrays["text"]},
        labels={split: part["y"] for split, part in splits.items()},
        class_names=[f"class {c}" for c in range(len(arrays["text"]))],
    )
    return f"features:{folder}"


def random_photos(folder: Path, count: int, size: tuple[int, int] = (500, 375), seed: int = 0) -> str:
    """Write `count` JPEG files for train, as large as the benchmarks' photographs; return the data set's name."""
    generator = np.random.default_rng(seed)
    for split, images in (("train", count), ("val", 1), ("test", 1)):
        place = folder / split / "photo"
        place.mkdir(parents=True)
        for i in range(images):
            coarse = Image.fromarray(generator.integers(0, 256, (48, 64, 3), dtype=np.uint8))
            coarse.resize(size, Image.Resampling.BICUBIC).save(place / f"{i:04d}.jpg", quality=90)
    return f"folder:{folder}"


def fit_alone(
    dataset: str, shots: int, name: str, held: Mapping[str, object], threads: int, protocol: str = "val"
) -> dict[str, float]:
    """Load a bank, draw a task, fit one method and classify the test images, in a fresh process.

    Returns:
        `seconds` of fit and classification, `accuracy` in [0, 1], and `gib`, the most memory the process ever had in
        use, libraries and mapped files included.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_fit_here, dataset, shots, name, dict(held), threads, protocol).result()


def _fit_here(
    dataset: str, shots: int, name: str, held: dict[str, object], threads: int, protocol: str
) -> dict[str, float]:
    torch.set_num_threads(threads)
    task = tasks.sample(tasks.load_source(dataset), shots, seed=1)
    begin = time.perf_counter()
    right = methods.build(name, protocol, **held).fit(task).logits(task.test).argmax(1) == task.test.y
    spent = time.perf_counter() - begin
    return {"seconds": spent, "accuracy": right.float().mean().item(), "gib": peak_memory()}


def peak_memory() -> float:
    """Return the most memory this process ever had in use, in GiB."""
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage tells of a spawned process may be its parent's
        return int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1]) / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30  # macOS counts bytes


def plain_heads(
    task: FewShotTask,
    settings: Sequence[Mapping[str, float]],
    factor: Float[Tensor, " n"],
    orders: Int64[Tensor, "B epochs n"],
    batch_size: int = 8,
) -> Float[Tensor, "B C D"]:
    """Train AMU-Tuning's heads one after another by autograd; each setting has lr, weight_decay, lam and beta."""
    x, zero_shot, y = task.support.aux, task.support.zero_shot, task.support.y
    found = []
    for setting, epochs in zip(settings, orders, strict=True):
        head = torch.nn.Linear(x.shape[1], task.num_classes, bias=False)
        means = one_hot(y, task.num_classes).float().T @ x / task.shots
        head.weight = torch.nn.Parameter(means)
        optimiser = torch.optim.AdamW(
            head.parameters(), lr=setting["lr"], weight_decay=setting["weight_decay"], eps=1e-4
        )
        batches = [batch for order in epochs for batch in order.split(batch_size)]
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, len(batches))
        for rows in batches:
            bias = head(x[rows])
            fused = zero_shot[rows] + setting["beta"] * factor[rows, None] * bias
            loss = (1 - setting["lam"]) * cross_entropy(bias, y[rows]) + setting["lam"] * cross_entropy(fused, y[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        found.append(head.weight.detach())
    return torch.stack(found)


def plain_tip_adapter(task: FewShotTask, sharpnesses: Sequence[float], betas: Sequence[float]) -> float:
    """Search Tip-Adapter's grid on val cell by cell, as its authors do; return the best accuracy in [0, 1]."""
    affinity = task.val.clip @ task.support.clip.T
    labels = one_hot(task.support.y, task.num_classes).float()
    best = 0.0
    for sharpness in sharpnesses:
        for beta in betas:
            cache_logits = torch.exp(sharpness * affinity - sharpness) @ labels
            logits = task.val.zero_shot + beta * cache_logits
            best = max(best, (logits.argmax(1) == task.val.y).float().mean().item())
    return best
