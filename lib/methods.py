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

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, product
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lib import fusion, metrics, predictors, saved
from lib.files import nearest
from lib.metrics import Logits
from lib.predictors import training
from lib.tasks import PROTOCOLS, FewShotTask, Split

SMALL = 2**21  # zero-shot logits of a support, C^2 K of them; larger tasks fill memory and cores by themselves
Setting = Mapping[str, object]


@dataclass(frozen=True)
class Entry:
    """One published method; a hyper-parameter goes to predictor, fusion or both, whichever has one of its name."""

    title: str  # how the literature calls it
    predictor: type[predictors.Predictor]
    fusion: fusion.Fusion
    source: str  # where formula and constants come from
    defaults: Setting = field(default_factory=dict)  # constants of the authors where they differ from ours
    fit_grid: Mapping[str, Sequence] = field(default_factory=dict)  # ascending values to choose from by new fits
    post_grid: Mapping[str, Sequence] = field(default_factory=dict)  # of what acts after the fit; shared: the fusion's

    @property
    def per_batch(self) -> bool:  # the logits of an image depend on the other images of its split
        return self.predictor.per_batch or self.fusion.per_batch

    def arguments(self) -> dict[str, object]:
        """Every hyper-parameter with its default; where predictor and fusion differ, the fusion's."""
        return predictors.hyper_parameters(self.predictor) | dict(self.fusion.defaults) | dict(self.defaults)

    def obstacle(self, task: FewShotTask, fixed_params: Setting) -> str:
        """Why this method cannot be fitted on a task; empty if it can."""
        if task.text is None and self.fusion is not fusion.replace:
            return f"fusion {self.fusion.name!r} needs zero-shot logits, but {task.name} has no text features"
        predictor = self.predictor(**_only(predictors.hyper_parameters(self.predictor), self.defaults, fixed_params))
        try:
            predictor.check(task)
        except ValueError as error:
            return str(error)
        return ""


def steps(start: float, stop: float, count: int, published: float) -> tuple[float, ...]:
    """An authors' grid, `start + i (stop - start) / count` for i < count, and their published constant."""
    return tuple(sorted({published, *(start + i * (stop - start) / count for i in range(count))}))


# The paper gives no beta. Class-mean heads on unit features spread their logits by 0.1 to 0.2 over the classes and
# 1/kappa is near 0.6, so a beta of 5 (`amu`) adds about what the code's 0.5 adds to z-scored logits.
# fmt: off
AMU_CODE = {"standardised": True, "on": "probabilities", "confidence": "none", "constant": fusion.CODE_CONSTANT,
            "lam": 0.35, "beta": 0.5, "select_epoch": True}
TIP = {"source": "arXiv 2111.03930; repository gaopengcuhk/Tip-Adapter, imagenet.yaml", "defaults": {"beta": 1.17},
       "post_grid": {"sharpness": steps(0.1, 7.0, 200, 1.0), "beta": steps(0.1, 3.0, 20, 1.17)}}
