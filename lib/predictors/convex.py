"""A solver for linear heads whose loss is convex: AMU-Tuning's two branches without the z-score, logistic regression.

    mean_i [(1 - lam) CE(a_i, y_i) + lam CE(s0_i + k_i a_i, y_i)] + penalty / 2 ||W||^2,    a = W x + b

Three observations make a whole path of penalties cheap. The best W is a combination of the support's rows, W = A^T X:
where these are few (n < 2 D), A is what is solved for, and one product with the Gram matrix X X^T is all that an
iteration needs. Logits are linear along a direction, so that a line search costs no product at all. And what L-BFGS
has learned of the curvature under one penalty holds under the next, once the change of the penalty is added.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

MEMORY = 5  # steps that L-BFGS remembers


@dataclass(frozen=True)
class Convex:
    """Linear heads at the optimum of a convex loss, one for each penalty, in the order the penalties were given.

    Attributes:
        weight, intercept: the heads; the intercept is 0 where none was asked for.
        losses: value reached, penalty included.
        gradient_norms: the certificate: norm of the gradient reached, relative to the one at zero weights.
        evaluations: how often the gradient was computed.
    """

    weight: Float[Tensor, "P C D"]
    intercept: Float[Tensor, "P C"]
    losses: Float[Tensor, " P"]
    gradient_norms: Float[Tensor, " P"]
    evaluations: Int64[Tensor, " P"]


def solve_path(
    x: Float[Tensor, "n D"],
    zero_shot: Float[Tensor, "n C"],
    y: Int64[Tensor, " n"],
    penalties: Sequence[float],
    *,
    lam: float = 0.0,
    strength: Float[Tensor, " n"] | None = None,
    intercept: bool = False,
    tolerance: float = 1e-4,
    max_evaluations: int = 1000,
) -> Convex:
    """Minimise the loss above to its optimum for each penalty, strong to weak, each from where the two before point.

    Args:
        x: rows of the support; everything is computed in their precision.
        zero_shot: `s0`; without effect at lam = 0, which is plain logistic regression.
        penalties: each above 0, in any order.
        strength: k, beta u(s0) of each image; 1 if absent.
        intercept: also learn b, which is not penalised.
        tolerance: stop where the gradient's norm has fallen to this share of its norm at zero weights.
        max_evaluations: stop there in any case, for each penalty; the certificate tells.

    Raises:
        ValueError: a penalty is not above 0.
    """
    if min(penalties) <= 0:
        raise ValueError(f"penalties must be above 0, not {min(penalties)}")
    order = sorted(range(len(penalties)), key=lambda i: -penalties[i])
    descent = _Descent(x, zero_shot, y, lam, strength, intercept)
    found, past = {}, []
    for i in order:
        here = math.log(penalties[i])
        if len(past) == 2 and past[0][0] > past[1][0]:
            beyond = (past[0][0] - here) / (past[0][0] - past[1][0])
            torch.lerp(past[0][1], descent.point, beyond, out=descent.point)
            torch.lerp(past[0][2], descent.logits, beyond, out=descent.logits)
        norm, evaluations = descent.run(penalties[i], tolerance, max_evaluations)
        past = [*past[-1:], (here, descent.point.clone(), descent.logits.clone())]
        found[i] = (past[-1][1], descent.value(penalties[i]), norm, evaluations)
    points, losses, norms, evaluations = zip(*(found[i] for i in range(len(penalties))), strict=True)
    weight = torch.cat([point[:-1] for point in points], 1).T
    return Convex(
        weight=(weight @ x if descent.dual else weight.contiguous()).unflatten(0, (len(points), -1)),
        intercept=torch.stack([point[-1] for point in points]),
        losses=torch.tensor(losses),
        gradient_norms=torch.tensor([norm / descent.scale if descent.scale else 0.0 for norm in norms]),
        evaluations=torch.tensor(evaluations),
    )


class _Descent:
    """L-BFGS along a path of penalties; everything large is allocated once.

    The coordinates of (W, b) are A [n C], or W^T [D C] where rows are many, and b as the last row. The inner product of
    two heads is a plain one, of the coordinates of one and the `partners` of the other: X X^T A in place of A.

    Attributes:
        point, logits: where we are, and a there.
        basis: the last steps, how the gradient changed along each, and the gradient, in coordinates.
        partners: of these; with many rows a vector is its own partner and this is `basis` itself.
        products: the inner products of all of them, which is all that L-BFGS's recursion needs.
        slots: which steps are in use, the oldest first.
        scale: norm of the gradient at zero weights, where the path begins.
        slope: the derivatives of the loss by the logits; `change`, `reached` and `fused` are room to work in.
    """

    def __init__(self, x, zero_shot, y, lam, strength, intercept):
        (n, dim), classes = x.shape, zero_shot.shape[1]
        self.dual = n < 2 * dim
        self.x, self.rows = x, _gram(x) if self.dual else x
        self.y, self.intercept = y[:, None], float(intercept)
        k = x.new_ones(n, 1) if strength is None else strength[:, None].to(x.dtype)
        fused = [(lam, k, zero_shot.to(x.dtype))] if lam > 0 else []
        self.branches = [(1 - lam, None, None)] * (lam < 1) + fused
        self.point, self.logits = x.new_zeros(self.rows.shape[1] + 1, classes), x.new_zeros(n, classes)
        self.basis = x.new_zeros(2 * MEMORY + 1, *self.point.shape)
        self.partners = torch.zeros_like(self.basis) if self.dual else self.basis
        self.stores = (self.basis, self.partners) if self.dual else (self.basis,)
        self.direction, self.image = torch.empty_like(self.point), torch.empty_like(self.point)
        self.products = torch.zeros(2 * MEMORY + 1, 2 * MEMORY + 1, dtype=torch.float64)
        self.slots, self.pending, self.penalty, self.scale, self.loss = [], None, 0.0, None, None
        self.change, self.reached, self.slope, self.fused = torch.empty(4, n, classes, dtype=x.dtype)

    def run(self, penalty: float, tolerance: float, max_evaluations: int) -> tuple[float, int]:
        """Go to the optimum of one penalty; return the norm of the gradient there and the evaluations."""
        self._turn(penalty)
        for evaluations in range(1, max_evaluations + 1):
            norm = self.look(penalty)
            if self.scale is None:
                self.scale = norm
            if norm <= tolerance * self.scale or evaluations == max_evaluations:
                break
            if not (self.slots and self._step(penalty)):
                self.slots = []  # nothing known, or rounding has spoilt it: go along the gradient
                if not self._step(penalty):
                    break  # nothing helps any more; the certificate tells how far the gradient is from 0
        return norm, evaluations

    def look(self, penalty: float) -> float:
        """Compute the gradient here and learn from how it has changed; return its norm."""
        gradient = self.basis[-1]
        if self.dual:
            torch.add(self.slope, self.point[:-1], alpha=penalty, out=gradient[:-1])
            torch.mm(self.rows, gradient[:-1], out=self.partners[-1, :-1])
        else:
            torch.mm(self.x.T, self.slope, out=gradient[:-1]).add_(self.point[:-1], alpha=penalty)
        gradient[-1] = self.slope.sum(0) * self.intercept
        self.partners[-1, -1] = gradient[-1]
        self.products[-1] = self.products[:, -1] = torch.mv(self.partners.flatten(1), gradient.flatten()).double()
        if self.pending is not None:
            step, change = self.pending, MEMORY + self.pending
            for store in self.stores:
                store[change].add_(store[-1])
            self._combine(change, self._only(change) + self._only(-1))
            if self.products[step, change] > 0:  # as a convex loss has it, but for rounding
                self.slots.append(step)
            self.pending = None
        return math.sqrt(max(0.0, self.products[-1, -1].item()))

    def value(self, penalty: float) -> float:
        return self.loss + penalty / 2 * self._inner(self.point, self.point, self.logits)

    def _turn(self, penalty: float) -> None:
        """Carry the memory over to another penalty: each change of the gradient gains the difference times its step."""
        for store in self.stores:
            store[MEMORY:-1, :-1].add_(store[:MEMORY, :-1], alpha=penalty - self.penalty)
        free = (self.basis[:, -1] @ self.basis[:, -1].T).double()  # of b, which is not penalised
        self.products -= free
        for i in range(MEMORY):
            self._combine(MEMORY + i, self._only(MEMORY + i) + (penalty - self.penalty) * self._only(i))
        self.products += free
        self.penalty, self.pending = penalty, None
        self.loss = self._loss(self.logits)

    def _step(self, penalty: float) -> bool:
        """Move along what the memory makes of the gradient; tell whether anything lower was found."""
        share = self._recursion()
        for store, along in zip(self.stores, (self.direction, self.image), strict=False):
            torch.mv(store.flatten(1).T, share.to(store.dtype), out=along.view(-1))
        if self.dual:
            torch.add(self.image[:-1], self.direction[-1], out=self.change)
        else:
            torch.addmm(self.direction[-1], self.rows, self.direction[:-1], out=self.change)
        descent = (share @ self.products[-1]).item()
        shrink = self._inner(self.direction, self.point, self.logits)
        bend = self._inner(self.direction, self.direction, self.change)
        length = self._search(descent, penalty * shrink, penalty * bend)
        if length is None:
            return False
        self.point.add_(self.direction, alpha=-length)
        self.pending = step = self.slots.pop(0) if len(self.slots) == MEMORY else self._free()
        for store, along in zip(self.stores, (self.direction, self.image), strict=False):
            torch.mul(along, -length, out=store[step])
            torch.neg(store[-1], out=store[MEMORY + step])
        self._combine(step, -length * share)
        self._combine(MEMORY + step, -self._only(-1))
        return True

    def _recursion(self) -> Float[Tensor, " m"]:
        """Return the quasi-Newton direction as a combination of the basis."""
        share = self._only(-1)
        if not self.slots:
            return share / self.products[-1, -1].sqrt()
        turns = {}
        for s in reversed(self.slots):
            turns[s] = share @ self.products[s] / self.products[s, MEMORY + s]
            share[MEMORY + s] -= turns[s]
        newest = self.slots[-1]
        share *= self.products[newest, MEMORY + newest] / self.products[MEMORY + newest, MEMORY + newest]
        for s in self.slots:
            share[s] += turns[s] - share @ self.products[MEMORY + s] / self.products[s, MEMORY + s]
        return share

    def _search(self, descent: float, shrink: float, bend: float) -> float | None:
        """Move the logits against `change` and return how far, or None where nothing lower is found.

        The slope along the line rises from -descent to its right: where it is near 0 is bracketed, then cut in by
        secants. Logits are linear along the line, so no matrix product is needed.
        """
        noise = 8 * torch.finfo(self.logits.dtype).eps * abs(self.loss)
        low, high, length = (0.0, -descent), None, 1.0
        for _ in range(20):
            torch.sub(self.logits, self.change, alpha=length, out=self.reached)
            loss = self._loss(self.reached)
            rise = -_dot(self.slope, self.change) - shrink + length * bend
            lower = loss - length * shrink + length**2 / 2 * bend <= self.loss + noise
            if lower and -0.5 * descent <= rise <= 0.3 * descent:
                self.logits, self.reached, self.loss = self.reached, self.logits, loss
                return length
            if rise > 0 or not lower:
                high = (length, abs(rise))
            else:
                low = (length, rise)
            if high is None:
                length *= 2
            else:
                share = min(max(low[1] / (low[1] - high[1]), 0.1), 0.9)
                length = low[0] + share * (high[0] - low[0])
        return None

    def _loss(self, logits: Float[Tensor, "n C"]) -> float:
        """Return the mean loss without penalty and write its derivatives by the logits into `slope`."""
        value, n = 0.0, len(logits)
        for (share, k, base), p in zip(self.branches, (self.slope, self.fused), strict=False):
            a = logits if base is None else torch.addcmul(base, logits, k, out=p)
            torch.sub(a, a.amax(1, keepdim=True), out=p)
            truth = p.gather(1, self.y)
            total = p.exp_().sum(1, keepdim=True)
            value += share / n * (total.log() - truth).sum().item()
            by = share / n if k is None else share / n * k
            p *= by / total
            p.scatter_add_(1, self.y, torch.zeros_like(truth).sub_(by))
        if len(self.branches) == 2:
            self.slope += self.fused
        return value

    def _inner(self, u: Float[Tensor, "r C"], v: Float[Tensor, "r C"], logits_of_v: Float[Tensor, "n C"]) -> float:
        """Return the inner product of two heads' W, without b."""
        if self.dual:
            return _dot(u[:-1], logits_of_v) - (u[:-1].sum(0) @ v[-1]).item()
        return _dot(u[:-1], v[:-1])

    def _combine(self, i: int, share: Float[Tensor, " m"]) -> None:
        """Bring the products up to date where vector i has become this combination of what the basis was."""
        inner = share @ self.products
        inner[i] = inner @ share
        self.products[i] = self.products[:, i] = inner

    def _only(self, i: int) -> Float[Tensor, " m"]:
        share = torch.zeros(len(self.products), dtype=torch.float64)
        share[i] = 1
        return share

    def _free(self) -> int:
        return min(set(range(MEMORY)) - set(self.slots))


def _dot(a: Tensor, b: Tensor) -> float:
    return torch.dot(a.flatten(), b.flatten()).item()


def _gram(x: Float[Tensor, "n D"], block: int = 256) -> Float[Tensor, "n n"]:
    """Return X X^T; of each pair of blocks only one is computed."""
    gram = x.new_empty(len(x), len(x))
    for i in range(0, len(x), block):
        torch.mm(x[i : i + block], x[: i + block].T, out=gram[i : i + block, : i + block])
        gram[:i, i : i + block] = gram[i : i + block, :i].T
    return gram
