"""How fast the workbook is, against the loops one would write first: `make bench`.

Every shortcut runs in turns with its plain loop on random features of a benchmark's shape, with the same arithmetic and
the same result; a shared machine is noisy, so ratios are taken pair by pair. Beside them stand the time that the matrix
products alone would take at this machine's rate, and what the shortcut costs in accuracy.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import count, product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from lib import features, figures, fusion, methods, metrics, predictors, runs, tasks
from lib.features import datasets, encoders
from lib.predictors import training
from lib.tasks import FewShotTask

AIMS = {"heads": 3.0, "convex": 10.0, "grid": 40.0, "extraction": 0.9}  # times the plain way
TABLE_MINUTES, LARGE_SECONDS, LARGE_GIB = 10, 180, 4
ZERO_SHOT, AUXILIARY = 3.0, 7.0  # how far classes lie apart: of 100 classes zero-shot gets two thirds correct
IMPORTED = ("torch", "pandas", "lib", "lib.tasks", "lib.methods", "lib.figures", "lib.runs", "lib.features")
FULL = {
    **{"classes": 100, "shots": 16, "dim": 1024, "aux_dim": 2048, "test_images": 2000, "epochs": 50, "heads": 15},
    **{"repeats": 3, "seeds": 3, "photos": 128, "encoder": "timm:resnet50/random"},
    **{"only": tuple(name for name, entry in methods.METHODS.items() if not entry.predictor.needs_prompts)},
    **{"large_classes": 1000, "large_test": 50000, "threads": os.cpu_count(), "imports": 3, "square": 2048},
}
QUICK = FULL | {
    **{"classes": 6, "shots": 2, "dim": 24, "aux_dim": 32, "test_images": 60, "epochs": 2, "heads": 3, "repeats": 1},
    **{"seeds": 1, "only": ("gda", "amu"), "photos": 2, "encoder": "timm:test_byobnet/random", "large_classes": 8},
    **{"large_test": 20, "threads": 1, "imports": 1, "square": 64},
}


def seconds(way: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    begin = time.perf_counter()
    way()
    return time.perf_counter() - begin


def in_turns(ways: Mapping[str | int, Callable[[], object]], repeats: int) -> pd.DataFrame:
    """Seconds of every way, one column each; one row per repetition, in which the ways take turns."""
    rows = []
    for turn in range(repeats):
        names = list(ways) if turn % 2 == 0 else list(reversed(ways))
        rows.append({name: seconds(ways[name]) for name in names})
    return pd.DataFrame(rows, columns=list(ways))


def ratio(slow: pd.Series, fast: pd.Series) -> tuple[float, float, float]:
    """Median, least and largest of the ratios slow / fast of the pairs."""
    each = slow / fast
    return float(each.median()), float(each.min()), float(each.max())


def on_threads(threads: int, way: Callable[[], object]) -> object:
    """What `way()` gives while torch may use so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return way()
    finally:
        torch.set_num_threads(before)


