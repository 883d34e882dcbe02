"""The statistics do what they promise, shown by simulation; and tests that are known to lie fail the same checks."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, binomtest, norm

from robopolicy.errors import EvaluationError
from robopolicy.evaluate.stats import (
    any_time_interval,
    compact_letters,
    holm,
    independent_log_e,
    mcnemar,
    mean_interval,
    paired_log_e,
    paired_score,
    pooled_interval,
    required_episodes,
    sequential,
    sign_flip_p,
    success_difference,
    success_interval,
)

ALPHA = 0.05
NULLS = 2000  # null experiments per simulation
BOUND = ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / NULLS)  # what a test of size ALPHA stays under


def two_sided(log_e_a: np.ndarray, log_e_b: np.ndarray) -> np.ndarray:
    return np.logaddexp(log_e_a, log_e_b) - math.log(2)


def ever(log_e: np.ndarray, alpha: float = ALPHA) -> float:
    """Share of experiments ``[m, n]`` in which a reader who looks after every pair ever sees a decision."""
    return float((log_e.max(axis=-1) >= -math.log(alpha)).mean())


def correlated_pairs(
    rng: np.random.Generator, p: float, correlation: float, shape: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Outcomes of two policies that both succeed with probability ``p``, correlated over seeds."""
    both = p * p + correlation * p * (1 - p)
    u = rng.random(shape)
    return u < p, (u < both) | ((u >= p) & (u < 2 * p - both))


# --- one policy -------------------------------------------------------------------------------------------------------------


def exact_coverage(n: int, p: float, method: str) -> float:
    intervals = [success_interval(k, n, method=method) for k in range(n + 1)]
    return float(sum(binom.pmf(k, n, p) for k, i in enumerate(intervals) if i.low <= p <= i.high))


def test_wilson_covers_95_percent_on_average_and_exact_always():
    grid = np.linspace(0.02, 0.98, 13)
    wilson = [exact_coverage(50, p, "wilson") for p in grid]
    assert abs(np.mean(wilson) - 0.95) < 0.01
    assert min(wilson) > 0.88
    assert min(exact_coverage(50, p, "exact") for p in grid) >= 0.95


def test_wilson_of_published_example():
    # 10 of 20, z = 1.96: centre 1/2, half width 1.96 sqrt(1/(4 * 20) + 1.96^2 / (4 * 400)) / (1 + 1.96^2 / 20)
    interval = success_interval(10, 20)
    half = 1.959964 * math.sqrt(1 / 80 + 1.959964**2 / 1600) / (1 + 1.959964**2 / 20)
    assert interval.high - 0.5 == pytest.approx(half, abs=1e-6)
    assert interval.low + interval.high == pytest.approx(1.0)


@given(n=st.integers(1, 300), data=st.data())
def test_success_intervals_contain_the_share_and_never_have_zero_width(n, data):
    k = data.draw(st.integers(0, n))
    for method in ("wilson", "exact"):
        interval = success_interval(k, n, method=method)
        assert 0 <= interval.low <= k / n <= interval.high <= 1
        assert interval.high - interval.low > 0


@pytest.mark.parametrize(("k", "n"), [(0, 0), (-1, 5), (6, 5)])
def test_impossible_counts_are_refused(k, n):
    with pytest.raises(EvaluationError):
        success_interval(k, n)


def test_bootstrap_of_the_mean_covers():
    rng = np.random.default_rng(1)
    truth = 8 / 10  # Beta(8, 2), skewed like scores near their maximum
    m, hits = 250, {"BCa": 0, "percentile": 0}
    for _ in range(m):
        values = rng.beta(8, 2, size=50)
        for method in hits:
            interval = mean_interval(values, rng, method=method, resamples=500)
            hits[method] += interval.low <= truth <= interval.high
    for method, hit in hits.items():
        assert 0.95 - 0.03 - 3 * math.sqrt(0.05 * 0.95 / m) < hit / m < 0.99, method


def test_bootstrap_is_a_function_of_its_generator_and_refuses_nonsense():
    values = np.random.default_rng(0).random(30)
    assert mean_interval(values, np.random.default_rng(3)) == mean_interval(values, np.random.default_rng(3))
    constant = mean_interval(np.ones(5), np.random.default_rng(0))
    assert (constant.low, constant.mean, constant.high) == (1, 1, 1)
    for bad in (np.array([]), np.array([1.0, np.nan])):
        with pytest.raises(EvaluationError):
            mean_interval(bad, np.random.default_rng(0))


