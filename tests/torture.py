"""Mad inputs for the safety filter, and a judge that shares no code with it. benchmarks/safety.py runs them for longer.

Commands jump, alternate between extremes, are NaN, infinite or 1e300, follow the borders, or are missing; states freeze, jump,
are NaN or of the wrong size; stamps are old, in the future, NaN or run backwards; the clock stalls and runs backwards; people
start, stop, hit the emergency stop and reset at any time.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from robopolicy.deploy.limits import SafetyLimits, load_limits
from robopolicy.deploy.safety import Mode, Result, SafetyFilter, Stamp
from robopolicy.deploy.workspace import CartesianKinematics, Kinematics
from sim.arm import model as arm
from sim.arm.control import Kinematics as Inverse
from sim.arm.control import down_quat_wxyz
from sim.arm.robot import ArmKinematics

# Shares of a limit by which finite differences may exceed it. Rounding of positions up to 4 rad gives 8 eps 4 / dt^3 = 1e-7
# rad/s^3 at 250 Hz, 1e-9 of the smallest jerk limit here; the rest is the solver's.
TOLERANCE = 1e-6
POSITION = 2e-6  # [rad, m]: the filter's own tolerance of 1e-6 and the solver's
BOX = 1e-3  # [m]: between the points of a stop that are looked at
FAULTS = 0.3  # share of the spells with something wrong in an input


@dataclass
class Judge:
    """Looks at outputs only, and knows the limits as the config states them.

    Attributes:
        worst: Largest share of each limit seen (velocity, acceleration, jerk), and distances beyond bounds (position, box).
        broken: What was found wrong, the first few.
    """

    limits: SafetyLimits
    kinematics: Kinematics | None
    worst: dict[str, float] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        limits, scale = self.limits, self.limits.scale
        self._lower = np.array([c.lower + c.margin for c in limits.coordinates])
        self._upper = np.array([c.upper - c.margin for c in limits.coordinates])
        self._rates = {
            "velocity": scale.velocity * np.array([c.velocity for c in limits.coordinates]),
            "acceleration": scale.acceleration * np.array([c.acceleration for c in limits.coordinates]),
            "jerk": scale.jerk * np.array([c.jerk for c in limits.coordinates]),
        }
        v, a, j = self._rates.values()
        self._stop_ticks = int(np.ceil(float((v / a + 3 * a / j).max()) * limits.rate)) + 2
        self._history = np.zeros((0, len(v)))
        self._was_outside = np.zeros(0)
        self._calm = 0

    def seat(self, position: np.ndarray) -> None:
        """A new beginning, at rest."""
        self._history = np.repeat(position[None], 4, axis=0)
        if self.limits.workspace is not None:
            self._was_outside = self._outside(self._points_at(position))
        self._calm = 0

    def rest(self) -> None:
        """Nobody called for a while: the robot stood still."""
        if len(self._history):
            self.seat(self._history[-1])

    def __call__(self, tick: int, result: Result) -> None:
        out = result.executed
        if out is None:
            return
        if out.shape != self._lower.shape or not np.isfinite(out).all():
            self._fail(tick, f"the output is {out}")
            return
        before = self._history[-1]
        self._history = np.concatenate([self._history[1:], out[None]])
        for order, (name, limit) in enumerate(self._rates.items(), 1):
            change = np.diff(self._history[-1 - order :], order, axis=0)[0]
            self._note(tick, name, float((np.abs(change) * self.limits.rate**order / limit).max()), 1 + TOLERANCE)
        beyond = np.maximum(self._lower - out, out - self._upper)
        beyond[beyond <= np.maximum(self._lower - before, before - self._upper) + 1e-12] = 0.0  # it began outside, and comes in
        self._note(tick, "position", float(beyond.max()), POSITION)
        if self.kinematics is not None and self.limits.workspace is not None:
            outside = self._outside(self._points_at(out))
            self._note(tick, "box", float((outside * (outside > self._was_outside + 1e-12)).max()), BOX)
            self._was_outside = outside
        self._calm = 0 if result.mode is Mode.RUNNING else self._calm + 1
        if self._calm > self._stop_ticks and (out != before).any():
            self._fail(tick, f"still moving {self._calm} ticks after it left RUNNING")

    def _points_at(self, q: np.ndarray) -> np.ndarray:
        assert self.kinematics is not None
        return self.kinematics.points(q).copy()

    def _outside(self, points: np.ndarray) -> np.ndarray:
        box = self.limits.workspace
        assert box is not None
        out = np.zeros(len(points))
        out[0] = max(0.0, float(np.max(np.maximum(np.array(box.lower) - points[0], points[0] - np.array(box.upper)))))
        return out if box.table is None else np.maximum(out, box.table - points[:, 2])

    def _note(self, tick: int, name: str, value: float, limit: float) -> None:
        self.worst[name] = max(self.worst.get(name, 0.0), value)
        if not value <= limit:
            self._fail(tick, f"{name}: {value:.9g}, limit {limit:.9g}")

    def _fail(self, tick: int, what: str) -> None:
        if len(self.broken) < 20:
            self.broken.append(f"tick {tick}: {what}")


class Adversary:
    """Inputs of every kind, in spells of some ticks each.

    Args:
        limits: Of the filter.
        rng: Source of everything.
        where: Postures ``[K, n]`` inside the workspace, to start from.
    """

    COMMANDS = ("wave", "jumps", "extremes", "still", "near", "border", "huge", "drift")
    STATES = ("follows", "lags", "noisy")
    WRONG = (
        "state_nan", "state_frozen", "state_jump", "state_shape", "state_old", "state_future", "state_nan_stamp", "state_missing",
        "camera_old", "camera_missing", "clock_back", "clock_gap", "clock_nan", "command_nan", "command_inf", "command_none",
        "command_shape", "command_old", "command_age_nan", "deadman", "velocity_nan", "stamps_backwards",
    )  # fmt: skip

    def __init__(self, limits: SafetyLimits, rng: np.random.Generator, where: np.ndarray) -> None:
        self._limits, self._rng, self._where = limits, rng, where
        self._lower = np.array([c.lower for c in limits.coordinates])
        self._upper = np.array([c.upper for c in limits.coordinates])
        self.now = 100.0
        self._frozen = where[0]
        self._left = 0
        self.wrong = ""
        self.seen: Counter[str] = Counter()

    def outside(self) -> np.ndarray:
        """A measured state that is nowhere near the limits."""
        return self._rng.uniform(self._lower - 1.0, self._upper + 1.0)

    def inside(self) -> np.ndarray:
        return self._where[self._rng.integers(len(self._where))].copy()

    def _spell(self, set_point: np.ndarray) -> None:
        rng = self._rng
        self._left = int(rng.integers(1, 120))
        self._kind, self._follow = rng.choice(self.COMMANDS), rng.choice(self.STATES)
        self.wrong = str(rng.choice(self.WRONG)) if rng.random() < FAULTS else ""
        if self.wrong:
            self._left = min(self._left, int(rng.choice([1, 3, 20, 60, 300], p=[0.4, 0.2, 0.2, 0.15, 0.05])))
        self.seen.update([self._kind, self._follow, self.wrong])
        self._goal, self._phase = self.inside(), rng.uniform(0, 6.28, len(self._lower))
        self._speed = rng.uniform(0.1, 30.0)
        self._feed = rng.random() < 0.5
        self._frozen = set_point.copy()
        self._sensor_lag = rng.uniform(0, 0.02)

    def __call__(self, set_point: np.ndarray) -> dict[str, object]:
        """The arguments of one call of the filter whose last output is ``set_point``."""
        rng, limits = self._rng, self._limits
        if self._left <= 0:
            self._spell(set_point)
        self._left -= 1
        self.now += 1.0 / limits.rate
        if rng.random() < 0.01:
            self.now += rng.uniform(0, 0.04)  # jitter below the gap
        command, velocity = self._command(set_point)
        state = (
            set_point + {"follows": 0.0, "lags": self._sensor_lag, "noisy": rng.normal(0, 0.003, len(set_point))}[self._follow]
        )
        stamp, camera, age, deadman = self.now - 0.005, self.now - 0.03, 0.1, Stamp(self.now - 0.02)
        made: float | None = stamp - 0.002
        now, wrong = self.now, self.wrong
        stamps = {"state": Stamp(stamp, made), "camera": Stamp(camera)}
        i = rng.integers(len(state))
        if wrong == "state_nan":
            state[i] = rng.choice([np.nan, np.inf, -np.inf])
        elif wrong == "state_frozen":
            state = self._frozen.copy()
        elif wrong == "state_jump":
            state = self.outside()
        elif wrong == "state_shape":
            state = state[:-1]
        elif wrong == "state_old":
            stamps["state"] = Stamp(stamp, stamp - rng.uniform(0, 0.5))
        elif wrong == "state_future":
            stamps["state"] = Stamp(stamp, stamp + rng.choice([0.01, 1.0, 1e9]))
        elif wrong == "state_nan_stamp":
            stamps["state"] = Stamp(*rng.choice([np.nan, stamp, np.inf, -np.inf], 2))
        elif wrong == "state_missing":
            del stamps["state"]
        elif wrong == "camera_old":
            stamps["camera"] = Stamp(camera - rng.uniform(0, 1))
        elif wrong == "camera_missing":
            del stamps["camera"]
        elif wrong == "clock_back":
            now = self.now - rng.uniform(0, 1)
        elif wrong == "clock_gap":
            self.now += rng.uniform(0, 0.5)
            now = self.now
        elif wrong == "clock_nan":
            now = rng.choice([np.nan, np.inf, -np.inf])
        elif wrong == "command_nan" and command is not None:
            command[i] = np.nan
        elif wrong == "command_inf" and command is not None:
            command[i] = rng.choice([np.inf, -np.inf])
        elif wrong == "command_none":
            command = None
        elif wrong == "command_shape":
            command = np.zeros(len(state) + 1)
        elif wrong == "command_old":
            age = rng.uniform(0, 5)
        elif wrong == "command_age_nan":
            age = rng.choice([np.nan, np.inf, -1.0])
        elif wrong == "deadman":
            deadman = Stamp(rng.choice([np.nan, self.now - 1.0, self.now + 1.0]))
        elif wrong == "velocity_nan":
            velocity = np.full(len(state), np.nan)
        elif wrong == "stamps_backwards":
            stamps["state"] = Stamp(stamp - rng.uniform(0, 0.3), stamp - rng.uniform(0, 0.3))
        return {
            "now": now, "state": state, "command": command, "stamps": stamps, "velocity": velocity, "command_age": age,
            "deadman": deadman,
        }  # fmt: skip

    def _command(self, set_point: np.ndarray) -> tuple[np.ndarray | None, np.ndarray | None]:
        rng, kind, n = self._rng, self._kind, len(self._lower)
        half = (self._upper - self._lower) / 2
        if kind == "wave":
            angle = self._speed * self.now + self._phase
            share = rng.uniform(0.1, 1.2) if self._left % 50 == 0 else 0.3
            command, velocity = self._goal + share * half * np.sin(angle), share * half * self._speed * np.cos(angle)
            return command, velocity if self._feed else None
        if kind == "jumps":
            return rng.uniform(self._lower - 0.5, self._upper + 0.5), rng.normal(0, 3, n) if self._feed else None
        if kind == "extremes":
            return (self._lower if self._left % 7 < 3 else self._upper).copy(), rng.normal(0, 100, n) if self._feed else None
        if kind == "still":
            return self._goal.copy(), None
        if kind == "near":
            return set_point + rng.normal(0, 0.01, n), rng.normal(0, 1, n) if self._feed else None
        if kind == "border":
            return np.where(self._phase > 3.14, self._lower, self._upper) + rng.normal(0, 1e-3, n), None
        if kind == "huge":
            return rng.choice([-1e300, -1e9, 1e9, 1e300], n), rng.choice([-1e300, 1e300], n) if self._feed else None
        sign = np.sign(np.sin(self._phase))
        return set_point + 0.1 * half * sign, sign if self._feed else None  # drift: away, for ever


def torture(
    limits: SafetyLimits, kinematics: Kinematics, where: np.ndarray, ticks: int, seed: int
) -> tuple[SafetyFilter, Judge, Counter[str]]:
    """Run ``ticks`` adversarial ticks; ``where [K, n]`` are postures to start from."""
    rng = np.random.default_rng(seed)
    safety, judge, adversary = SafetyFilter(limits, kinematics), Judge(limits, kinematics), Adversary(limits, rng, where)
    modes: Counter[str] = Counter()
    last: float | None = None
    for tick in range(ticks):
        roll = rng.random()
        if roll < 0.0005:
            safety.estop("adversary")
        elif roll < 0.001:
            safety.stop("adversary")
        elif safety.mode not in (Mode.RUNNING, Mode.HOLDING) and roll < 0.1:
            safety.reset()
            unseated, reseat = safety.mode is Mode.IDLE, bool(rng.random() < 0.5)
            state = adversary.outside() if rng.random() < 0.3 else adversary.inside()
            if not unseated and not reseat:
                state = safety.set_point
            if not safety.start(state, Stamp(0.0), 0.0, reseat=reseat):
                last = None
                if unseated or reseat:
                    judge.seat(state)
        arguments = adversary(safety.set_point)
        now = float(arguments["now"])  # type: ignore[arg-type]
        if np.isfinite(now) and (last is None or now >= last):
            if last is not None and now - last > limits.freshness.gap:
                judge.rest()
            last = now
        result = safety(**arguments)  # type: ignore[arg-type]
        judge(tick, result)
        modes[result.mode] += 1
    modes.update({f"saw {name}": count for name, count in adversary.seen.items() if name})
    return safety, judge, modes


def arm_setup() -> tuple[SafetyLimits, Kinematics, np.ndarray]:
    """Our arm by joint angles, in its workspace."""
    rng, inverse = np.random.default_rng(0), Inverse()
    postures = []
    for _ in range(50):
        pos, yaw = rng.uniform([0.25, -0.35, 0.02], [0.65, 0.35, 0.5]), rng.uniform(-1.5, 1.5)
        q = inverse.inverse(arm.home(), pos, down_quat_wxyz(yaw), iterations=40)
        postures.append(np.append(q, rng.uniform(0.0, 0.08)))
    return load_limits("arm"), ArmKinematics(), np.array(postures)


def cartesian_setup() -> tuple[SafetyLimits, Kinematics, np.ndarray]:
    """An arm that takes poses: position, rotation vector, and a width; with a deadman, and refusing far starts."""
    place = {"unit": "m", "velocity": 1.0, "acceleration": 5.0, "jerk": 100.0, "margin": 0.0, "tracking": 0.05, "max_step": 0.05}
    turn = {"lower": -1.5, "upper": 1.5, "velocity": 2.0, "acceleration": 10.0, "jerk": 300.0}
    ranges = zip("xyz", (0.1, -0.6, 0.0), (0.9, 0.6, 0.8), strict=True)
    document = {
        "rate": 100.0,
        "coordinates": [
            *({"name": name, "lower": low, "upper": high, **place} for name, low, high in ranges),
            *({"name": f"turn_{name}", **turn} for name in "xyz"),
        ],
        "workspace": {"lower": [0.2, -0.4, 0.02], "upper": [0.7, 0.4, 0.6], "table": 0.0},
        "freshness": {"deadman": 0.25},
        "on_far_start": "refuse",
    }
    limits = SafetyLimits.model_validate_json(json.dumps(document))
    rng = np.random.default_rng(0)
    where = np.hstack([rng.uniform([0.2, -0.4, 0.02], [0.7, 0.4, 0.6], (50, 3)), rng.uniform(-1.4, 1.4, (50, 3))])
    return limits, CartesianKinematics(6), where


SETUPS = {"arm": arm_setup, "cartesian": cartesian_setup}
