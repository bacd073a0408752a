"""Published methods in one form, and how their hyper-parameters are chosen.

    s = s0 + beta * u(s0) * bias(features)

A method is a triple, features x predictor x fusion, and an entry of `METHODS`. `build("amu", beta=2.0)` gives a
`Method` with `fit(task)` and `logits(split)`; `build("gda/gated", features="aux")` one that nobody published, from any
predictor of `PREDICTORS` and any rule of `fusion.FUSIONS`. Three protocols say how hyper-parameters are chosen:

    val     on the validation images (default)
    fixed   not at all: the published constants
    oracle  on the test images; optimistic, and only here to measure by how much
"""

from __future__ import annotations

import difflib
import inspect
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from lib import fusion, metrics, predictors
from lib.predictors import training
from lib.tasks import PROTOCOLS, FewShotTask, Split

SMALL = 2**21  # zero-shot logits of a support, C^2 K of them; larger tasks fill memory and cores by themselves
Setting = Mapping[str, object]


@dataclass(frozen=True)
class Entry:
    """One published method.

    Attributes:
        title: how the literature calls it.
        predictor, fusion: the class and the function; a hyper-parameter goes to whichever has an argument of its name.
        defaults: hyper-parameters of the authors where they differ from ours.
        refit: values to choose from that need a new fit, the authors' own first: ties go to the first.
        grid: the same for what acts after the fit.
        source: where formula and constants come from.
    """

    title: str
    predictor: type[predictors.Predictor]
    fusion: fusion.Rule
    source: str
    defaults: Setting = field(default_factory=dict)
    refit: Mapping[str, Sequence] = field(default_factory=dict)
    grid: Mapping[str, Sequence] = field(default_factory=dict)

    def arguments(self) -> dict[str, object]:
        """Return every hyper-parameter with its default."""
        return _defaults(self.fusion) | _defaults(self.predictor) | dict(self.defaults)


# The paper gives no beta. Class-mean heads on unit features spread their logits by 0.1 to 0.2 over the classes and
# 1/kappa is near 0.6, so a beta of 5 adds about what the code's 0.5 adds to z-scored logits.
AMU_BETAS = (5.0, 0.5, 1.0, 2.0, 10.0, 20.0)
AMU_CODE = {
    "standardised": True,
    "on": "probabilities",
    "confidence": "none",
    "constant": fusion.CODE_CONSTANT,
    "lam": 0.35,
    "beta": 0.5,
    "select_epoch": True,
}


def steps(start: float, stop: float, count: int, published: float) -> tuple[float, ...]:
    """Return an authors' grid, `start + i (stop - start) / count` for i < count, behind their published constant."""
    return (published, *(start + i * (stop - start) / count for i in range(count)))


