"""A table of scores: names of functions whose parameters name the arrays they need."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping

Table = Mapping[str, Callable]


def needs(score: Callable) -> tuple[str, ...]:
    """Names of the arrays that a score cannot do without: its parameters that have no default."""
    return tuple(name for name, p in inspect.signature(score).parameters.items() if p.default is p.empty)


def computable(table: Table, arrays: Mapping[str, object]) -> dict[str, object]:
    """Each score of a table whose arrays exist (are there and not None), computed from them."""
    here = {name: array for name, array in arrays.items() if array is not None}
    able = {name: score for name, score in table.items() if set(needs(score)) <= here.keys()}
    return {name: score(**{need: here[need] for need in needs(score)}) for name, score in able.items()}
