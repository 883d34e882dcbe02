"""``Engine``: inference beside control. The control thread posts observations and takes chunks, and never waits for either.

::

    control thread            mailboxes of one, the newest wins            inference thread (owns planner and policy)
    post(observation) ------------------> [ request ] --------------------> encode, sample, decode
    take() <------------------------------ [ chunk ] <--------------------- with the delay it was conditioned on

A request carries the number of its episode; what comes from before a reset is dropped. An exception in the inference thread is
kept and shown as :attr:`Engine.fault`: control then holds the arm.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Mapping
from queue import SimpleQueue
from typing import TYPE_CHECKING, Generic, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
import pydantic

from robopolicy.config import Config
from robopolicy.deploy.chunk import Chunk, Previous
from robopolicy.deploy.clock import Clock, permitted, set_fifo
from robopolicy.deploy.latency import DelayEstimate, Recorder
from robopolicy.errors import EvaluationError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
_HANGS = 10.0  # [s]
_WARM_UPS = 3  # the first runs of a network plan memory and choose kernels


class Plans(Protocol):
    """What the engine needs of a planner: see :class:`robopolicy.deploy.planner.Planner`."""

    @property
    def rows(self) -> int:
        """Of its chunks."""
        ...

    def plan(
        self, obs: Mapping[str, np.ndarray], previous: Previous | None, delay: int, generator: torch.Generator, /
    ) -> np.ndarray: ...

    def reset(self) -> None: ...


class Mailbox(Generic[T]):
    """One slot for two threads: putting replaces what was there, taking empties it. Neither waits."""

    def __init__(self) -> None:
        self._slot: deque[T] = deque(maxlen=1)  # its operations are atomic

    def put(self, value: T) -> None:
        self._slot.append(value)

    def take(self) -> T | None:
        try:
            return self._slot.popleft()
        except IndexError:
            return None


class Request(NamedTuple):
    """An observation to plan from."""

    number: int
    episode: int
    obs: Mapping[str, np.ndarray]
    obs_time: float
    previous: Chunk | None


class Answer(NamedTuple):
    """A chunk, and how many of its rows were taken to be over when it would arrive."""

    episode: int
    chunk: Chunk
    delay: int | None  # None: it was not told of a plan in progress


class EngineConfig(Config):
    """How inference and control fit together.

    Attributes:
        late: What becomes of a chunk that arrives later than the delay it was conditioned on. ``use``: its rows are carried out
            by their times, as ever; the arm turns to it with a jump that the safety filter smooths, because a plan from a newer
            observation is worth more than a seamless one from an older. ``discard``: the old plan goes on, and runs out if all
            are late.
        window: Recent latencies whose longest is the delay to expect.
        margin: Added to it [s]: chunks are taken at the next tick of control.
        fifo: Real-time priority (1 to 99) of the inference thread, below that of control. If control has one and inference has
            none, another process can take the processor while inference holds the interpreter, and control waits for both.
    """

    late: Literal["use", "discard"] = "use"
    window: int = pydantic.Field(default=10, ge=1)
    margin: float = pydantic.Field(default=0.004, ge=0)
    fifo: int | None = pydantic.Field(default=None, ge=1, le=99)


class Engine:
    """Runs a planner in a thread of its own.

    Args:
        planner: Owned by the inference thread from now on.
        dt: Seconds per row of its chunks.
        clock: The one that observations are stamped with.
        generator: Source of the policy's noise; owned by the inference thread, too.
        config: See :class:`EngineConfig`.

    Attributes:
        latency: From observation to chunk [s], of every chunk since the warm-up.
        counters: ``chunks`` taken, ``late`` ones, ``discarded``, ``useless`` (all rows over), ``stale`` (before a reset).
        notes: What the system did not permit.
        margin: Of the config, or the period of a slower loop.
    """

    def __init__(
        self, planner: Plans, dt: float, clock: Clock, generator: torch.Generator, config: EngineConfig | None = None
    ) -> None:
        self.config = config or EngineConfig()
        self.margin = self.config.margin
        self._planner, self._dt, self._clock, self._generator = planner, dt, clock, generator
        self._delay = DelayEstimate(self.config.window)
        self.latency = Recorder()
        self.counters = dict.fromkeys(("chunks", "late", "discarded", "useless", "stale"), 0)
        self.notes: list[str] = []
        self.episode = 0
        self._asked = self._void = 0  # by control: requests, and those of them that are from before a reset
        self._answered = 0  # by inference
        self._index = 0
        self._pretended = 0.0  # latency beyond what passes on the clock
        self._planned_episode = 0  # of the inference thread
        self._requests: Mailbox[Request] = Mailbox()
        self._answers: Mailbox[Answer] = Mailbox()
        self._wake: SimpleQueue[bool] = SimpleQueue()  # putting never waits
        self._fault: tuple[int, BaseException] | None = None
        self._thread: threading.Thread | None = None

    # ---- the control thread --------------------------------------------------------------------------------------------------

    def start(self, obs: Mapping[str, np.ndarray]) -> None:
        """Warm up on an observation, whose chunks are thrown away, and start the thread. Waits; call it before the loop.

        Raises what the planner raises: a policy that does not work is found out here.
        """
        if self._thread is not None:
            raise EvaluationError("the inference thread of before still runs; wait for it, or start the program again")
        plan: Chunk | None = None
        for _ in range(_WARM_UPS):  # all but the first beside a plan in progress, as in the loop
            begin = self._clock.now()
            previous, delay = self._previous(plan)
            actions = self._planner.plan(_batch(obs), previous, delay or 0, self._generator)[0]
            plan = Chunk(actions, begin, self._dt, begin, 0)
            self._delay = DelayEstimate(self.config.window, initial=self._clock.now() - begin)
        self._planner.reset()
        self._thread = threading.Thread(target=self._work, name="inference", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread; waits for the inference in progress, but not for one that hangs."""
        if self._thread is not None:
            self._wake.put(False)
            self._thread.join(_HANGS)
            if not self._thread.is_alive():
                self._thread = None

    def reset(self) -> None:
        """A new episode: no chunk from before it will be taken. Clears a fault."""
        self.episode += 1
        self._requests.take()
        self._answers.take()
        self._void = self._asked
        self._fault = None

    @property
    def rows(self) -> int:
        """Of a chunk."""
        return self._planner.rows

    @property
    def busy(self) -> bool:
        """Whether an answer is still to come. A request posted meanwhile replaces the one that waits."""
        return max(self._answered, self._void) < self._asked

    @property
    def delay(self) -> float:
        """From observation to chunk, as expected of the next one [s]."""
        return self._delay.seconds + self.margin

    @property
    def fault(self) -> BaseException | None:
        """What ended inference in this episode, if anything did."""
        if self._fault is not None and self._fault[0] == self.episode:
            return self._fault[1]
        if self._thread is not None and not self._thread.is_alive():
            return RuntimeError("the inference thread is gone")
        return getattr(self._planner, "fault", None)  # of a process, which may end between two plans

    def post(self, obs: Mapping[str, np.ndarray], obs_time: float, previous: Chunk | None) -> None:
        """Ask for a plan.

        Args:
            obs: Each feature as ``[n_obs_steps, *shape]``; not written to afterwards.
            obs_time: When the newest of them was made [s].
            previous: What is planned from then on, the row of then first.
        """
        self._asked += 1
        self._requests.put(Request(self._asked, self.episode, obs, obs_time, previous))
        self._wake.put(True)

    def take(self, *, waited: bool = False) -> Chunk | None:
        """The newest chunk that is worth carrying out, if one has arrived since the last call.

        Args:
            waited: The robot stood still meanwhile: no chunk is too late.
        """
        answer = self._answers.take()
        if answer is None:
            return None
        if answer.episode != self.episode:
            self.counters["stale"] += 1
            return None
        chunk = answer.chunk
        delay = self._clock.now() - chunk.obs_time
        self.counters["chunks"] += 1
        if waited:
            return chunk
        if delay >= len(chunk.actions) * chunk.dt:
            self.counters["useless"] += 1
            return None
        if answer.delay is not None and delay > (answer.delay + 1e-6) * chunk.dt:
            self.counters["late"] += 1
            if self.config.late == "discard":
                self.counters["discarded"] += 1
                return None
        return chunk

    # ---- the inference thread ------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        if self.config.fifo is not None:
            permitted(lambda: set_fifo(self.config.fifo or 1), f"SCHED_FIFO {self.config.fifo} for inference", self.notes)
        while self._wake.get():
            request = self._requests.take()
            if request is None:  # it was replaced, and then taken, or reset
                continue
            try:
                self._answers.put(self._answer(request))
            except BaseException as error:  # control must hear of whatever it was
                self._fault = (request.episode, error)
            self._answered = request.number

    def _answer(self, request: Request) -> Answer:
        if request.episode != self._planned_episode:
            self._planner.reset()
            self._planned_episode = request.episode
        previous, delay = self._previous(request.previous)
        actions = self._planner.plan(_batch(request.obs), previous, delay or 0, self._generator)[0]
        if not np.isfinite(actions).all():
            raise EvaluationError("the policy planned NaN or infinity; its training diverged: deploy an earlier checkpoint")
        ready = self._clock.now() + self._pretended
        self._delay.add(ready - request.obs_time)
        self.latency.add(ready - request.obs_time)
        chunk = Chunk(actions, request.obs_time, self._dt, ready, self._index)
        self._index += 1
        return Answer(request.episode, chunk, delay)

    def _previous(self, chunk: Chunk | None) -> tuple[Previous | None, int | None]:
        """What a planner is told of the plan in progress, and the rows of it that will be over when the next arrives."""
        if chunk is None:
            return None, None
        known = min(len(chunk.actions), self._planner.rows)
        actions = chunk.actions[np.minimum(np.arange(self._planner.rows), known - 1)]
        return Previous(actions[None], np.array([known])), min(math.ceil(self.delay / self._dt - 1e-6), known)


