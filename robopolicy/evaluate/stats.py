"""The statistics of success: intervals, paired comparisons, a test that may be looked at any time, letters for many policies.

Everything here is a pure function of arrays; randomness (the bootstrap's) comes in as a ``numpy.random.Generator``. Boolean
outcomes are called *success*, bounded or unbounded reals *score*. Policy ``B`` is better than ``A`` when differences ``b -
a`` are positive.
"""

from __future__ import annotations

import math
import string
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from scipy import stats

from robopolicy.errors import EvaluationError

LEVEL = 0.95
RESAMPLES = 10_000


class Interval(NamedTuple):
    """An estimate of a mean (a probability, a score, a difference of them) with its confidence interval."""

    mean: float
    low: float
    high: float
    level: float = LEVEL

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def signed(self) -> str:
        """As text with signs, for differences."""
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


# ------------------------------------------------------------------------------------------------------------------- one policy


def success_interval(successes: int, n: int, level: float = LEVEL, method: Literal["wilson", "exact"] = "wilson") -> Interval:
    """Interval of a success probability from ``successes`` of ``n`` independent episodes.

    ``wilson`` covers ``level`` on average over p and is the one to read; ``exact`` (Clopper-Pearson) covers at least
    ``level`` for every p and is wider. Neither ever has zero width: 0 of 20 says "below 16 %", not "never".

    Raises EvaluationError unless ``0 <= successes <= n`` and ``n >= 1``.
    """
    if not 0 <= successes <= n or n < 1:
        raise EvaluationError(f"{successes} successes of {n} episodes: expected 0 <= successes <= episodes, at least 1 episode")
    bounds = stats.binomtest(int(successes), int(n)).proportion_ci(level, method=method)
    return Interval(successes / n, float(bounds.low), float(bounds.high), level)