TIP = {
    "source": "arXiv 2111.03930; repository gaopengcuhk/Tip-Adapter, imagenet.yaml",
    "defaults": {"beta": 1.17},
    "grid": {"sharpness": steps(0.1, 7.0, 200, 1.0), "beta": steps(0.1, 3.0, 20, 1.17)},
}
METHODS: dict[str, Entry] = {
    "zero_shot": Entry("Zero-shot CLIP", predictors.NoPredictor, fusion.additive, "Radford et al., 2021"),
    "linear_probe": Entry(
        "Linear probe",
        predictors.LinearProbe,
        fusion.replace,
        "Radford et al., 2021",
        refit={"inverse_penalty": (10.0, 0.1, 1.0, 100.0, 1000.0)},
    ),
    "clip_adapter": Entry(
        "CLIP-Adapter",
        predictors.CLIPAdapter,
        fusion.replace,
        "arXiv 2110.04544; repository gaopengcuhk/CLIP-Adapter",
        refit={"ratio": (0.2, 0.6)},
    ),
    "tip_adapter": Entry("Tip-Adapter", predictors.Cache, fusion.additive, **TIP),
    "tip_adapter_f": Entry("Tip-Adapter-F", predictors.TrainedCache, fusion.additive, **TIP),
    "cafo": Entry(
        "CaFo",
        predictors.SimilarCaches,
        fusion.additive,
        "arXiv 2303.02151; repository OpenGVLab/CaFo, caltech101/16shot.yaml",
        defaults={"beta": 1.3},
        grid={"sharpness": steps(0.1, 12.0, 200, 1.0), "beta": steps(0.1, 5.0, 20, 1.3)},
    ),
    "taskres": Entry("TaskRes", predictors.TaskRes, fusion.replace, "arXiv 2211.10277; repository geekyutao/TaskRes"),
    "text_probe": Entry("Text-initialised probe", predictors.TextProbe, fusion.replace, "arXiv 2312.12730, its ZS-LP"),
    "cross_modal": Entry(
        "Cross-modal probe",
        predictors.CrossModal,
        fusion.replace,
        "arXiv 2301.06267; repository linzhiqiu/cross_modal_adaptation",
    ),
    "gda": Entry(
        "GDA",
        predictors.GDA,
        fusion.additive,
        "arXiv 2402.04087; repository mrflogs/ICLR24",
        defaults={"beta": 0.1},
        grid={"beta": (0.1, 1e-4, 1e-3, 0.01, 1.0, 10.0, 100.0)},
    ),
    "ape": Entry(
        "APE",
        predictors.APE,
        fusion.additive,
        "arXiv 2304.01195; repository yangyangyang127/APE, caltech101.yaml",
        grid={
            "gamma": steps(0.0, 1.0, 5, 0.1),
            "sharpness": steps(0.1, 7.0, 200, 1.0),
            "beta": steps(0.1, 7.0, 20, 1.0),
        },
    ),
    "lp_plus_plus": Entry(
        "LP++",
        predictors.LPPlusPlus,
        fusion.replace,
        "arXiv 2404.02285; repository FereshteShakeri/FewShot-CLIP-Strong-Baseline",
    ),
    "clap": Entry(
        "CLAP",
        predictors.TextProbe,
        fusion.replace,
        "arXiv 2312.12730; repository jusiro/CLAP",
        defaults={"constraint": "l2"},
    ),
    "proker": Entry(
        "ProKeR",
        predictors.ProKeR,
        fusion.additive,
        "arXiv 2501.11175; repository ybendou/ProKeR at 035b684, whose grid has 20 values of sharpness",
        refit={"sharpness": steps(0.5, 3.5, 6, 1.0), "penalty": steps(0.001, 1.11, 10, 0.1)},
    ),
    "m_adapter": Entry(
        "M-Adapter",
        predictors.MAdapter,
        fusion.additive,
        "arXiv 2405.16591; repository WLuLi/CapS-Adapter; the grid is ours",
        grid={
            "sharpness": (5.5, 1.0, 3.0, 8.0),
            "gamma": (0.5, 0.0, 0.25, 1.0),
            "delta": (0.3, 0.0, 0.6),
            "beta": steps(0.1, 5.0, 20, 1.0),
        },
    ),
    "transclip": Entry(
        "TransCLIP",
        predictors.TransCLIP,
        fusion.replace,
        "arXiv 2406.01837; repository MaxZanella/transduction-for-vlms",
        grid={"gamma": (0.02, 0.002, 0.01, 0.2)},
    ),
    "aux_only": Entry(
        "Auxiliary only",
        predictors.MultiBranchHead,
        fusion.replace,
        "AMU-Tuning, table 2 (superiority)",
        defaults={"lam": 0.0},
    ),
    "amu": Entry(
        "AMU-Tuning",
        predictors.MultiBranchHead,
        fusion.uncertain,
        "arXiv 2404.08958, eq. 6-11",
        defaults={"beta": 5.0},
        refit={"lam": (0.5, 0.2, 0.8), "beta": AMU_BETAS},
    ),
    "amu_convex": Entry(
        "AMU-Tuning (convex)",
        predictors.ConvexHead,
        fusion.uncertain,
        "arXiv 2404.08958, eq. 8-11, minimised to the optimum",
        defaults={"beta": 5.0},
        refit={"penalty": (1e-3, 1e-2, 3e-3, 3e-4, 1e-4, 3e-5, 1e-5)},
    ),
    "amu_code": Entry(
        "AMU-Tuning (code)",
        predictors.MultiBranchHead,
        fusion.uncertain,
        "repository TJU-sjyj/AMU-Tuning at f96f335",
        defaults=AMU_CODE,
        refit={"lam": (0.35, 1.0), "beta": (0.5, 0.1, 0.2, 1.0, 2.0, 5.0)},
    ),
}


# Every predictor by name, for triples that nobody published; METHODS says which names the literature uses.
PREDICTORS: dict[str, type[predictors.Predictor]] = {
    "linear_probe": predictors.LinearProbe,
    "head": predictors.MultiBranchHead,
    "convex_head": predictors.ConvexHead,
    "mlp": predictors.MLP,
    "gda": predictors.GDA,
    "cache": predictors.Cache,
    "trained_cache": predictors.TrainedCache,
    "similar_caches": predictors.SimilarCaches,
    "ape": predictors.APE,
    "proker": predictors.ProKeR,
    "clip_adapter": predictors.CLIPAdapter,
    "taskres": predictors.TaskRes,
    "text_probe": predictors.TextProbe,
    "cross_modal": predictors.CrossModal,
    "lp_plus_plus": predictors.LPPlusPlus,
    "m_adapter": predictors.MAdapter,
    "transclip": predictors.TransCLIP,
}
ANY_BETA = (1.0, *(10 ** (i / 4) for i in range(-12, 13)))  # biases of all sizes meet all rules in a factorial


