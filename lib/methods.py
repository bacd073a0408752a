"""Published methods in one form, and how their hyper-parameters are chosen.

    s = s0 + beta * u(s0) * bias(features)

A method is a triple, features x predictor x fusion, and an entry of `METHODS`. `build("amu", beta=2.0)` gives a
`Method` with `fit(task)` and `logits(split)`. Three protocols say how hyper-parameters are chosen:

    val     on the validation images (default)
    fixed   not at all: the published constants
    oracle  on the test images; optimistic, and only here to measure by how much
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Self

from jaxtyping import Float
from torch import Tensor

from lib import fusion, predictors
from lib.tasks import PROTOCOLS, FewShotTask, Split

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
    fusion: Callable[..., Tensor]
    source: str
    defaults: Setting = field(default_factory=dict)
    refit: Mapping[str, Sequence] = field(default_factory=dict)
    grid: Mapping[str, Sequence] = field(default_factory=dict)

    def arguments(self) -> dict[str, object]:
        """Return every hyper-parameter with its default."""
        return _defaults(self.fusion) | _defaults(self.predictor) | dict(self.defaults)


# The paper gives no beta. Class-mean heads on unit features spread their logits by 0.1 to 0.2 over the classes and
# 1/kappa is near 0.6, so a beta of 5 adds about what the code's 0.5 adds to z-scored logits.
AMU_BETAS = (5.0, 1.0, 2.0, 10.0, 20.0)
AMU_CODE = {
    "standardised": True,
    "on": "probabilities",
    "confidence": "none",
    "constant": fusion.CODE_CONSTANT,
    "lam": 0.35,
    "beta": 0.5,
    "select_epoch": True,
}

METHODS: dict[str, Entry] = {
    "zero_shot": Entry("Zero-shot CLIP", predictors.NoPredictor, fusion.fixed, "Radford et al., 2021"),
    "linear_probe": Entry(
        "Linear probe",
        predictors.LinearProbe,
        fusion.replace,
        "Radford et al., 2021",
        refit={"inverse_penalty": (10.0, 0.1, 1.0, 100.0, 1000.0)},
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
    "amu_code": Entry(
        "AMU-Tuning (code)",
        predictors.MultiBranchHead,
        fusion.uncertain,
        "repository TJU-sjyj/AMU-Tuning at f96f335",
        defaults=AMU_CODE,
        refit={"lam": (0.35, 1.0), "beta": (0.5, 0.1, 0.2, 1.0, 2.0, 5.0)},
    ),
}


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

    def fit(self, task: FewShotTask) -> Self:
        """Learn from the support and choose hyper-parameters as the protocol says; test labels are out of reach."""
        tuning = task.for_tuning(self.protocol)
        fixed = self.entry.arguments() | self.overrides
        refit, grid = (
            ([], []) if self.protocol == "fixed" else (self._open(self.entry.refit), self._open(self.entry.grid))
        )
        candidates = list(_settings(dict(refit)))
        fitted = self.entry.predictor.fit_many(
            tuning, [_for(self.entry.predictor, fixed | candidate) for candidate in candidates]
        )
        self.predictor_, self.chosen_, self.val_accuracy_ = fitted[0], {}, None
        if refit or grid:
            best = -1.0
            for predictor, candidate in zip(fitted, candidates, strict=True):
                for setting, logits in self._grid_logits(predictor, fixed | candidate, dict(grid), tuning.val):
                    right = (logits.argmax(1) == tuning.val.y).float().mean().item()
                    if right > best:
                        best, self.predictor_, self.chosen_ = right, predictor, candidate | setting
            self.val_accuracy_ = best
        self.settings_ = fixed | self.chosen_
        vars(self.predictor_).update(_for(self.entry.predictor, self.settings_))
        return self

    def bias(self, split: Split) -> Float[Tensor, "n C"]:
        """Return the bias logits before the fusion."""
        return self.predictor_.logits(split)

    def logits(self, split: Split) -> Float[Tensor, "n C"]:
        """Return the fused logits of each row."""
        return self.entry.fusion(split.zero_shot, self.bias(split), **_for(self.entry.fusion, self.settings_))

    def _open(self, values: Mapping[str, Sequence]) -> list[tuple[str, Sequence]]:
        return [(name, options) for name, options in values.items() if name not in self.overrides]

    def _grid_logits(
        self, predictor: predictors.Predictor, fixed: Setting, grid: Mapping[str, Sequence], split: Split
    ) -> Iterator[tuple[Setting, Tensor]]:
        """Yield every setting of the grid with its fused logits; the bias is computed once per predictor setting."""
        inner = {name: v for name, v in grid.items() if name in _defaults(self.entry.predictor)}
        outer = {name: v for name, v in grid.items() if name not in inner}
        settings = list(_settings(inner))
        for setting, bias in zip(settings, predictor.logits_grid(split, settings), strict=True):
            for rest in _settings(outer):
                chosen = setting | rest
                yield chosen, self.entry.fusion(split.zero_shot, bias, **_for(self.entry.fusion, fixed | chosen))


def build(name: str, protocol: str = "val", **overrides: object) -> Method:
    """Return a method by name.

    Args:
        name: a key of `METHODS`.
        protocol: `val`, `fixed` or `oracle`.
        overrides: hyper-parameters to hold at a value; they are then not chosen.

    Raises:
        ValueError: an unknown name, protocol or hyper-parameter.
    """
    if name not in METHODS:
        raise ValueError(f"no method {name!r}; {_nearest(name, METHODS)}")
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol is one of {', '.join(PROTOCOLS)}, not {protocol!r}")
    entry = METHODS[name]
    for key in overrides:
        if key not in entry.arguments():
            raise ValueError(f"{name} has no hyper-parameter {key!r}; {_nearest(key, entry.arguments())}")
    return Method(name, entry, protocol, overrides)


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