class InlineEngine(Engine):
    """The same without a thread, for simulation on a fake clock: a chunk is made when it is asked for, and is there after its
    latency has passed on the clock.

    Args:
        delay: The latency to pretend [s].
    """

    def __init__(
        self,
        planner: Plans,
        dt: float,
        clock: Clock,
        generator: torch.Generator,
        config: EngineConfig | None = None,
        *,
        delay: float = 0.0,
    ) -> None:
        super().__init__(planner, dt, clock, generator, config)
        self._pretended = delay
        self._delay = DelayEstimate(self.config.window, initial=delay)
        self._pending: Answer | None = None

    def start(self, obs: Mapping[str, np.ndarray]) -> None:
        self._planner.plan(_batch(obs), None, 0, self._generator)
        self._planner.reset()

    def reset(self) -> None:
        super().reset()
        self._pending = None

    def post(self, obs: Mapping[str, np.ndarray], obs_time: float, previous: Chunk | None) -> None:
        if self._pending is not None:  # a thread would still be at work; the newest request would wait
            return
        self._asked += 1
        try:
            self._pending = self._answer(Request(self._asked, self.episode, obs, obs_time, previous))
        except Exception as error:
            self._fault, self._answered = (self.episode, error), self._asked

    def take(self, *, waited: bool = False) -> Chunk | None:
        if self._pending is not None and self._clock.now() >= self._pending.chunk.ready_time - 1e-9:
            self._answers.put(self._pending)
            self._pending, self._answered = None, self._asked
        return super().take(waited=waited)


def _batch(obs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: value[None] for name, value in obs.items()}


def rows_between(delay: float, least: int, rows: int, dt: float) -> int:
    """Rows from one request to the next: ``least``, or as many as a plan leaves before the next can arrive.

    A chunk must still say something when the next one comes: ``delay`` and the time to the next request fit into its rows.
    """
    ahead = math.ceil(delay / dt - 1e-6)
    return max(1, min(least, rows - 1 - ahead))
