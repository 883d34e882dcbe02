"""Deadlines that do not drift, and what becomes of periods that were missed."""

import pytest

from robopolicy.deploy.clock import FakeClock, SystemClock, Ticker


def test_a_hundred_thousand_periods_do_not_drift() -> None:
    clock = FakeClock(1234.5)
    ticker = Ticker(clock, 0.004)
    for k in range(100_000):
        tick = ticker.wait()
        clock.time += 0.0013 if k % 3 else 0.0039  # work of varying length, always within the period
    assert tick.number == 99_999
    assert tick.deadline == 1234.5 + 99_999 * 0.004
    assert tick.start == tick.deadline
    assert tick.skipped == 0


@pytest.mark.parametrize(("stall", "skipped"), [(0.0039, 0), (0.0041, 0), (0.0079, 0), (0.0081, 1), (0.0161, 3), (0.4001, 99)])
def test_a_stall_skips_the_periods_that_went_by(stall: float, skipped: int) -> None:
    clock = FakeClock()
    ticker = Ticker(clock, 0.004)
    for _ in range(10):
        ticker.wait()
    clock.time += stall
    tick = ticker.wait()
    assert tick.skipped == skipped
    assert tick.number == 10 + skipped
    assert tick.deadline == pytest.approx(0.04 + 0.004 * skipped, abs=1e-12)
    assert 0 <= tick.start - tick.deadline < 0.004
    after = ticker.wait()
    assert (after.number, after.skipped) == (tick.number + 1, 0)
    assert after.start == pytest.approx(after.deadline)


def test_the_system_clock_sleeps_until_a_time_and_not_at_all_for_one_that_passed() -> None:
    clock = SystemClock()
    begin = clock.now()
    clock.sleep_until(begin + 0.02)
    assert 0.02 <= clock.now() - begin < 2.0
    before = clock.now()
    clock.sleep_until(begin)
    assert clock.now() - before < 1.0
