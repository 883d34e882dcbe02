"""A faulty point robot and an arbiter over it on a fake clock: what the arbiter's tests run."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from robots import RATE, Planned, Point

from robopolicy.deploy.arbiter import Arbiter
from robopolicy.deploy.clock import Clock, FakeClock, Ticker
from robopolicy.deploy.engine import Engine, InlineEngine
from robopolicy.deploy.executor import make_executor
from robopolicy.deploy.home import HomeSource
from robopolicy.deploy.limits import SafetyLimits
from robopolicy.deploy.safety import Reason, SafetyFilter, Stamp
from robopolicy.deploy.sources import ControlConfig, PolicySource, Source
from robopolicy.deploy.status import Period
from robopolicy.robot import Sample, State

HZ = 100
AXIS = {"unit": "m", "lower": -1.0, "upper": 1.0, "velocity": 2.0, "acceleration": 10.0, "jerk": 200.0}
AXIS |= {"start": 0.5, "max_step": 0.5}  # it may set off at once
LIMITS = SafetyLimits.model_validate({"rate": HZ, "coordinates": [{"name": name, **AXIS} for name in "ab"]})
WITH_DEADMAN = LIMITS.model_copy(update={"freshness": LIMITS.freshness.model_copy(update={"deadman": 0.25})})
NAN: Callable[[State], State] = lambda state: State(np.array([np.nan, 0.0]), state.stamp)  # noqa: E731
OLD: Callable[[State], State] = lambda state: State(state.positions, Stamp(state.stamp.came - 0.2))  # noqa: E731


class Faulty(Point):
    """A point robot whose senses can be tampered with.

    Attributes:
        sense: Changes what is measured.
        camera: When its picture came, and was made; None: it has no camera.
        blind: What it observes is no number.
        stuck: Why what it observes is of no use.
        broken: Methods that raise.
    """

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock)
        self.sense: Callable[[State], State] = lambda state: state
        self.camera: Stamp | None = None
        self.blind = False
        self.stuck: Reason | None = None
        self.broken: set[str] = set()

    def state(self) -> State:
        self._check("state")
        return self.sense(super().state())

    def observe(self) -> Sample:
        self._check("observe")
        sample = super().observe()
        values = {"pos": np.full(2, np.nan, np.float32)} if self.blind else sample.values
        return Sample(values, sample.time, {} if self.camera is None else {"camera": self.camera}, self.stuck)

    def targets(self, action: np.ndarray) -> np.ndarray:
        self._check("targets")
        return super().targets(action)

    def command(self, positions: np.ndarray) -> None:
        self._check("command")
        super().command(positions)

    def _check(self, method: str) -> None:
        if method in self.broken:
            raise OSError(f"bus: {method}")


class Cell:
    """The robot under an arbiter with a policy that wants to be at ``value``, and home at (-0.2, 0.2)."""

    def __init__(
        self, *, limits: SafetyLimits = LIMITS, threaded: bool = False, delay: float = 0.02, guard: Any = None, **config: Any
    ) -> None:
        self.clock, self.planner = FakeClock(50.0), Planned((0.4, 0.0))
        self.robot, self.safety = Faulty(self.clock), SafetyFilter(limits)
        shadow = config.pop("shadow", False)
        args = (self.planner, 1 / RATE, self.clock, torch.Generator())
        self.engine = Engine(*args) if threaded else InlineEngine(*args, delay=delay)
        settings = ControlConfig(**config)
        executor = make_executor("latest")
        self.policy = PolicySource(self.robot, self.engine, executor, limits, settings, guard=guard)
        self.policy.prepare()
        self.seen: list[Period] = []
        sources: list[Source] = [self.policy, HomeSource(np.array([-0.2, 0.2]), limits)]
        self.arbiter = Arbiter(self.robot, self.safety, self.clock, sources, settings, shadow=shadow, watch=self.seen.append)
        self.ticker = Ticker(self.clock, 1 / HZ)

    def run(self, seconds: float) -> None:
        for _ in range(round(seconds * HZ)):
            self.arbiter.step(self.ticker.wait())

    def ask(self, name: str, **arguments: Any) -> tuple[bool, str]:
        ticket = self.arbiter.request(name, **arguments)
        assert ticket.answer is None
        self.run(1 / HZ)
        return ticket.wait(0.0)

    def started(self, seconds: float = 0.3) -> "Cell":
        """Under way: by default at almost half a metre a second."""
        if self.safety.limits.freshness.deadman is not None:
            self.arbiter.request("deadman", pressed=True)
        assert self.ask("start") == (True, "policy begins")
        self.run(seconds)
        assert self.mode == "running"
        return self

    @property
    def mode(self) -> str:
        return self.arbiter.status.mode

    @property
    def cause(self) -> str:
        return self.arbiter.status.cause

    @property
    def sent(self) -> np.ndarray:
        return np.array([position for _, position in self.robot.sent]).reshape(-1, 2)

    def speed(self) -> float:
        return float(np.abs(self.sent[-1] - self.sent[-2]).max()) * HZ

    def smooth(self) -> bool:
        """Whether all that was sent keeps the limits."""
        sent = self.sent
        return bool(
            np.abs(np.diff(sent, 1, axis=0)).max(initial=0.0) <= 1.0 / HZ * (1 + 1e-6)
            and np.abs(np.diff(sent, 2, axis=0)).max(initial=0.0) <= 5.0 / HZ**2 * (1 + 1e-6)
            and np.abs(np.diff(sent, 3, axis=0)).max(initial=0.0) <= 100.0 / HZ**3 * (1 + 1e-6)
        )