def coverage_over_training_seeds(groups: int, seed_effect: float, same_seeds: bool, pool) -> float:
    """How often ``pool`` covers the true mean of a model with effects of training seed, environment seed, and noise."""
    rng = np.random.default_rng(2)
    m, n, hits = 200, 60, 0
    for _ in range(m):
        shape = (1, n) if same_seeds else (groups, n)
        table = (
            0.05 * rng.standard_normal((groups, 1))
            + seed_effect * rng.standard_normal(shape)
            + 0.3 * rng.standard_normal((groups, n))
        )
        interval = pool(list(table), rng)
        hits += interval.low <= 0 <= interval.high
    return hits / m


def test_pooling_covers_where_pooling_all_episodes_as_one_sample_does_not():
    def hierarchical(table, rng):
        return pooled_interval(table, rng, same_seeds=False, resamples=300)

    def naive(table, rng):
        return mean_interval(np.concatenate(table), rng, method="percentile", resamples=300)

    assert coverage_over_training_seeds(10, 0.0, False, hierarchical) > 0.88
    assert coverage_over_training_seeds(10, 0.0, False, naive) < 0.85


def test_pooling_over_the_same_seeds_counts_their_difficulty_once():
    def crossed(table, rng):
        return pooled_interval(table, rng, same_seeds=True, resamples=300)

    def nested(table, rng):
        return pooled_interval(table, rng, same_seeds=False, resamples=300)

    assert coverage_over_training_seeds(10, 0.5, True, crossed) > 0.90
    assert coverage_over_training_seeds(10, 0.5, True, nested) < 0.75


def test_pooling_needs_several_groups_that_match():
    rng = np.random.default_rng(0)
    for groups, same in (([np.ones(3)], True), ([np.ones(3), np.ones(0)], False), ([np.ones(3), np.ones(4)], True)):
        with pytest.raises(EvaluationError):
            pooled_interval(groups, rng, same_seeds=same)


# --- two policies -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_mcnemar_is_the_binomial_test_on_disagreements(pairs):
    a, b = np.array(pairs).T
    only_a, only_b = int((a > b).sum()), int((b > a).sum())
    result = mcnemar(a, b)
    assert (result.only_a, result.only_b) == (only_a, only_b)
    assert result.p_value == (binomtest(only_b, only_a + only_b).pvalue if only_a + only_b else 1.0)
    assert mcnemar(b, a).p_value == pytest.approx(result.p_value)


def test_paired_score_is_that_of_the_likeliest_policies_at_the_difference():
    for only_a, only_b, n, difference in ((3, 5, 60, -0.02), (0, 0, 97, -0.02), (9, 0, 40, 0.1), (12, 30, 300, -0.05)):
        grid = np.linspace(max(0.0, -difference), (1 - difference) / 2, 400_001)[1:-1]
        with np.errstate(divide="ignore"):
            both = np.log(grid + difference) * only_b if only_b else 0.0
            likelihood = both + np.log(grid) * only_a + np.log(1 - 2 * grid - difference) * (n - only_a - only_b)
        p = grid[np.argmax(likelihood)]
        expected = (only_b - only_a - n * difference) / math.sqrt(n * (2 * p + difference * (1 - difference)))
        assert float(paired_score(only_a, only_b, n, difference)) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("disagree", [0.0201, 0.022, 0.03, 0.05, 0.1, 0.2])
def test_paired_score_errs_as_often_as_it_says(disagree):
    """Exact: of policies that are worse by just the margin, how many of 100 pairs pass at 2.5 %, one-sided."""
    n, margin = 100, 0.02
    only_a, only_b = np.meshgrid(np.arange(n + 1), np.arange(n + 1), indexing="ij")
    either = only_a + only_b
    weight = binom.pmf(either, n, disagree) * binom.pmf(only_a, either, (disagree + margin) / 2 / disagree)
    possible = either <= n
    passed = paired_score(np.where(possible, only_a, 0), np.where(possible, only_b, 0), n, -margin) > norm.isf(0.025)
    assert weight[possible].sum() == pytest.approx(1)
    assert weight[possible & passed].sum() < 0.027


