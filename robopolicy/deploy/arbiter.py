"""``Arbiter``: the only one who commands the robot, whoever says where to go; E-stops latch here.

::

    request(...) --> [ control thread: state -> source.target -> safety filter -> robot.command ] --> status
                                               idle | policy | home | ...

What it does in each mode, and what ends a mode, is in docs/deploy.md.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from robopolicy.deploy.clock import Clock, Tick, Ticker, quiet
from robopolicy.deploy.latency import Log
from robopolicy.deploy.requests import REQUESTS, Answer, Ticket
from robopolicy.deploy.safety import Mode, Reason, Result, SafetyFilter, Stamp
from robopolicy.deploy.sources import ControlConfig, Idle, LateError, Source, Target, age
from robopolicy.deploy.status import Period, Status, ages, timing
from robopolicy.errors import ConfigError, nearest
from robopolicy.robot import Robot, State

MODES = {mode: float(index) for index, mode in enumerate(Mode)}  # as the log has them
_PATIENCE = 1.0  # [s]: nobody expects the arm to move for a request older than this
_RECENT = 5.0  # [s] of which the status has percentiles
_MOVING = (Mode.RUNNING, Mode.HOLDING)


class Arbiter:
    """One robot, several sources of targets, of which one at a time commands.

    :meth:`run` is the control thread; :meth:`request` and :attr:`status` are for every other. Whoever has a loop of its own calls
    :meth:`step` every period instead.

    Args:
        robot: Commanded by nobody else.
        safety: The last thing before the robot; its ``limits.rate`` is the rate of control.
        clock: The one that robot and sources have, too.
        sources: Who may command, by their names; ``idle`` is always there.
        config: See :class:`robopolicy.deploy.sources.ControlConfig`.
        shadow: Everything runs, nothing is sent; ``watch`` sees what would have been.
        watch: Called with every period, on the control thread: it must not wait.

    Attributes:
        log: Every period, as docs/deploy.md says.
        skipped, missed: Periods skipped, and ended late.
        fault: The last exception in a period.
        muted: Why nothing is sent until the next start, since a request to ``mute``; empty: it is.
        notes: What the system did not permit.

    Raises:
        ConfigError: Robot and safety limits name different coordinates.
    """

    def __init__(
        self,
        robot: Robot,
        safety: SafetyFilter,
        clock: Clock,
        sources: Iterable[Source] = (),
        config: ControlConfig | None = None,
        *,
        shadow: bool = False,
        watch: Callable[[Period], None] | None = None,
    ) -> None:
        if tuple(robot.names) != safety.names:
            raise ConfigError(
                f"the robot takes {', '.join(robot.names)}, the safety limits are for {', '.join(safety.names)}; "
                "name the same coordinates in the same order"
            )
        self.robot, self.safety, self.clock, self.shadow, self.watch = robot, safety, clock, shadow, watch
        self.config = config or ControlConfig()
        self.dt = 1.0 / safety.limits.rate
        self._idle = Idle()
        self.sources: Mapping[str, Source] = {"idle": self._idle} | {source.name: source for source in sources}
        scalars = ("episode", "number", "deadline", "start", "finish", "skipped", "mode", "age", "chunk", "starved", "obs_time")
        n, size = len(robot.names), robot.action_feature.size
        self.log = Log(self.config.log_size, dict.fromkeys(scalars, 0) | {"action": size, "target": n, "executed": n, "state": n})
        self.skipped = self.missed = self.episode = self._missed_now = 0
        self.fault: Exception | None = None
        self.muted = self._mutes = ""  # the latter from when it is asked for, while the arm still decelerates
        self.notes: list[str] = []
        self._requests: deque[Ticket] = deque()  # its operations are atomic
        self._source: Source = self._idle
        self._starting = False  # the source has begun, and its first target is not there yet
        self._reseat = False  # the next start begins where the arm is measured
        self._deadman: Stamp | None = None
        self._cause = "" if safety.cause is None else str(safety.cause)
        self._answer: Answer | None = None
        self._result: Result | None = None  # of this period
        self._last: Period | None = None

    # ---- any thread ----------------------------------------------------------------------------------------------------------

    def request(self, name: str, **arguments: Any) -> Ticket:
        """Ask for ``idle``, ``start(source="policy")``, ``stop``, ``mute``, ``home``, ``estop``, ``reset`` or ``deadman``.

        Done at the next period, in the order asked. ``stop``, ``mute``, ``idle`` and ``estop`` take ``why``,
        ``deadman`` takes ``pressed``. Raises ConfigError for an unknown name.
        """
        if name not in REQUESTS:
            raise ConfigError(f"unknown request '{name}': {nearest(name, REQUESTS)}")
        ticket = Ticket(name, arguments, self.clock.now())
        self._requests.append(ticket)
        return ticket

    @property
    def commanded(self) -> bool:
        """Whether anybody but ``idle`` commands."""
        return self._source is not self._idle

    @property
    def silent(self) -> bool:
        """Whether nothing is sent, or will be once the arm rests, until somebody starts it."""
        return self.episode == 0 or bool(self._mutes)

    @property
    def status(self) -> Status:
        """What is going on. Computed by the caller's thread; costs control nothing."""
        period, limits = self._last, self.safety.limits
        rows = self.log.last(round(_RECENT * limits.rate) + 1)[:-1]  # the newest may be being written
        rate, lateness, work = timing(rows)
        result = None if period is None else period.result
        executed = None if result is None else result.executed
        pressed = None if limits.freshness.deadman is None else self._deadman_gone(self.clock.now()) is None
        return Status(
            time=float("nan") if period is None else period.tick.start,
            mode="starting" if self._starting else str(self.safety.mode),
            source=self._source.name,
            shadow=self.shadow,
            cause=self._cause,
            muted=self.muted,
            reasons=() if result is None else tuple(str(reason) for reason in result.reasons),
            request=self._answer,
            fault="" if self.fault is None else repr(self.fault),
            deadman=pressed,
            names=self.safety.names,
            measured=() if period is None else tuple(period.state.positions.tolist()),
            set_point=None if executed is None else tuple(executed.tolist()),
            ages={} if period is None else ages(period),
            rate=rate,
            lateness_ms=lateness,
            work_ms=work,
            periods=self.log.count,
            skipped=self.skipped,
            missed=self.missed,
            counters=dict(self.safety.counters),
            events=dict(self.safety.events),
            reports={name: source.report() for name, source in self.sources.items()},
            notes=tuple(self.notes),
        )

    # ---- the control thread --------------------------------------------------------------------------------------------------

    def run(self, until: threading.Event) -> None:
        """Control until told; then bring the arm to rest and leave it holding. What raises stops the arm, and control goes on."""
        with quiet(self.config.fifo, self.config.cpu, self.notes, collect=True):
            ticker = Ticker(self.clock, self.dt)
            try:
                while not until.is_set():
                    self.step(ticker.wait())
            finally:
                try:
                    self.end("control ends")
                except Exception as error:  # of a robot that takes no commands any more
                    self.fault = error
                self._dismiss()

    def step(self, tick: Tick) -> None:
        """One period. An exception stops the arm smoothly, and is kept in ``fault``."""
        self.skipped += tick.skipped
        self.heed(tick.start)
        self._wake(tick)
        try:
            self._period(tick)
        except Exception as error:
            self._failed(error, tick.start)
        self._account(tick)

    def end(self, why: str) -> None:
        """Bring the set point to rest and leave the robot holding. Needs no measurements: it may have none to give.

        Who is mute has told the robot when it became so, and leaves it to who commands it now.
        """
        try:
            self.stand(why)
        finally:  # also of a robot that takes no commands any more
            if not self.shadow and not self.muted:
                self.robot.stop()

    def stand(self, why: str) -> None:
        """Bring the set point to rest. Raises what commands raised, when it is."""
        self.rest(why)
        ticker, fault = Ticker(self.clock, self.dt, self.clock.now() + self.dt), None
        while not self.safety.still:
            try:
                self._brake(ticker.wait().start)
            except Exception as error:  # the next may get through
                fault = error
        if fault is not None:
            raise fault

    def rest(self, why: str) -> None:
        """Nobody commands from now on, and the arm decelerates."""
        source, self._source, self._starting = self._source, self._idle, False
        self.safety.stop(why)
        if self.safety.mode is not Mode.ESTOPPED:
            self._cause = why
        try:
            source.end()
        except Exception as error:  # it has no say any more
            self.fault = error

    def begin(self, source: str, state: State, *, reseat: bool = False) -> tuple[Reason, ...]:
        """Let a source command, from ``state``. Returns why not; then who commanded before still does."""
        now, wanted = self.clock.now(), self.sources[source]
        if reasons := wanted.begin(now, state):
            return reasons
        moving, reseat = self.safety.mode in _MOVING, reseat or bool(self._mutes)  # others may have moved it
        if not moving and (reasons := self._start_filter(now, state, reseat)):
            wanted.end()
            return reasons
        self._source.end()
        self._source, self._starting, self._missed_now = wanted, True, 0
        self.muted = self._mutes = ""
        self.episode += 1
        return ()

    def _start_filter(self, now: float, state: State, reseat: bool) -> tuple[Reason, ...]:
        if (gone := self._deadman_gone(now)) is not None:
            return (gone,)
        return self.safety.start(state.positions, state.stamp, now, reseat=reseat or self.shadow)

    def _period(self, tick: Tick) -> None:
        now, self._result = tick.start, None
        self._hush()
        state = self.robot.state()
        if self._starting:
            self._await(now, state)
        target = Target() if self._starting else self._source.target(tick, state)
        if target.over is not None:
            self.rest(str(target.over))
        braking = tick.skipped > 0 and self.config.overrun == "decelerate"
        inputs = target.stamps
        if inputs is None:  # it looks at none, so none can be too old
            inputs = dict.fromkeys(self.safety.limits.freshness.inputs, Stamp(now))
        self._result = result = self.safety(
            now,
            self._measured(state),
            None if braking else target.positions,
            stamps={"state": state.stamp, **inputs},
            velocity=target.velocity,
            command_age=target.age,
            deadman=self._deadman,
        )
        self._judge(target, result.mode, result.reasons)
        self._send(result.executed)
        self._last = Period(tick, state, self._source.name, target, result)
        if self.watch is not None:
            self.watch(self._last)
        row = self.log.next()
        row["episode"], row["number"] = self.episode, tick.number
        row["deadline"], row["start"], row["finish"] = tick.deadline, now, self.clock.now()
        row["skipped"], row["mode"], row["age"], row["chunk"] = tick.skipped, MODES[result.mode], target.age, target.chunk
        row["starved"], row["obs_time"] = target.starved, now - target.age
        row["action"] = np.nan if target.action is None else target.action
        row["target"] = np.nan if target.positions is None else target.positions
        row["executed"] = np.nan if result.executed is None else result.executed
        row["state"] = state.positions

    def _await(self, now: float, state: State) -> None:
        """The arm stands until the source's first target is there, and starts from where it is then."""
        try:
            ready = self._source.ready(now)
        except LateError as error:
            self.rest(str(error))
            return
        if not ready:
            self.safety.stop("the first plan is awaited")
            return
        if self.safety.mode not in _MOVING:
            if self.shadow and not self.safety.still:
                return
            if reasons := self._start_filter(now, state, reseat=False):
                self.rest("; ".join(map(str, reasons)))
        self._starting = False

    def _measured(self, state: State) -> np.ndarray:
        """In shadow mode the arm does not follow the set point, which is no reason to stop."""
        if self.shadow and self.safety.mode is not Mode.IDLE and np.isfinite(state.positions).all():
            return self.safety.set_point
        return state.positions

    def _judge(self, target: Target, mode: Mode, reasons: tuple[Reason, ...]) -> None:
        """What the filter's verdict means for the source."""
        if mode is Mode.RUNNING:
            self._cause = ""
        elif mode is Mode.HOLDING:
            self._cause = str(target.why or self.safety.cause)
            if gone := [reason for reason in reasons if reason.kind == "deadman"]:
                self.rest(str(gone[0]))
        elif self._source is not self._idle and not self._starting:  # the filter has stopped it
            self.rest(str(target.why or self.safety.cause))

    def _hush(self) -> None:
        """Who is to be mute is so once the set point rests; the robot is told, because velocities would go on."""
        if self._mutes and not self.muted and self.safety.still:
            self.muted = self._mutes
            if not self.shadow:
                self.robot.stop()

    def _send(self, executed: np.ndarray | None) -> None:
        if executed is not None and not self.shadow and not self.muted:
            self.robot.command(executed)

    def _brake(self, now: float) -> None:
        self._send(self.safety(now, self.safety.set_point, None, stamps={}).executed)

    def _failed(self, error: Exception, now: float) -> None:
        self.fault = error
        self.rest(f"fault: {error!r}")
        try:
            if self._result is None:
                self._brake(now)
            else:  # the set point has made its step; two in one period would be twice as fast
                self._send(self._result.executed)
        except Exception as again:  # nothing more can be done in this period
            self.fault = again

    def _wake(self, tick: Tick) -> None:
        """Nobody looked after the arm for longer than holds may last: it does not go on by itself."""
        fresh, asleep = self.safety.limits.freshness, tick.skipped * self.dt
        if asleep > max(self.safety.limits.auto_resume, fresh.gap) and self._source is not self._idle:
            self.rest(f"watchdog: no period for {asleep:.1f} s")

    def _account(self, tick: Tick) -> None:
        missed = tick.skipped > 0 or self.clock.now() > tick.deadline + self.dt
        self.missed += missed
        self._missed_now = self._missed_now + 1 if missed else 0
        if self._missed_now >= self.config.max_missed and self.safety.mode in _MOVING:
            self.rest(f"watchdog: {self._missed_now} periods in a row were missed")

    # ---- requests ------------------------------------------------------------------------------------------------------------

    def heed(self, now: float) -> None:
        """Do what was asked for until now. :meth:`step` does; who has a loop of its own may besides, while the arm stands."""
        while self._requests:
            ticket = self._requests.popleft()
            if ticket.answer is not None:
                continue  # who asked waits no more
            try:
                ok, message = self._answer_to(ticket, now)
            except Exception as error:
                ok, message = False, f"{type(error).__name__}: {error}"
            answer = ticket.settle(ok, message)
            if ok and not answer.ok and ticket.name in ("start", "home"):
                self.rest(answer.message)  # taken back meanwhile
            if ticket.name != "deadman":
                self._answer = answer

    def _answer_to(self, ticket: Ticket, now: float) -> tuple[bool, str]:
        if ticket.name in ("start", "home", "reset") and now - ticket.asked > _PATIENCE:
            return False, f"came {now - ticket.asked:.1f} s too late; ask again"
        if ticket.name in ("start", "home"):
            return self._start(now, ticket.arguments.get("source", "policy" if ticket.name == "start" else "home"))
        if ticket.name == "reset":
            return self._reset()
        if ticket.name == "deadman":
            return self._press(bool(ticket.arguments["pressed"]), ticket.asked)
        why = str(ticket.arguments.get("why", "asked" if ticket.name != "idle" else "idle"))
        self.rest(why)
        if ticket.name == "mute" and not self.silent:
            self._mutes = why
        if ticket.name == "estop":
            self.safety.estop(why)
            self._cause = f"estop {why}"
        return True, "stops" if not self.safety.still else "stands"

    def _start(self, now: float, source: str) -> tuple[bool, str]:
        if source not in self.sources:
            return False, f"no source '{source}': {nearest(source, self.sources)}"
        if self._source.name == source:
            return False, f"{source} commands already"
        if self.safety.mode is Mode.ESTOPPED:
            return False, "estopped: reset first, then start"
        if reasons := self.begin(source, self.robot.state(), reseat=self._reseat):
            self._cause = "refused: " + "; ".join(map(str, reasons))
            return False, self._cause
        self._reseat = False
        return True, f"{source} begins"

    def _reset(self) -> tuple[bool, str]:
        if self.safety.mode in _MOVING or self._starting:
            return False, "it runs; stop first"
        if not self.safety.reset() or not self.safety.still:
            return False, "the arm still moves; wait until it stands"
        self._reseat, self.fault, self._cause = True, None, ""
        return True, "start begins where the arm is measured"

    def _press(self, pressed: bool, asked: float) -> tuple[bool, str]:
        self._deadman = Stamp(asked) if pressed else None
        if not pressed and self.safety.limits.freshness.deadman is not None and (self.safety.mode in _MOVING or self._starting):
            self.rest("deadman released")
        return True, "pressed" if pressed else "released"

    def _deadman_gone(self, now: float) -> Reason | None:
        limit, pressed = self.safety.limits.freshness.deadman, self._deadman
        if limit is None:
            return None
        since = float("inf") if pressed is None else age(now, pressed)
        return None if since <= limit else Reason("deadman", "", since, limit)

    def _dismiss(self) -> None:
        """Requests that nobody will heed: only an E-stop still counts."""
        while self._requests:
            ticket = self._requests.popleft()
            if ticket.name == "estop":
                self.safety.estop(str(ticket.arguments.get("why", "asked")))
            ticket.settle(ticket.name == "estop", "control has ended")