METHODS: dict[str, Entry] = {
    "zero_shot": Entry("Zero-shot CLIP", predictors.NoPredictor, fusion.additive, "Radford et al., 2021"),
    "linear_probe": Entry("Linear probe", predictors.LinearProbe, fusion.replace, "Radford et al., 2021",
        fit_grid={"inverse_penalty": (0.1, 1.0, 10.0, 100.0, 1000.0)}),
    "clip_adapter": Entry("CLIP-Adapter", predictors.CLIPAdapter, fusion.replace,
        "arXiv 2110.04544; repository gaopengcuhk/CLIP-Adapter", fit_grid={"ratio": (0.2, 0.6)}),
    "tip_adapter": Entry("Tip-Adapter", predictors.Cache, fusion.additive, **TIP),
    "tip_adapter_f": Entry("Tip-Adapter-F", predictors.TrainedCache, fusion.additive, **TIP),
    "cafo": Entry("CaFo", predictors.SimilarCaches, fusion.additive,
        "arXiv 2303.02151; repository OpenGVLab/CaFo, caltech101/16shot.yaml", defaults={"beta": 1.3},
        post_grid={"sharpness": steps(0.1, 12.0, 200, 1.0), "beta": steps(0.1, 5.0, 20, 1.3)}),
    "taskres": Entry("TaskRes", predictors.TaskRes, fusion.replace, "arXiv 2211.10277; repository geekyutao/TaskRes"),
    "text_probe": Entry("Text-initialised probe", predictors.TextProbe, fusion.replace, "arXiv 2312.12730, its ZS-LP"),
    "cross_modal": Entry("Cross-modal probe", predictors.CrossModal, fusion.replace,
        "arXiv 2301.06267; repository linzhiqiu/cross_modal_adaptation"),
    "gda": Entry("GDA", predictors.GDA, fusion.additive, "arXiv 2402.04087; repository mrflogs/ICLR24",
        defaults={"beta": 0.1}, post_grid={"beta": (1e-4, 1e-3, 0.01, 0.1, 1.0, 10.0, 100.0)}),
    "ape": Entry("APE", predictors.APE, fusion.additive,
        "arXiv 2304.01195; repository yangyangyang127/APE, caltech101.yaml",
        post_grid={"gamma": steps(0.0, 1.0, 5, 0.1), "sharpness": steps(0.1, 7.0, 200, 1.0),
            "beta": steps(0.1, 7.0, 20, 1.0)}),
    "lp_plus_plus": Entry("LP++", predictors.LPPlusPlus, fusion.replace,
        "arXiv 2404.02285; repository FereshteShakeri/FewShot-CLIP-Strong-Baseline"),
    "clap": Entry("CLAP", predictors.TextProbe, fusion.replace, "arXiv 2312.12730; repository jusiro/CLAP",
        defaults={"constraint": "l2"}),
    "proker": Entry("ProKeR", predictors.ProKeR, fusion.additive,
        "arXiv 2501.11175; repository ybendou/ProKeR at 035b684, whose grid has 20 values of sharpness",
        fit_grid={"sharpness": steps(0.5, 3.5, 6, 1.0), "penalty": steps(0.001, 1.11, 10, 0.1)}),
    "m_adapter": Entry("M-Adapter", predictors.MAdapter, fusion.additive,
        "arXiv 2405.16591; repository WLuLi/CapS-Adapter; our grid", post_grid={"sharpness": (1.0, 3.0, 5.5, 8.0),
            "gamma": (0.0, 0.25, 0.5, 1.0), "delta": (0.0, 0.3, 0.6), "beta": steps(0.1, 5.0, 20, 1.0)}),
    "transclip": Entry("TransCLIP", predictors.TransCLIP, fusion.replace,
        "arXiv 2406.01837; repository MaxZanella/transduction-for-vlms", post_grid={"gamma": (0.002, 0.01, 0.02, 0.2)}),
    "aux_only": Entry("Auxiliary only", predictors.MultiBranchHead, fusion.replace,
        "AMU-Tuning, table 2 (superiority)", defaults={"lam": 0.0}),
    "amu": Entry("AMU-Tuning", predictors.MultiBranchHead, fusion.uncertain, "arXiv 2404.08958, eq. 6-11",
        defaults={"beta": 5.0}, fit_grid={"lam": (0.2, 0.5, 0.8), "beta": (0.5, 1.0, 2.0, 5.0, 10.0, 20.0)}),
    "amu_convex": Entry("AMU-Tuning (convex)", predictors.ConvexHead, fusion.uncertain,
        "arXiv 2404.08958, eq. 8-11, minimised to the optimum", defaults={"beta": 5.0},
        fit_grid={"penalty": (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)}),
    "amu_code": Entry("AMU-Tuning (code)", predictors.MultiBranchHead, fusion.uncertain,
        "repository TJU-sjyj/AMU-Tuning at f96f335", defaults=AMU_CODE,
        fit_grid={"lam": (0.35, 1.0), "beta": (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)}),
}
# Every predictor by name, for triples that nobody published; METHODS says which names the literature uses.
PREDICTORS: dict[str, type[predictors.Predictor]] = {
    "linear_probe": predictors.LinearProbe, "head": predictors.MultiBranchHead, "convex_head": predictors.ConvexHead,
    "mlp": predictors.MLP, "gda": predictors.GDA, "cache": predictors.Cache, "trained_cache": predictors.TrainedCache,
    "similar_caches": predictors.SimilarCaches, "ape": predictors.APE, "proker": predictors.ProKeR,
    "clip_adapter": predictors.CLIPAdapter, "taskres": predictors.TaskRes, "text_probe": predictors.TextProbe,
    "cross_modal": predictors.CrossModal, "lp_plus_plus": predictors.LPPlusPlus, "m_adapter": predictors.MAdapter,
    "transclip": predictors.TransCLIP,
}
# fmt: on
ANY_BETA = tuple(10 ** (i / 4) for i in range(-12, 13))  # biases of all sizes meet all rules in a factorial