def machine(square: int) -> dict[str, object]:
    """What a timing depends on: processor, cores, threads, memory (GiB), torch, GFLOP/s of a matrix product, GB/s."""
    cpu, memory = platform.processor() or platform.machine(), None
    if (info := Path("/proc/cpuinfo")).exists():
        cpu = re.search(r"model name\s*:\s*(.*)", info.read_text() + "model name: " + cpu)[1]
        memory = round(int(re.search(r"MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text())[1]) / 2**20, 1)
    a, b, out = torch.rand(3, square, square)
    rate = 2e-9 * square**3 / min(seconds(lambda: torch.mm(a, b, out=out)) for _ in range(5))
    bandwidth = 8e-9 * a.numel() / min(seconds(lambda: out.copy_(a)) for _ in range(5))
    host = {"processor": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "memory": memory}
    return host | {"torch": torch.__version__, "product_rate": rate, "bandwidth": bandwidth}


def import_seconds(module: str, repeats: int) -> float:
    """Median seconds a fresh Python needs to import a module, beyond those it needs to start."""
    spent = [
        seconds(lambda code=code: subprocess.run([sys.executable, "-c", code], check=True, cwd=runs.ROOT))
        for code in ("", f"import {module}") * repeats
    ]
    return float(np.median(np.subtract(spent[1::2], spent[::2])))


def peak_memory() -> float:
    """Most memory this process ever had in use, libraries and mapped files included, in GiB."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage of a spawned process may give its parent's
        return int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1]) / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30  # macOS counts bytes


def random_arrays(classes=100, shots=16, dim=1024, aux_dim=2048, test_images=2000, seed=0, **_) -> dict:
    """Learnable features as `FewShotTask.from_arrays` takes them; val has min(shots, 4) images per class."""
    generator = torch.Generator().manual_seed(seed)
    text, means = (torch.randn(classes, d, generator=generator) / d**0.5 for d in (dim, aux_dim))

    def part(y: Tensor) -> dict[str, Tensor]:
        noise = (torch.randn(len(y), d, generator=generator) for d in (dim, aux_dim))
        return {"clip": next(noise).add_(ZERO_SHOT * text[y]), "aux": next(noise).add_(AUXILIARY * means[y]), "y": y}

    support, val = (torch.arange(classes).repeat_interleave(k) for k in (shots, min(shots, 4)))
    parts = {"support": support, "val": val, "test": torch.arange(test_images) % classes}
    return {"text": text} | {name: part(y) for name, y in parts.items()}


def random_task(seed: int = 0, **sizes: object) -> FewShotTask:
    """A task of such features; see `random_arrays` for the sizes."""
    return FewShotTask.from_arrays(**random_arrays(seed=seed, **sizes), seed=seed, name="random features")


def random_bank(folder: Path, **sizes: object) -> str:
    """Name of a data set: the same features, written as a bank."""
    arrays = random_arrays(**sizes)
    text, splits = arrays.pop("text"), {"train": arrays["support"], "val": arrays["val"], "test": arrays["test"]}
    clip, aux, y = ({split: part[kind] for split, part in splits.items()} for kind in ("clip", "aux", "y"))
    parts = {"clip": {"clip_random": clip}, "aux": {"aux_random": aux}, "text": {"clip_random": text}, "labels": y}
    features.save_bank(folder, class_names=[f"class {c}" for c in range(len(text))], **parts)
    return f"features:{folder}"


def random_photos(folder: Path, photos: int, size: tuple[int, int] = (500, 375)) -> str:
    """Name of a data set: JPEG files for train, as large as the benchmarks' photographs, and one for val and test."""
    generator = np.random.default_rng(0)
    for split, images in (("train", photos), ("val", 1), ("test", 1)):
        place = folder / split / "photo"
        place.mkdir(parents=True)
        for i in range(images):
            coarse = Image.fromarray(generator.integers(0, 256, (48, 64, 3), dtype=np.uint8))
            coarse.resize(size, Image.Resampling.BICUBIC).save(place / f"{i:04d}.jpg", quality=90)
    return f"folder:{folder}"


def fit_large(dataset: str, shots: int, threads: int) -> dict[str, float]:
    """Seconds, accuracy in [0, 1] and memory (GiB) of `amu_convex` on a task of a bank."""
    torch.set_num_threads(threads)
    task = tasks.sample(tasks.load_source(dataset), shots, seed=1)
    begin = time.perf_counter()
    accuracy = metrics.accuracy(methods.build("amu_convex").fit(task).logits(task.test), task.test.y)
    return {"seconds": time.perf_counter() - begin, "accuracy": accuracy, "gib": peak_memory()}


def plain_heads(task: FewShotTask, settings: Sequence[Mapping[str, float]], epochs: int, batch_size: int = 8) -> Tensor:
    """Weights [B, C, D] of AMU-Tuning's heads trained one after another by autograd; a setting has lam and beta."""
    x, zero_shot, y = task.support.aux, task.support.zero_shot, task.support.y
    u, weights = fusion.uncertainty(zero_shot)[:, None], []
    orders = training.epoch_orders(len(y), epochs, torch.Generator().manual_seed(task.seed))
    batches = [rows for order in orders for rows in order.split(batch_size)]
    for setting in settings:
        lam, head = setting["lam"], torch.nn.Linear(x.shape[1], task.num_classes, bias=False)
        head.weight = torch.nn.Parameter(one_hot(y, task.num_classes).float().T @ x / task.shots)
        optimiser = torch.optim.AdamW(head.parameters(), lr=1e-3, weight_decay=0.01, eps=1e-4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, len(batches))
        for rows in batches:
            bias = head(x[rows])
            fused = zero_shot[rows] + setting["beta"] * u[rows] * bias
            loss = (1 - lam) * cross_entropy(bias, y[rows]) + lam * cross_entropy(fused, y[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        weights.append(head.weight.detach())
    return torch.stack(weights)


def plain_tip_adapter(task: FewShotTask, sharpnesses: Sequence[float], betas: Sequence[float]) -> float:
    """Best accuracy in [0, 1] of Tip-Adapter's grid on val, searched cell by cell as its authors do."""
    affinity, labels = task.val.clip @ task.support.clip.T, one_hot(task.support.y, task.num_classes).float()
    best = 0.0
    for sharpness, beta in product(sharpnesses, betas):
        cache_logits = torch.exp(sharpness * affinity - sharpness) @ labels
        logits = task.val.zero_shot + beta * cache_logits
        best = max(best, (logits.argmax(1) == task.val.y).float().mean().item())
    return best


def claim(title: str, aim: float, plain: Callable, ours: Callable, repeats: int) -> tuple[dict, object, object]:
    """A row of the table, and what the two ways gave last."""
    last = {}
    paired = in_turns({"plain": lambda: last.update(a=plain()), "ours": lambda: last.update(b=ours())}, repeats)
    row = {"title": title, "ratio": ratio(paired["plain"], paired["ours"]), "aim": aim, "limit": float("nan")}
    return row | paired.median().to_dict(), last["a"], last["b"]


def time_heads(task: FewShotTask, size: Mapping, rate: float) -> dict[str, dict]:
    """Rows of AMU-Tuning's heads, many at once, and of the path of convex optima."""
    pairs = list(product((0.2, 0.5, 0.8), (1.0, 2.0, 5.0, 10.0, 20.0)))
    settings = [{"lam": lam, "beta": beta} for lam, beta in (pairs[i % 15] for i in range(size["heads"]))]
    tries = {c: partial(on_threads, c, partial(plain_heads, task, settings[:1], 1)) for c in {1, size["threads"]}}
    best = int(in_turns(tries, 1 + size["repeats"])[1:].min().idxmin())  # threads that suit the plain loop

    def plain(some: Sequence[Mapping[str, float]]) -> Tensor:
        return on_threads(best, lambda: plain_heads(task, some, size["epochs"]))

    together = partial(predictors.MultiBranchHead.fit_many, task, [s | {"epochs": size["epochs"]} for s in settings])
    title, turns, n = f"{len(settings)} AMU heads", size["repeats"], len(task.support)
    heads, weights, fitted = claim(title, AIMS["heads"], partial(plain, settings), together, turns)
    apart = (torch.stack([head.weight_ for head in fitted]) - weights).abs().max().item()
    heads["cost"] = "largest difference of weights", apart
    heads["limit"] = 4e-9 * n * size["epochs"] * len(settings) * task.num_classes * size["aux_dim"] / rate

    one, penalties = {"lam": 0.5, "beta": 5.0}, methods.METHODS["amu_convex"].fit_grid["penalty"]
    path = partial(predictors.ConvexHead.fit_many, task, [one | {"penalty": penalty} for penalty in penalties])
    title = f"{len(penalties)} convex optima\nagainst 1 AdamW run"
    convex, weights, fitted = claim(title, AIMS["convex"], partial(plain, [one]), path, turns)
    accuracy = {}
    for name, part in (("val", task.val), ("test", task.test)):
        biases = [part.aux @ weight.T for weight in (weights[0], *(head.weight_ for head in fitted))]
        accuracy[name] = [metrics.accuracy(fusion.uncertain(part.zero_shot, b, beta=5.0), part.y) for b in biases]
    gap = accuracy["test"][1 + int(np.argmax(accuracy["val"][1:]))] - accuracy["test"][0]
    convex["cost"] = "points on test images (above 0: gained)", 100 * gap
    convex["gradient"] = max(head.gradient_norm_ for head in fitted)
    products = 4 * n * min(n, size["aux_dim"]) * task.num_classes * sum(head.evaluations_ for head in fitted)
    return {"heads": heads, "convex": convex | {"limit": 1e-9 * products / rate}}


def time_grid(task: FewShotTask, size: Mapping, rate: float) -> dict[str, dict]:
    """Row of Tip-Adapter's grid of sharpness and beta, searched on validation images."""
    grid, fit = methods.METHODS["tip_adapter"].post_grid, methods.build("tip_adapter").fit
    plain = partial(plain_tip_adapter, task, grid["sharpness"], grid["beta"])
    row, best, fitted = claim("Tip-Adapter's grid", AIMS["grid"], plain, partial(fit, task), size["repeats"])
    row["limit"] = 2e-9 * len(task.val) * len(task.support) * size["dim"] / rate
    return {"grid": row | {"cost": ("points on validation images", 100 * (fitted.val_accuracy_ - best))}}


def time_extraction(size: Mapping, scratch: Path) -> dict[str, dict]:
    """Row of extraction from JPEG files, decoding and shards included, against the network on decoded batches."""
    name, load = random_photos(scratch / "photos", size["photos"]), partial(encoders.load_encoder, size["encoder"])
    transform, turn = load().transform, count()
    batches = torch.stack([transform(image) for image in datasets.load(name).images("train")]).split(64)

    def plain() -> Tensor:
        model = load()
        return torch.cat([model.encode_images(batch) for batch in batches])

    def ours() -> Tensor:
        return features.load(name, "train", size["encoder"], cache=scratch / f"cache{next(turn)}").x

    title = "extraction against\nthe bare network"
    row, bare, cached = claim(title, AIMS["extraction"], plain, ours, size["repeats"])
    return {"extraction": row | {"cost": ("largest difference of features", (bare - cached).abs().max().item())}}


def draw(table: pd.DataFrame) -> plt.Figure:
    """Ratios with their aims, and seconds of both ways beside the arithmetic limit."""
    figures.use_style()
    fig, (ax, times) = plt.subplots(1, 2, figsize=(2 * figures.COLUMN, 2.4), sharey=True)
    for y, row in enumerate(table.itertuples()):
        middle, low, high = row.ratio
        ax.plot([low, high], [y, y], color="k")
        ax.plot(middle, y, "o", color="k")
        ax.plot(row.aim, y, "|", color=figures.GREY, ms=12, mew=1.5)
        ax.annotate(f"{middle:,.3g} x", (middle, y), (0, 7.5), textcoords="offset points", ha="center", fontsize=7)
        times.plot([row.plain, row.ours], [y, y], "-", color="#bdbdbd", zorder=1)
        for value, ink, form in ((row.plain, "#8c8c8c", "s"), (row.ours, "k", "o"), (row.limit, "k", "|")):
            times.plot(value, y, form, color=ink, ms=9 if form == "|" else 4)
    ax.set(xscale="log", xlabel="times faster than the plain way", title="Ratio, and aim (tick)")
    ax.set(ylim=(len(table) - 0.5, -0.6), yticks=range(len(table)), yticklabels=table["title"])
    times.set(xscale="log", xlabel="seconds", title="■ plain   ● ours   | arithmetic limit")
    for panel in (ax, times):
        panel.margins(x=0.1)
        panel.grid(axis="y", visible=False)
        panel.xaxis.set_major_formatter("{x:g}")
    return fig


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """The table as it is printed: seconds, ratio with its range, aim, and what the shortcut costs."""
    columns = {f"{way} (s)": table[way].map("{:.3g}".format) for way in ("plain", "ours", "limit")}
    columns |= {"ratio": table["ratio"].map(lambda r: "{:.3g} ({:.3g} to {:.3g})".format(*r)), "aim": table["aim"]}
    columns["verdict"] = ["reached" if row.ratio[0] >= row.aim else "MISSED" for row in table.itertuples()]
    columns["cost"] = [f"{name} {value:.1g}" for name, value in table["cost"]]
    return pd.DataFrame(columns).set_axis(table["title"].str.replace("\n", " "))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, draw `speed` and leave a record, the last thing written."""
    parser = argparse.ArgumentParser(description="how fast the workbook is, against plain loops")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it works: no numbers to report")
    parser.add_argument("--folder", type=Path, default=runs.ROOT / "runs" / "bench")
    options = parser.parse_args(arguments)
    size = QUICK if options.quick else FULL
    options.folder.mkdir(parents=True, exist_ok=True)
    (options.folder / "metrics.json").unlink(missing_ok=True)
    run = runs.Run("bench", {"quick": options.quick}, options.folder)
    before = torch.get_num_threads()
    torch.set_num_threads(size["threads"])
    host = machine(size["square"])
    print("\n".join(f"{name:14} {value}" for name, value in host.items()), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        task, rate = random_task(**size), host["product_rate"]
        rows = time_heads(task, size, rate) | time_grid(task, size, rate) | time_extraction(size, Path(scratch))
        table = pd.DataFrame(rows).T
        print(readable(table).to_string(), flush=True)
        ladder = [k for k in (1, 2, 4, 8) if k < size["shots"]] + [size["shots"]]
        drawn = [random_task(**size | {"shots": k}, seed=s) for k in ladder for s in range(1, size["seeds"] + 1)]
        contestants = {name: (name, {}) for name in size["only"]}
        minutes = seconds(lambda: methods.compare(drawn, contestants)) / 60
        print(f"{len(contestants)} methods x {len(drawn)} tasks: {minutes:.1f} min (aim {TABLE_MINUTES})", flush=True)
        large = size | {"classes": size["large_classes"], "test_images": size["large_test"]}
        bank = random_bank(Path(scratch) / "bank", **large)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            fitted = pool.submit(fit_large, bank, size["shots"], size["threads"]).result()
    used, aims = f"{fitted['seconds']:.0f} s, {fitted['gib']:.1f} GiB", f"{LARGE_SECONDS} s, {LARGE_GIB} GiB"
    print(f"amu_convex on {large['classes']} classes, {large['test_images']} test images: {used} (aims {aims})")
    imported = {name: import_seconds(name, size["imports"]) for name in IMPORTED}
    print("import: " + ", ".join(f"{name} {spent:.2f} s" for name, spent in imported.items()))
    figures.save_figure(draw(table), "speed", options.folder / "figures")
    torch.set_num_threads(before)
    measured = {"machine": host, "claims": rows, "table_minutes": minutes, "large": fitted, "import_s": imported}
    run.record(measured)


if __name__ == "__main__":
    main()