def test_interval_of_the_success_difference_covers():
    rng = np.random.default_rng(5)
    m, n, p = 800, 60, 0.7
    for correlation in (0.0, 0.5):
        a, b = correlated_pairs(rng, p, correlation, (m, n))
        intervals = [success_difference(x, y) for x, y in zip(a, b, strict=True)]
        covered = np.mean([i.low <= 0 <= i.high for i in intervals])
        assert 0.93 - 3 * math.sqrt(0.05 * 0.95 / m) < covered
    same = success_difference(np.ones(20, bool), np.ones(20, bool))
    assert same.low < same.mean == 0.0 < same.high


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("correlation", [0.0, 0.6])
def test_looking_after_every_pair_rejects_a_true_null_in_at_most_alpha_of_experiments(p, correlation):
    a, b = correlated_pairs(np.random.default_rng(11), p, correlation, (NULLS, 500))
    d = b.astype(float) - a
    assert ever(two_sided(paired_log_e(-d), paired_log_e(d))) <= BOUND
    assert ever(two_sided(independent_log_e(b, a), independent_log_e(a, b))) <= BOUND


def test_a_repeated_z_test_fails_the_same_check():
    a, b = correlated_pairs(np.random.default_rng(11), 0.5, 0.0, (NULLS, 500))
    n = np.arange(1, 501)
    p_a, p_b = np.cumsum(a, axis=1) / n, np.cumsum(b, axis=1) / n
    spread = np.sqrt((p_a * (1 - p_a) + p_b * (1 - p_b)) / n)
    z = np.abs(p_b - p_a) / np.where(spread > 0, spread, np.inf)
    rejected = (z[:, 19:] > norm.ppf(1 - ALPHA / 2)).any(axis=1).mean()  # a patient reader, who first looks after 20 pairs
    assert rejected > BOUND
    assert rejected > 0.25


def test_outcomes_that_exclude_each_other_break_the_independent_test_but_not_the_paired_one():
    a, b = correlated_pairs(
        np.random.default_rng(12), 0.5, -1.0, (NULLS, 500)
    )  # what A solves B does not, and the other way round
    d = b.astype(float) - a
    assert ever(two_sided(paired_log_e(-d), paired_log_e(d))) <= BOUND
    assert ever(two_sided(independent_log_e(b, a), independent_log_e(a, b))) > 2 * BOUND


def test_scores_may_be_tested_at_any_time_too():
    rng = np.random.default_rng(13)
    scores = rng.beta(2, 1, (2, NULLS, 100))
    d = scores[1] - scores[0]
    assert ever(two_sided(paired_log_e(-d), paired_log_e(d))) <= BOUND
    better = paired_log_e(rng.beta(4, 1, (300, 200)) - rng.beta(2, 1, (300, 200)))
    assert ever(better) > 0.9


def test_one_sided_e_values_do_not_favour_the_worse_policy():
    a, b = np.random.default_rng(14).random((2, NULLS, 300)) < np.array([0.6, 0.4])[:, None, None]
    assert ever(paired_log_e(b.astype(float) - a)) <= BOUND
    assert ever(independent_log_e(a, b)) <= BOUND


@pytest.mark.parametrize(("p_a", "p_b", "least"), [(0.5, 0.7, 0.8), (0.5, 0.8, 0.97), (0.8, 0.9, 0.35)])
def test_sequential_tests_find_real_differences_within_200_pairs(p_a, p_b, least):
    a, b = np.random.default_rng(15).random((2, 500, 200)) < np.array([p_a, p_b])[:, None, None]
    d = b.astype(float) - a
    assert ever(two_sided(paired_log_e(-d), paired_log_e(d))) > least
    assert ever(independent_log_e(a, b)) > least  # one-sided


def test_decision_names_the_better_policy_at_the_first_crossing_and_keeps_it():
    a, b = np.zeros(40, bool), np.ones(40, bool)
    result = sequential(a, b)
    assert result.verdict == "B"
    assert sequential(b, a).verdict == "A"
    assert result.decided_at is not None
    assert result.log_e[result.decided_at - 1] >= math.log(20) > result.log_e[result.decided_at - 2]
    reversed_later = sequential(np.append(a, np.ones(400, bool)), np.append(b, np.zeros(400, bool)))
    assert (reversed_later.verdict, reversed_later.decided_at) == ("B", result.decided_at)
    assert result.p_value == pytest.approx(math.exp(-result.log_e.max()))
    undecided = sequential(a, a)
    assert (undecided.verdict, undecided.p_value) == (None, 1.0)
    assert sequential(a, b, paired=False).verdict == "B"


@given(st.lists(st.sampled_from([-1, 0, 1]), min_size=1, max_size=40))
def test_paired_e_value_depends_only_on_disagreements(differences):
    d = np.array(differences, float)
    assert paired_log_e(d)[-1] == pytest.approx(paired_log_e(np.append(d[d != 0], 0))[-1])


def test_sequential_test_refuses_scores_beyond_its_range():
    for bad in ([0.0, 2.0], [0.0, math.nan]):
        with pytest.raises(EvaluationError):
            sequential(np.zeros(2), np.array(bad))