@dataclass(eq=False, repr=False)
class Method:
    """A fitted or fittable triple; made by `build`."""

    name: str
    entry: Entry
    protocol: str
    fixed_params: Setting  # hyper-parameters that are not chosen
    predictor_: predictors.Predictor = field(init=False)  # its fields are the hyper-parameters after the choice
    chosen_: dict[str, object] = field(init=False)  # hyper-parameters that the protocol chose, empty under `fixed`
    settings_: dict[str, object] = field(init=False)  # all; of a name that predictor and fusion have, the fusion's
    val_accuracy_: float | None = field(init=False)  # of the choice, in [0, 1], on the images it was made on
    text_: Float[Tensor, "C D"] | None = field(init=False)  # of the task it was fitted on, as the facts
    facts_: dict[str, object] = field(init=False)

    def __repr__(self) -> str:
        params = ", ".join(f"{key}={value!r}" for key, value in self.fixed_params.items())
        return f"{self.entry.title} [{self.protocol}]({params})"

    def fit(self, task: FewShotTask) -> Method:
        """Fit and choose without test labels; a task without texts, equal shots or validation images may be refused."""
        entry, shared = self.entry, {**self.entry.defaults, **self.fixed_params}
        if obstacle := entry.obstacle(task, self.fixed_params):
            raise ValueError(f"{self.name}: {obstacle}")
        tuning = task.for_tuning(self.protocol)
        fit_grid, post_grid = self._open(entry.fit_grid), self._open(entry.post_grid)
        if (choices := ", ".join([*fit_grid, *post_grid])) and not tuning.val:
            lacking = f"{self.name} chooses {choices} on validation images, but {task.name} has none"
            raise ValueError(f"{lacking}; take protocol='fixed' or add validation images")
        fused, own = entry.fusion.defaults, predictors.hyper_parameters(entry.predictor)
        betas = post_grid.pop("beta", ()) if "beta" in fused else ()
        before, after = _settings(fit_grid), _settings(post_grid)
        late = [_only(own.keys() - fused, post) for post in after]  # a shared name's value in post_grid is the fusion's
        fitted = entry.predictor.fit_many(tuning, [_only(own, shared, setting) for setting in before])
        biases = chain.from_iterable(predictor.logits_grid(tuning.val, late) for predictor in fitted)
        rules = (partial(entry.fusion, **_only(fused, shared, *both)) for both in product(before, after))
        candidates = zip(rules, biases, strict=True)  # read one after another: all biases at once would fill memory
        place, beta, self.val_accuracy_ = choose(candidates, tuning.val, betas) if choices else (0, None, None)
        first, second = divmod(place, len(after))
        self.predictor_ = fitted[first].with_params(**late[second])
        self.chosen_ = before[first] | after[second] | ({} if beta is None else {"beta": beta})
        self.settings_ = entry.arguments() | self.fixed_params | self.chosen_
        self.text_, self.facts_ = task.text, task.facts()
        return self

    def bias(self, split: Split) -> Logits:  # before the fusion
        return self.predictor_.logits(split)

    def logits(self, split: Split) -> Logits:  # after it
        rule = self.entry.fusion
        return rule(split.zero_shot, self.bias(split), **_only(rule.defaults, self.settings_))

    def save(self, folder: str | Path) -> Path:  # see `saved.write`, and `load`
        return saved.write(self, Path(folder))

    def _open(self, grid: Mapping[str, Sequence]) -> dict[str, Sequence]:
        """The part of a grid that the protocol has to choose from."""
        closed = grid if self.protocol == "fixed" else self.fixed_params
        return {name: options for name, options in grid.items() if name not in closed}


