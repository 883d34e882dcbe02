"""``Mixture``: the parents' fields, brought to one chunk, one path and one normaliser, and mixed by a rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from robopolicy.errors import ConfigError
from robopolicy.generative.fields import Convex, Field, OnPath, OnRows, Product
from robopolicy.generative.guidance import Guidance
from robopolicy.generative.path import Path, Pred, broadcast_time


class Map(NamedTuple):
    """Affine map ``x0_own = factor x0 + shift``, per entry ``[rows or 1, A]``, from composed to own normalised actions."""

    factor: Tensor
    shift: Tensor


class Mixture:
    """Several fields as one, by the rule of a composition, and (:meth:`each`) one by one.

    Args:
        fields: One per parent, for the whole chunk and context (:func:`adapted`).
        rows: The rows that each of them has.
        horizon: Rows of the chunk.
        rule: ``product`` or ``guidance``; anything else is the weighted mean.
        weights: One per parent.
        path: The path that all fields are on.
        prior_std: Of the product.

    Raises:
        ConfigError: The weights, or the parents, do not fit the rule.

    Attributes:
        asked: Which of the fields a call asks: not those of weight 0.
    """

    def __init__(
        self,
        fields: Sequence[Field],
        rows: Sequence[slice],
        horizon: int,
        rule: str,
        weights: Sequence[float],
        path: Path,
        prior_std: float | None,
    ) -> None:
        self.fields = list(fields)
        have = torch.zeros(len(fields), horizon, dtype=torch.float64)
        for index, own in enumerate(rows):
            have[index, own] = 1
        self.alone = have / have.sum(0)  # where not all have a row: the mean of those that do
        shared = have.bool().all(0)
        self.aligned = bool(shared.all())
        given = torch.tensor(weights, dtype=torch.float64)[:, None]
        sums_to_one = abs(float(given.sum()) - 1) < 1e-6
        if rule == "guidance":
            self._check_guidance(sums_to_one, weights)
            self.mixed: Field = Guidance(self.fields[0], self.fields[1], float(weights[0]))
            self.asked = [index for index, weight in enumerate(weights) if weight]
            return
        if rule == "product" and not (float(given.min()) >= 0 and float(given.sum()) > 0):
            raise ConfigError(f"weights {list(weights)}: rule product needs exponents, none negative, not all 0")
        if rule != "product" and not (sums_to_one and float(given.min()) >= 0):
            raise ConfigError(f"weights {list(weights)}: rule convex needs one each, none negative, with sum 1")
        total = (have * given).sum(0)
        elsewhere = torch.where(total > 0, have * given / total.clamp_min(1e-12), self.alone)
        by_row = torch.where(shared, given, elsewhere)
        self.asked = [index for index, weight in enumerate(by_row) if bool((weight > 0).any())]
        self.mixed = Product(self.fields, by_row, path, prior_std) if rule == "product" else Convex(self.fields, by_row)

    def _check_guidance(self, sums_to_one: bool, weights: Sequence[float]) -> None:
        if len(self.fields) != 2 or not self.aligned:
            raise ConfigError(
                "rule guidance takes two policies of the same horizon and n_obs_steps: the one to follow, then the one to leave"
            )
        if not sums_to_one or weights[0] < 0:
            raise ConfigError(
                f"weights {list(weights)}: rule guidance needs scale and 1 - scale, for example 1.5 -0.5; scale not negative"
            )

    def __call__(self, x: Tensor, t: Tensor, ctx: Tensor, /) -> Pred:
        return self.mixed(x, t, ctx)

    def each(self, x: Tensor, t: Tensor, ctx: Tensor, /) -> list[Pred]:
        """What every parent sees; of rows that it does not have, it says what those say that do."""
        seen = [field(x, t, ctx) for field in self.fields]
        if self.aligned:
            return seen
        alone = self.alone.to(x.device, x.dtype)[:, None, :, None]
        mean = Pred(*((alone * torch.stack(part)).sum(0) for part in zip(*seen, strict=True)))
        return [
            Pred(torch.where(own > 0, pred.x0, mean.x0), torch.where(own > 0, pred.eps, mean.eps))
            for own, pred in zip(alone, seen, strict=True)
        ]


def adapted(
    field: Field, own: Path, on: Path, ctx: slice, rows: slice, *, same_path: bool, action_map: Callable[[], Map] | None
) -> Field:
    """A parent's field for the composition's chunk, context, path and, given ``action_map``, normaliser."""
    if action_map is not None:
        field = _Renormalized(field, own, on, action_map)
    elif not same_path:
        field = OnPath(field, own, on)
    return OnRows(field, ctx, rows)


class _Renormalized:
    """A parent whose normaliser differs.

    With ``x0_own = k x0 + m`` the state ``x = alpha x0 + sigma eps`` becomes ``k x + alpha m = alpha x0_own + (k sigma) eps``: of
    the same action, with unit noise still, but noisier by ``k``. Where ``k`` is the same in all entries that is exactly the
    parent's state at noise level ``k sigma / alpha``; else their geometric mean stands for all.
    """

    def __init__(self, field: Field, own: Path, on: Path, action_map: Callable[[], Map]) -> None:
        self.field, self.own, self.on, self.action_map = field, own, on, action_map

    def __call__(self, x: Tensor, t: Tensor, ctx: Tensor, /) -> Pred:
        k, m = self.action_map()  # asked on each call: a checkpoint's normalisers are loaded after it was built
        level = k.double().log().mean().exp()
        k, m = k.to(x.dtype), m.to(x.dtype)
        alpha, sigma = self.on.coefficients(t)
        own_t = self.own.t_of(level * sigma / alpha)
        own_alpha, own_sigma = self.own.coefficients(own_t)
        factor = broadcast_time((own_alpha + own_sigma) / (alpha + level * sigma), x)
        pred = self.field((k * x + broadcast_time(alpha, x) * m) * factor, own_t, ctx)
        return Pred((pred.x0 - m) / k, pred.eps * (level.to(x.dtype) / k))