def mean_interval(
    values: np.ndarray,
    rng: np.random.Generator,
    level: float = LEVEL,
    method: Literal["BCa", "percentile"] = "BCa",
    resamples: int = RESAMPLES,
) -> Interval:
    """Bootstrap interval of the mean of ``values [n]``; differences of paired scores go in here too (the paired bootstrap).

    BCa (Efron 1987) corrects for skew, which scores near their maximum have. When all values are equal the bootstrap knows
    nothing of the spread and the interval has zero width; read the success interval then.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0 or not np.isfinite(values).all():
        raise EvaluationError(f"a mean with interval needs a non-empty vector of finite numbers, found shape {values.shape}")
    mean = float(values.mean())
    if np.ptp(values) == 0.0:
        return Interval(mean, mean, mean, level)
    result = stats.bootstrap(
        (values,),
        np.mean,
        confidence_level=level,
        method=method,
        n_resamples=resamples,
        batch=max(1, 2_000_000 // len(values)),
        rng=rng,
    )
    bounds = result.confidence_interval
    return Interval(mean, float(bounds.low), float(bounds.high), level)


def pooled_interval(
    groups: Sequence[np.ndarray], rng: np.random.Generator, *, same_seeds: bool, level: float = LEVEL, resamples: int = RESAMPLES
) -> Interval:
    """Hierarchical bootstrap of the mean over training seeds; ``groups[g]`` are the episodes of training seed ``g``.

    A draw resamples training seeds with replacement, then episodes within each. With ``same_seeds`` all groups were evaluated
    on the same environment seeds, ``groups[g][i]`` on seed ``i``: the seeds are then drawn once for all groups (the crossed
    bootstrap of Owen 2007), because a hard initial state is hard for all of them and drawing it separately would hide that
    variance.

    The percentile interval is too narrow when training seeds are few (docs/eval.md has the measured coverage). When every episode
    succeeded, or none did, a bootstrap knows no spread at all; the Wilson interval stands in, counting shared seeds once.

    Raises EvaluationError for fewer than 2 groups, an empty group, or unequal lengths with ``same_seeds``.
    """
    if len(groups) < 2 or any(len(g) == 0 for g in groups):
        raise EvaluationError(f"pooling needs at least 2 training seeds with episodes each, found {[len(g) for g in groups]}")
    sizes = {len(g) for g in groups}
    if same_seeds and len(sizes) > 1:
        raise EvaluationError(f"pooling over the same seeds needs groups of one length, found {sorted(sizes)}")
    outcomes = np.concatenate([np.asarray(g) for g in groups])
    if outcomes.dtype == bool and outcomes.all() == outcomes.any():
        n = len(groups[0]) if same_seeds else len(outcomes)
        return success_interval(n * bool(outcomes[0]), n, level=level)
    count = len(groups)
    picked = rng.integers(count, size=(resamples, count))
    if same_seeds:
        # The mean over resampled groups and seeds is w_g^T Y w_s with multinomial weights; two matrix products do all draws
        # at once.
        table = np.asarray(groups, dtype=np.float64)
        n = table.shape[1]
        group_weights = np.stack([np.bincount(row, minlength=count) for row in picked]) / count
        seed_weights = rng.multinomial(n, np.full(n, 1 / n), size=resamples) / n
        means = np.einsum("rs,rs->r", group_weights @ table, seed_weights)
        estimate = float(table.mean())
    else:
        # Each appearance of a group in a draw gets its own resample of that group's episodes.
        means = np.zeros(resamples)
        for g, values in enumerate(groups):
            rows, _ = np.nonzero(picked == g)
            values = np.asarray(values, dtype=np.float64)
            weights = rng.multinomial(len(values), np.full(len(values), 1 / len(values)), size=len(rows)) / len(values)
            np.add.at(means, rows, weights @ values / count)
        estimate = float(np.mean([np.mean(g) for g in groups]))
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(estimate, float(low), float(high), level)


# ------------------------------------------------------------------------------------------ two policies, fixed number of pairs


class McNemar(NamedTuple):
    """Paired successes: on how many seeds only one of the two policies succeeded, and the exact two-sided p-value."""

    only_a: int
    only_b: int
    p_value: float


def mcnemar(a: np.ndarray, b: np.ndarray) -> McNemar:
    """Exact McNemar test of equal success probability from paired outcomes ``a, b: bool [n]``. Decide ``n`` before looking."""
    a, b = _paired(a, b)
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    p = float(stats.binomtest(only_a, only_a + only_b, 0.5).pvalue) if only_a + only_b else 1.0
    return McNemar(only_a, only_b, p)


def success_difference(a: np.ndarray, b: np.ndarray, level: float = LEVEL) -> Interval:
    """Interval of ``P(B succeeds) - P(A succeeds)`` from paired outcomes.

    Half an observation is added to each cell of the 2 x 2 table (Agresti and Min 2005). Unlike the bootstrap it keeps a width
    when the two never disagree. The estimate itself is not adjusted.
    """
    a, b = _paired(a, b)
    n = len(a) + 2
    only_a, only_b = (a & ~b).sum() + 0.5, (b & ~a).sum() + 0.5
    centre = (only_b - only_a) / n
    half = stats.norm.ppf((1 + level) / 2) * math.sqrt((only_a + only_b) - (only_b - only_a) ** 2 / n) / n
    return Interval(float(b.mean() - a.mean()), max(-1.0, float(centre - half)), min(1.0, float(centre + half)), level)


def paired_score(only_a: np.ndarray | int, only_b: np.ndarray | int, n: int, difference: float) -> np.ndarray:
    """Score statistic of ``P(B succeeds) - P(A succeeds) = difference`` (not 0) from ``n`` pairs (Tango 1998); normal if it is.

    Positive when B does better than that. Its variance is that of the likeliest policies whose difference is just that, so it
    does not take few disagreements for certainty, as an interval from the observed variance does.
    """
    only_a, only_b = np.asarray(only_a, np.float64), np.asarray(only_b, np.float64)
    linear = (2 * n - only_b + only_a) * difference - only_a - only_b
    constant = -only_a * difference * (1 - difference)
    p_only_a = (np.sqrt(linear**2 - 8 * n * constant) - linear) / (4 * n)  # likeliest, with p_only_b = p_only_a + difference
    score: np.ndarray = (only_b - only_a - n * difference) / np.sqrt(n * (2 * p_only_a + difference * (1 - difference)))
    return score


def sign_flip_p(differences: np.ndarray, rng: np.random.Generator) -> float:
    """Two-sided permutation p-value of paired differences ``[n]``: under equality each is as likely to have the other sign."""
    d = np.asarray(differences, dtype=np.float64)
    d = d[d != 0]
    if len(d) == 0:
        return 1.0
    reached = 0
    for _ in range(0, RESAMPLES, 1000):  # in parts, for memory
        signs = rng.integers(0, 2, size=(1000, len(d))) * 2 - 1
        reached += int((np.abs(signs @ d) >= abs(d.sum()) * (1 - 1e-12)).sum())
    return (1 + reached) / (1 + RESAMPLES)


def _paired(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a, dtype=bool), np.asarray(b, dtype=bool)
    if a.shape != b.shape or a.ndim != 1 or len(a) == 0:
        raise EvaluationError(f"paired outcomes need two vectors of one non-zero length, found shapes {a.shape} and {b.shape}")
    return a, b


# ------------------------------------------------------------------------------------------------------- two policies, any time


def paired_log_e(differences: np.ndarray, grid: int = 32) -> np.ndarray:
    """One-sided e-process against ``H0: mean difference <= 0`` for pairs on the same seeds, ``differences [..., n]`` in [-1, 1].

    A gambler with capital 1 stakes the fraction ``lam`` on every pair: capital times ``1 + lam * d``. Under H0 the expected
    factor is at most 1, so the capital is a non-negative supermartingale, however the two outcomes of a pair depend on each
    other, and P(capital ever reaches 1 / alpha) <= alpha (Ville). The stakes are mixed uniformly over ``grid`` points of (0,
    1), which keeps this property and needs no tuning. For successes, d is -1, 0 or 1 and this is McNemar's test in sequential
    form: only seeds on which the policies disagree move the capital.

    Returns the log capital after every pair, ``[..., n]``.
    """
    d = np.asarray(differences, dtype=np.float64)
    if d.size and not np.abs(d).max() <= 1.0:  # written so that NaN fails too
        raise EvaluationError("the sequential test needs differences within [-1, 1]; use successes, or scores within [0, 1]")
    total = np.full(d.shape, -np.inf)
    for stake in (np.arange(grid) + 0.5) / grid:
        np.logaddexp(total, np.cumsum(np.log1p(stake * d), axis=-1), out=total)
    return total - math.log(grid)


def independent_log_e(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """One-sided e-process against ``H0: P(B) <= P(A)`` for INDEPENDENT outcomes ``a, b [..., n]``, one of each a block.

    Turner and Grunwald: before block i predict ``p_a, p_b`` from the blocks before it (priors Beta(1, 2) and Beta(2, 1)), and
    with ``p = (p_a + p_b) / 2`` multiply by ``Bern(a; p_a) Bern(b; p_b) / (Bern(a; p) Bern(b; p))`` where ``p_b > p_a``, else
    by 1. At equal true probability q the expected factor is ``1 - ((p_b - p_a) (q - p) / (2 p (1 - p)))^2 <= 1``, and less
    where B is truly worse.

    Use it for trials that share nothing (an arm on a table, initial states drawn anew). That product of expectations needs a
    and b independent: on shared seeds it is too careful when seeds are hard for both, and WRONG when what is hard for one is
    easy for the other; :func:`paired_log_e` holds always. Returns the log e-value after every block, ``[..., n]``.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    seen = np.arange(a.shape[-1])
    p_a = (1 + np.cumsum(a, axis=-1) - a) / (3 + seen)
    p_b = (2 + np.cumsum(b, axis=-1) - b) / (3 + seen)
    p = (p_a + p_b) / 2

    def log_ratio(y: np.ndarray, alternative: np.ndarray) -> np.ndarray:
        return np.where(y > 0, np.log(alternative / p), np.log((1 - alternative) / (1 - p)))

    return np.cumsum(np.where(p_b > p_a, log_ratio(a, p_a) + log_ratio(b, p_b), 0.0), axis=-1)