class Method:
    """A fitted or fittable triple; made by `build`.

    Attributes:
        chosen_: the hyper-parameters that the protocol chose, empty under `fixed`.
        val_accuracy_: accuracy in [0, 1] of the choice on what it was chosen on, None under `fixed`.
    """

    def __init__(self, name: str, entry: Entry, protocol: str, overrides: Setting) -> None:
        self.name, self.entry, self.protocol, self.overrides = name, entry, protocol, dict(overrides)

    def __repr__(self) -> str:
        given = ", ".join(f"{key}={value!r}" for key, value in self.overrides.items())
        return f"{self.entry.title} [{self.protocol}]({given})"

    def fit(self, task: FewShotTask) -> Method:
        """Learn from the support and choose hyper-parameters as the protocol says; test labels are out of reach."""
        tuning = task.for_tuning(self.protocol)
        fixed = self.entry.arguments() | self.overrides
        refit, grid = self._open(self.entry.refit), self._open(self.entry.grid)
        candidates = list(_settings(refit))
        fitted = self.entry.predictor.fit_many(
            tuning, [_for(self.entry.predictor, fixed | candidate) for candidate in candidates]
        )
        self.predictor_, self.chosen_, self.val_accuracy_ = fitted[0], {}, None
        if refit or grid or self._learns_beta():
            if tuning.val is None:
                raise ValueError(f"{self.name} has to choose, but {task.name} has no validation images")
            outcomes = (
                (accuracy, predictor, candidate | setting)
                for predictor, candidate in zip(fitted, candidates, strict=True)
                for setting, accuracy in self._outcomes(predictor, fixed | candidate, grid, tuning.val)
            )
            self.val_accuracy_, self.predictor_, self.chosen_ = max(outcomes, key=lambda outcome: outcome[0])
        self.settings_ = fixed | self.chosen_
        vars(self.predictor_).update(_for(self.entry.predictor, self.settings_))
        return self

    def bias(self, split: Split) -> Float[Tensor, "n C"]:
        """Return the bias logits before the fusion."""
        return self.predictor_.logits(split)

    def logits(self, split: Split) -> Float[Tensor, "n C"]:
        """Return the fused logits of each row."""
        return self.entry.fusion(split.zero_shot, self.bias(split), **_for(self.entry.fusion, self.settings_))

    def _open(self, values: Mapping[str, Sequence]) -> dict[str, Sequence]:
        """Return what the protocol has to choose."""
        free = self.protocol != "fixed"
        return {name: options for name, options in values.items() if free and name not in self.overrides}

    def _learns_beta(self) -> bool:
        return self.entry.fusion is fusion.learned and bool(self._open({"beta": ()}))

    def _outcomes(
        self, predictor: predictors.Predictor, fixed: Setting, grid: Mapping[str, Sequence], val: Split
    ) -> Iterator[tuple[Setting, float]]:
        """Yield every setting of the grid with its accuracy; a bias is computed once for all fusions, and all betas
        of a fusion are judged together.
        """
        after = set(_defaults(self.entry.predictor)) - set(_defaults(self.entry.fusion))
        inner = {name: options for name, options in grid.items() if name in after}
        outer = {name: options for name, options in grid.items() if name not in inner and name != "beta"}
        settings = list(_settings(inner))
        for setting, bias in zip(settings, predictor.logits_grid(val, settings), strict=True):
            for rest in _settings(outer):
                chosen = setting | rest
                arguments = _for(self.entry.fusion, fixed | chosen)
                betas = grid.get("beta", (arguments.pop("beta", None),))
                if self._learns_beta():
                    betas = (fusion.learn_beta(val.zero_shot, bias, val.y),)
                if betas == (None,):
                    yield chosen, metrics.accuracy(self.entry.fusion(val.zero_shot, bias, **arguments), val.y)
                    continue
                arguments.pop("beta", None)
                found = fusion.accuracy_over_beta(
                    partial(self.entry.fusion, **arguments), val.zero_shot, bias, val.y, betas
                )
                named = "beta" in grid or self._learns_beta()
                for beta, accuracy in zip(betas, found, strict=True):
                    yield chosen | ({"beta": beta} if named else {}), accuracy