def test_the_any_time_interval_covers_when_its_reader_stops_as_soon_as_it_excludes_zero():
    rng = np.random.default_rng(16)
    covered = []
    for _ in range(40):
        a, b = rng.random((2, 300)) < np.array([0.6, 0.75])[:, None]
        d = b.astype(float) - a
        stop = sequential(a, b).decided_at or 300
        interval = any_time_interval(d[:stop], points=101)
        covered.append(interval.low <= 0.15 <= interval.high)
        assert (interval.low > -0.02) or stop == 300  # agrees with the decision, but for the grid
    assert np.mean(covered) > 0.88


def test_the_any_time_interval_is_the_whole_range_at_first_and_narrows():
    rng = np.random.default_rng(17)
    d = rng.choice([-1.0, 0.0, 1.0], 1000)
    few, many = any_time_interval(d[:2], points=101), any_time_interval(d, points=101)
    assert (few.low, few.high) == (-1.0, 1.0)
    assert many.high - many.low < 0.3


def test_sign_flips_keep_their_size_and_see_a_shift():
    rng = np.random.default_rng(18)
    null = [sign_flip_p(rng.standard_normal(30), rng) for _ in range(100)]
    assert np.mean(np.array(null) <= 0.05) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 100)
    assert sign_flip_p(rng.standard_normal(100) + 0.6, rng) < 0.001
    assert sign_flip_p(np.zeros(5), rng) == 1.0
    assert sign_flip_p(np.array([0.3]), rng) == 1.0  # one pair can show nothing


# --- many policies ----------------------------------------------------------------------------------------------------------


def test_holm_of_a_hand_example():
    # sorted .01, .02, .03, .04 times 4, 3, 2, 1 = .04, .06, .06, .04, made monotone
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])


def test_letters_of_a_hand_example():
    # Means 9 > 8 > 7 > 2. The best differs from the third; the last from all: {0, 1} a, {1, 2} b, {3} c.
    assert compact_letters([9, 8, 7, 2], {(0, 2), (0, 3), (1, 3), (2, 3)}) == ["a", "ab", "b", "c"]
    assert compact_letters([1, 2, 3], set()) == ["a", "a", "a"]
    assert compact_letters([2, 7, 9], {(0, 1), (1, 2), (0, 2)}) == ["c", "b", "a"]


@given(data=st.data(), count=st.integers(2, 6))
def test_policies_share_a_letter_exactly_when_they_are_not_separated(data, count):
    pairs = list(itertools.combinations(range(count), 2))
    different = set(data.draw(st.lists(st.sampled_from(pairs), unique=True)))
    letters = compact_letters(list(range(count)), different)
    for i, j in pairs:
        assert bool(set(letters[i]) & set(letters[j])) == ((i, j) not in different)


# --- planning ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("p_a", "p_b", "n"), [(0.5, 0.6, 385), (0.5, 0.7, 91), (0.5, 0.8, 36), (0.8, 0.9, 197), (0.9, 0.95, 432)]
)
def test_required_episodes_of_independent_arms(p_a, p_b, n):
    assert required_episodes(p_a, p_b) == n


def test_required_pairs_reach_their_power_and_correlation_saves_episodes():
    n = required_episodes(0.6, 0.75, correlation=0.3)
    assert n < required_episodes(0.6, 0.75, correlation=0.0) <= required_episodes(0.6, 0.75) + 5
    rng = np.random.default_rng(4)
    both = 0.6 * 0.75 + 0.3 * math.sqrt(0.24 * 0.1875)
    u = rng.random((1000, n))
    only_a, only_b = (u < 0.6 - both).sum(axis=1), (u > 1 - (0.75 - both)).sum(axis=1)
    z = np.abs(only_b - only_a) / np.sqrt(np.maximum(only_a + only_b, 1))
    assert 0.75 < (z > norm.ppf(0.975)).mean() < 0.86
    with pytest.raises(EvaluationError):
        required_episodes(0.5, 0.5)
    with pytest.raises(EvaluationError):
        required_episodes(0.1, 0.9, correlation=0.9)


@pytest.mark.parametrize(("outcome", "low", "high"), [(True, 0.963, 1.0), (False, 0.0, 0.037)])
def test_unanimous_runs_still_have_an_interval(outcome: bool, low: float, high: float) -> None:
    groups = [np.full(100, outcome)] * 3
    interval = pooled_interval(groups, np.random.default_rng(0), same_seeds=True)
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=1e-3)
    assert pooled_interval(groups, np.random.default_rng(0), same_seeds=False).high - interval.high < 0.03