def any_time_interval(differences: np.ndarray, alpha: float = 0.05, points: int = 201) -> Interval:
    """Interval of the mean difference that holds at every moment at once, so also when looking at it decided when to stop.

    It keeps the means ``m`` on a grid over [-1, 1] that the two-sided test of "mean difference = m" has never rejected: the
    betting confidence sequence of Waudby-Smith and Ramdas (2024), with the e-process of :func:`paired_log_e`. Wider than a
    fixed-n interval.
    """
    d = np.asarray(differences, dtype=np.float64)
    means = np.linspace(-1, 1, points)
    shifted = (d - means[:, None]) / (1 + np.abs(means[:, None]))  # within [-1, 1] again
    log_e = np.logaddexp(paired_log_e(shifted), paired_log_e(-shifted)) - math.log(2)
    kept = means[log_e.max(axis=-1, initial=0.0) < -math.log(alpha)]
    step = 2 / (points - 1)
    low, high = (kept[0] - step, kept[-1] + step) if len(kept) else (d.mean(), d.mean())
    return Interval(float(d.mean()), max(-1.0, float(low)), min(1.0, float(high)), 1 - alpha)


@dataclass(frozen=True)
class Sequential:
    """Where a two-sided sequential test stands.

    ``log_e [n]`` is the log of the mean of the two one-sided e-values. Under equality both are e-processes, hence so is their
    mean: the test "reject once the mean reaches 1 / alpha" has size alpha at any stopping time. The verdict names the side
    with the larger one-sided e-value; that side is itself at least 1 / alpha then, so naming the WRONG winner also has
    probability at most alpha.
    """

    log_e: np.ndarray
    log_e_a: np.ndarray
    log_e_b: np.ndarray
    alpha: float
    decided_at: int | None  # pairs used when the threshold was first reached

    @property
    def verdict(self) -> Literal["A", "B"] | None:
        """The better policy, or None while undecided. Once decided, later pairs do not change it."""
        if self.decided_at is None:
            return None
        last = self.decided_at - 1
        return "B" if self.log_e_b[last] > self.log_e_a[last] else "A"

    @property
    def p_value(self) -> float:
        """Anytime-valid p-value: 1 / max over time of the e-value, at most 1."""
        return math.exp(-max(0.0, float(self.log_e.max(initial=0.0))))


