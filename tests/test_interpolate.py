"""From policy rate to control rate: continuous in position and velocity, on the rotation group, at once for grippers."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from robopolicy.deploy.interpolate import InterpolationConfig, Interpolator, RotationColumns
from robopolicy.features import Feature

DT, ROW = 0.004, 0.05


def played(
    rows: np.ndarray, config: InterpolationConfig | None = None, seconds: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Times and outputs at 250 Hz of one chunk ``rows [F, A]`` from time 0."""
    interpolate = Interpolator(config or InterpolationConfig(), rows.shape[1])
    times = np.arange(0.0, len(rows) * ROW - 1e-9, DT)
    outputs = []
    for now in times:
        k = int(now / ROW + 1e-9)
        outputs.append(interpolate(now, rows[k : k + 3], k * ROW, ROW, 0))
    return times, np.array(outputs)


def at(time: float, times: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    return np.array([np.interp(time, times, column) for column in outputs.T])


@pytest.mark.parametrize("ahead", [0, 1])
def test_rows_are_reached_when_they_should_be(ahead: int) -> None:
    rows = np.random.default_rng(0).normal(size=(10, 2)).cumsum(0)
    times, outputs = played(rows, InterpolationConfig(ahead=ahead))
    for k in range(2, 8):
        assert at((k + 1 - ahead) * ROW, times, outputs) == pytest.approx(rows[k], abs=0.12)  # ticks are beside the row's time


def test_a_straight_line_stays_one() -> None:
    rows = np.arange(12.0)[:, None] * 0.1
    times, outputs = played(rows)
    middle = (times > 3 * ROW) & (times < 10 * ROW)
    assert outputs[middle, 0] == pytest.approx((times[middle] / ROW - 1) * 0.1, abs=1e-9)


def test_velocity_is_continuous_within_a_plan_and_across_plans() -> None:
    rng, interpolate = np.random.default_rng(1), Interpolator(InterpolationConfig(), 1)
    a, b = rng.normal(size=(12, 1)).cumsum(0), rng.normal(size=(12, 1)).cumsum(0)
    outputs = []
    fine = 1e-5
    times = np.concatenate(
        [[k * ROW - fine, k * ROW, k * ROW + fine] for k in range(1, 10)] + [[0.212 - fine, 0.212, 0.212 + fine]]
    )
    for now in np.unique(np.concatenate([times, np.arange(0, 0.5, DT)])):
        rows, origin, chunk = (a, 0.0, 0) if now < 0.212 else (b, 0.1, 1)  # another plan, in the middle of a row
        k = int((now - origin) / ROW + 1e-9)
        outputs.append((now, interpolate(now, rows[k : k + 3], origin + k * ROW, ROW, chunk)[0]))
    found = dict(outputs)
    for now in times[1::3]:
        before, here, after = (found[t] for t in (times[np.abs(times - now) < 2 * fine]))
        assert (here - before) / fine == pytest.approx((after - here) / fine, abs=0.3)  # bends, but has no corner
    steps = np.diff(np.array(outputs), axis=0)
    assert np.abs(steps[:, 1] / steps[:, 0]).max() < 400.0  # nor a jump


def test_after_the_last_row_it_stands() -> None:
    interpolate = Interpolator(InterpolationConfig(), 1)
    rows = np.array([[0.0], [1.0], [2.0]])
    for now in np.arange(0.0, 0.15, DT):
        k = int(now / ROW + 1e-9)
        interpolate(now, rows[k:], k * ROW, ROW, 0)
    held = [interpolate.hold(now) for now in np.arange(0.152, 0.3, DT)]
    assert held[-1] == pytest.approx([2.0])
    assert np.ptp(np.array(held)) < 0.01


def test_grippers_change_at_once() -> None:
    action = Feature("action", (3,), "float32", "m", ("x", "y", "gripper_width"), 20.0)
    rows = np.array([[0.0, 0.0, 0.08]] * 3 + [[0.1, 0.0, 0.0]] * 5)
    times, outputs = played(rows, InterpolationConfig.of(action))
    assert set(outputs[:, 2].tolist()) == {0.08, 0.0}
    assert times[outputs[:, 2] == 0.0][0] == pytest.approx(3 * ROW, abs=DT)


@pytest.mark.parametrize("representation", ["rot6d", "quat_xyzw", "rotvec"])
def test_rotations_stay_rotations_and_turn_evenly(representation: str) -> None:
    turns = Rotation.from_rotvec(np.outer(np.arange(10) * 0.3, [0.0, 0.6, 0.8]))
    written = {
        "rot6d": turns.as_matrix()[:, :, :2].transpose(0, 2, 1).reshape(10, 6),
        "quat_xyzw": turns.as_quat() * np.where(np.arange(10) % 2, -1.0, 1.0)[:, None],  # both signs mean the same
        "rotvec": turns.as_rotvec(),
    }[representation]
    rows = np.hstack([np.zeros((10, 3)), written])
    config = InterpolationConfig(rotations=(RotationColumns(start=3, representation=representation),))
    times, outputs = played(rows, config)
    value = outputs[:, 3:]
    if representation == "rot6d":
        a, b = value[:, :3], value[:, 3:]
        assert np.abs((a * a).sum(1) - 1).max() < 1e-12
        assert np.abs((b * b).sum(1) - 1).max() < 1e-12
        assert np.abs((a * b).sum(1)).max() < 1e-12
        found = Rotation.from_matrix(np.stack([a, b, np.cross(a, b)], axis=2))
    else:
        found = Rotation.from_quat(value) if representation == "quat_xyzw" else Rotation.from_rotvec(value)
    middle = (times > 3 * ROW) & (times < 8 * ROW)
    angles = (found[np.flatnonzero(middle)] * turns[0].inv()).magnitude()
    expected = (times[middle] / ROW - 1) * 0.3
    wrapped = np.minimum(expected % (2 * np.pi), 2 * np.pi - expected % (2 * np.pi))
    assert angles == pytest.approx(wrapped, abs=1e-6)  # a steady turn is one between the rows, too


def test_half_a_turn_is_not_cut_short() -> None:
    turns = Rotation.from_euler("z", np.array([[0.0], [170.0], [340.0], [510.0], [680.0]]), degrees=True)
    rows = turns.as_matrix()[:, :, :2].transpose(0, 2, 1).reshape(5, 6)
    _, outputs = played(rows, InterpolationConfig(rotations=(RotationColumns(start=0, representation="rot6d"),)))
    assert np.linalg.norm(outputs[:, :3], axis=1) == pytest.approx(np.ones(len(outputs)), abs=1e-12)
    assert np.abs(outputs[:, 2]).max() < 1e-12  # about z throughout