def build(name: str, protocol: str = "val", **overrides: object) -> Method:
    """Return a method by name.

    Args:
        name: a key of `METHODS`, or `predictor/fusion` with keys of `PREDICTORS` and `fusion.FUSIONS`.
        protocol: `val`, `fixed` or `oracle`.
        overrides: hyper-parameters to hold at a value; they are then not chosen.

    Raises:
        ValueError: an unknown name, protocol or hyper-parameter.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol is one of {', '.join(PROTOCOLS)}, not {protocol!r}")
    entry = _entry(name)
    for key in overrides:
        if key not in entry.arguments():
            raise ValueError(f"{name} has no hyper-parameter {key!r}; {_nearest(key, entry.arguments())}")
    return Method(name, entry, protocol, overrides)


def compare(
    tasks: Iterable[FewShotTask],
    contestants: Mapping[str, tuple[str, Mapping[str, object]]],
    protocol: str = "val",
) -> pd.DataFrame:
    """Fit every contestant on every task and judge it on the task's test images, small tasks side by side on threads.

    Args:
        contestants: label -> (name of a method, hyper-parameters to hold).
        protocol: how the remaining hyper-parameters are chosen, see `methods`.

    Returns:
        One row per task and contestant: `label`, `task`, `shots`, `seed`, `protocol`, `accuracy` in [0, 1],
        `chosen` (a dict), `seconds` (of the fit, beside whatever ran then), `correct` (which test images) and `method`
        (the fitted method).
    """
    def fit(pair: tuple[FewShotTask, str]) -> dict[str, object]:
        task, label = pair
        name, held = contestants[label]
        begin = time.perf_counter()
        method = build(name, protocol, **held).fit(task)
        seconds = time.perf_counter() - begin
        right = metrics.correct(method.logits(task.test), task.test.y)
        row = {"label": label, "task": task.name, "shots": task.shots, "seed": task.seed, "protocol": protocol}
        row |= {"accuracy": right.float().mean().item(), "chosen": method.chosen_, "seconds": seconds}
        return row | {"correct": right, "method": method}

    pairs = list(product(tasks, contestants))
    if any(task.support.zero_shot.numel() > SMALL for task, _ in pairs):  # one at a time needs half of the memory
        return pd.DataFrame(map(fit, pairs))
    return pd.DataFrame(training.in_threads(fit, pairs))


def compare_fusions(
    rules: Mapping[str, fusion.Rule],
    held: Split,
    held_bias: Float[Tensor, "m C"],
    test: Split,
    test_bias: Float[Tensor, "n C"],
    betas: Sequence[float],
) -> pd.DataFrame:
    """Judge one fitted bias under many fusion rules; each takes its beta from the held-out images.

    A few held-out images leave many betas equal; the middle one of the best is taken, which favours no size of bias.

    Args:
        rules: functions of (zero_shot, bias, beta), of (zero_shot, bias), or `fusion.learned`, which learns its beta.
        held: the images on which beta is chosen, with the bias there.
        betas: the values to choose from.

    Returns:
        One row per rule: `beta` (NaN without one), the accuracies in [0, 1] `held` and `accuracy` (on `test`), and
        `right`, which test images it classifies correctly.
    """
    rows = []
    for name, rule in rules.items():
        if rule is fusion.replace:
            beta, score, fused = math.nan, metrics.accuracy(held_bias, held.y), test_bias
        else:
            tried = (fusion.learn_beta(held.zero_shot, held_bias, held.y),) if rule is fusion.learned else tuple(betas)
            found = fusion.accuracy_over_beta(rule, held.zero_shot, held_bias, held.y, tried)
            score = max(found)
            best = sorted(beta for beta, reached in zip(tried, found, strict=True) if reached == score)
            beta = best[len(best) // 2]
            fused = rule(test.zero_shot, test_bias, beta=beta)
        hit = metrics.correct(fused, test.y)
        rows.append({"fusion": name, "beta": beta, "held": score, "accuracy": hit.float().mean().item(), "correct": hit})
    return pd.DataFrame(rows).set_index("fusion")


def _entry(name: str) -> Entry:
    if name in METHODS:
        return METHODS[name]
    predictor, slash, rule = name.partition("/")
    if not slash:
        raise ValueError(f"no method {name!r}; {_nearest(name, METHODS)}")
    for part, known, what in ((predictor, PREDICTORS, "predictor"), (rule, fusion.FUSIONS, "fusion")):
        if part not in known:
            raise ValueError(f"no {what} {part!r}; {_nearest(part, known)}")
    found = fusion.FUSIONS[rule]
    grid = {"beta": ANY_BETA} if "beta" in _defaults(found) and found is not fusion.learned else {}
    return Entry(name, PREDICTORS[predictor], found, "a triple of the workbook's own", grid=grid)


def _nearest(wanted: str, known: Mapping) -> str:
    close = difflib.get_close_matches(wanted, known, n=1)
    return (f"did you mean {close[0]!r}? " if close else "") + "known: " + ", ".join(known)


def _defaults(function: Callable) -> dict[str, object]:
    """Return the arguments of a predictor or fusion that have a default: its hyper-parameters."""
    return {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }


def _for(function: Callable, settings: Setting) -> dict[str, object]:
    return {name: value for name, value in settings.items() if name in _defaults(function)}


def _settings(options: Mapping[str, Sequence]) -> Iterator[dict[str, object]]:
    for values in product(*options.values()):
        yield dict(zip(options, values, strict=True))