def choose(
    candidates: Iterable[tuple[fusion.Rule, Logits]], val: Split, betas: Sequence[float] = ()
) -> tuple[int, float | None, float]:
    """Best candidate and beta on the images of `val`: its index, its beta (None without betas), its accuracy in [0, 1].

    Candidates, a rule and bias logits each, are read one after another and tried with every beta; betas ascend. All
    pairs form one list in the order of the grid; of equal accuracies the middle one is taken.
    """
    s0, y, classes = val.zero_shot, val.y, val.classes
    if betas:
        scores = [fusion.accuracy_over_beta(rule, s0, bias, y, betas, classes) for rule, bias in candidates]
    else:
        scores = [[metrics.accuracy(rule(s0, bias), y, classes)] for rule, bias in candidates]
    table = torch.tensor(scores, dtype=torch.float64)
    if table.isnan().any():
        raise ValueError(f"nothing can be chosen on {len(val)} images of which none has a class of the task")
    index, place = divmod(int(metrics.middle_of_best(table.flatten())), table.shape[1])
    return index, betas[place] if betas else None, scores[index][place]


def build(name: str, protocol: str = "val", **fixed_params: object) -> Method:
    """A method by name: a key of `METHODS`, or `predictor/fusion` with keys of `PREDICTORS` and `fusion.FUSIONS`.

    `fixed_params` hold hyper-parameters at a value, which are then not chosen. Unknown names raise a ValueError.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol is one of {', '.join(PROTOCOLS)}, not {protocol!r}")
    predictor, slash, rule = name.partition("/")
    parts = ((predictor, PREDICTORS, "predictor"), (rule, fusion.FUSIONS, "fusion"))
    for part, table, what in parts if slash else ((name, METHODS, "method"),):
        if part not in table:
            raise ValueError(f"no {what} {part!r}; {nearest(part, table)}")
    grid = {"beta": ANY_BETA} if slash and "beta" in fusion.FUSIONS[rule].defaults else {}
    entry = Entry(name, PREDICTORS[predictor], fusion.FUSIONS[rule], "ours", post_grid=grid) if slash else METHODS[name]
    for key in fixed_params:
        if key not in entry.arguments():
            raise ValueError(f"{name} has no hyper-parameter {key!r}; {nearest(key, entry.arguments())}")
    return Method(name, entry, protocol, fixed_params)


def load(folder: str | Path, encoders: Sequence[str] = ()) -> Method:
    """A fitted method as `Method.save` wrote it; refused if a byte or the weights of an encoder have changed.

    `encoders`, CLIP's first, are their names now, where the same weights lie under others. A bank's are not checked.
    """
    card, fitted = saved.read(Path(folder), encoders)
    return saved.restore(build(card["method"], card["protocol"], **card["fixed_params"]), card["triple"], fitted)


def offered(task: FewShotTask) -> list[str]:
    """Names of METHODS that can be fitted on a task: some need class texts, or equal shots."""
    return [name for name, entry in METHODS.items() if not entry.obstacle(task, {})]


def compare(
    tasks: Iterable[FewShotTask], contestants: Mapping[str, tuple[str, Setting]], protocol: str = "val"
) -> pd.DataFrame:
    """Every contestant fitted on every task and tested on its test images; small tasks run side by side on threads.

    `contestants` maps labels to a method's name and its fixed_params. One row per task and label, with `accuracy` in
    [0, 1] (NaN without test images of the task's classes), `correct` (mask of these images), `chosen` (a dict),
    `seconds` (of the fit, beside whatever ran then) and `method` (the fitted one).
    """

    def fit(pair: tuple[FewShotTask, str]) -> dict[str, object]:
        task, label = pair
        name, fixed_params = contestants[label]
        begin = time.perf_counter()
        method = build(name, protocol, **fixed_params).fit(task)
        seconds = time.perf_counter() - begin
        row = {"label": label, "task": task.name, "shots": task.shots, "seed": task.seed, "protocol": protocol}
        row |= _verdict(method.logits(task.test), task.test)
        return row | {"chosen": method.chosen_, "seconds": seconds, "method": method}

    pairs = list(product(tasks, contestants))
    large = any(task.support.zero_shot.numel() > SMALL for task, _ in pairs)  # one at a time needs half of the memory
    return pd.DataFrame(map(fit, pairs) if large else training.in_threads(fit, pairs))


def compare_fusions(
    rules: Mapping[str, fusion.Rule],
    val: Split,
    val_bias: Float[Tensor, "m C"],
    test: Split,
    test_bias: Logits,
    betas: Sequence[float],
    beta_by: str = "accuracy",
) -> pd.DataFrame:
    """One fitted bias under many fusion rules, each with the beta chosen on the validation images.

    One row per rule: `beta` (NaN without one), the accuracies in [0, 1] `val` and `accuracy` (on `test`), and `correct`
    (mask of the test images of the task's classes). `beta_by` is `accuracy`, see `choose`, or `cross-entropy`, see
    `fusion.learn_beta`, for rules linear in beta.
    """
    if beta_by not in ("accuracy", "cross-entropy"):
        raise ValueError(f"beta is chosen by 'accuracy' or 'cross-entropy', not {beta_by!r}")
    rows, labelled = [], val.y >= 0
    for name, rule in rules.items():
        options = sorted(betas) if "beta" in fusion.entry(rule).defaults else []
        if options and beta_by == "cross-entropy":
            if not fusion.entry(rule).linear:
                raise ValueError(f"beta is chosen by cross-entropy for rules linear in it; {name} is not")
            s0 = val.zero_shot.double()
            step = rule(s0, val_bias.double(), beta=1.0) - s0
            options = [fusion.learn_beta(s0[labelled], step[labelled], val.y[labelled])]
        _, beta, score = choose([(rule, val_bias)], val, options)
        chosen = {} if beta is None else {"beta": beta}
        logits = rule(test.zero_shot, test_bias, **chosen)
        rows.append({"fusion": name, "beta": math.nan, "val": score} | chosen | _verdict(logits, test))
    return pd.DataFrame(rows).set_index("fusion")


def _verdict(logits: Logits, test: Split) -> dict[str, object]:
    hits = metrics.correct(logits, test.y, test.classes)[test.y >= 0]
    return {"accuracy": hits.double().mean().item(), "correct": hits}  # NaN without labelled images


def _only(names: Iterable[str], *settings: Setting) -> dict[str, object]:
    """The named ones of some settings; of a name that several have, the last value."""
    return {name: setting[name] for setting in settings for name in setting if name in names}


def _settings(options: Mapping[str, Sequence]) -> list[dict[str, object]]:
    """Every combination of the options, the last name varying fastest."""
    return [dict(zip(options, values, strict=True)) for values in product(*options.values())]