def sequential(a: np.ndarray, b: np.ndarray, *, alpha: float = 0.05, paired: bool = True) -> Sequential:
    """Two-sided anytime-valid test on outcomes ``a, b [n]`` in the order in which they were seen.

    ``paired``: rows are the same seed in both arms (:func:`paired_log_e`; successes or scores in [0, 1]); otherwise independent
    successes (:func:`independent_log_e`).
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1:
        raise EvaluationError(f"the sequential test needs two vectors of one length, found shapes {a.shape} and {b.shape}")
    log_e_b, log_e_a = (
        (paired_log_e(b - a), paired_log_e(a - b)) if paired else (independent_log_e(a, b), independent_log_e(b, a))
    )
    log_e = np.logaddexp(log_e_a, log_e_b) - math.log(2)
    crossed = np.flatnonzero(log_e >= -math.log(alpha))
    return Sequential(log_e, log_e_a, log_e_b, alpha, int(crossed[0]) + 1 if len(crossed) else None)


# ---------------------------------------------------------------------------------------------------------------- many policies


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Holm's step-down adjusted p-values, in the order given: reject those at most alpha, family-wise error alpha."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted


def compact_letters(means: Sequence[float], different: Collection[tuple[int, int]]) -> list[str]:
    """Compact letter display (Piepho 2004, insert and absorb): two policies share a letter unless their pair is in ``different``.

    Args:
        means: One figure per policy; the letter ``a`` goes to the group that holds the best.
        different: Pairs of indices whose difference is significant.

    Returns:
        One string of letters per policy.
    """
    columns: list[frozenset[int]] = [frozenset(range(len(means)))]
    for i, j in different:
        split = [part for c in columns for part in ((c - {i}, c - {j}) if i in c and j in c else (c,))]
        columns = [c for k, c in enumerate(split) if not any(c < other for other in split) and c not in split[:k]]
    rank = {policy: position for position, policy in enumerate(sorted(range(len(means)), key=lambda k: -means[k]))}
    columns.sort(key=lambda column: sorted(rank[policy] for policy in column))
    if len(columns) > len(string.ascii_letters):
        raise EvaluationError(f"{len(columns)} groups need more letters than there are; compare fewer policies at once")
    return [
        "".join(string.ascii_letters[k] for k, column in enumerate(columns) if policy in column) for policy in range(len(means))
    ]


# --------------------------------------------------------------------------------------------------------------------- planning


def required_episodes(
    p_a: float, p_b: float, *, power: float = 0.8, alpha: float = 0.05, correlation: float | None = None
) -> int:
    """Episodes PER POLICY to tell success probability ``p_a`` from ``p_b``, two-sided, normal approximation.

    Without ``correlation`` the arms are independent; with it they share seeds, outcomes on one seed correlate by that much,
    and the test is McNemar's (Connor 1987).

    Raises EvaluationError for equal probabilities, or a correlation that these two probabilities cannot have.
    """
    if p_a == p_b or not (0 < p_a < 1 and 0 < p_b < 1):
        raise EvaluationError(f"required episodes for {p_a} against {p_b}: expected two different probabilities within (0, 1)")
    z_alpha, z_power = float(stats.norm.ppf(1 - alpha / 2)), float(stats.norm.ppf(power))
    delta = p_b - p_a
    var_a, var_b = p_a * (1 - p_a), p_b * (1 - p_b)
    if correlation is None:
        return math.ceil((z_alpha + z_power) ** 2 * (var_a + var_b) / delta**2)
    both = p_a * p_b + correlation * math.sqrt(var_a * var_b)
    if not max(0.0, p_a + p_b - 1) <= both <= min(p_a, p_b):
        raise EvaluationError(f"correlation {correlation} is impossible between successes of probability {p_a} and {p_b}")
    discordant = p_a + p_b - 2 * both
    return math.ceil((z_alpha * math.sqrt(discordant) + z_power * math.sqrt(discordant - delta**2)) ** 2 / delta**2)
