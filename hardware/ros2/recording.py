"""``Recording``: episodes of a robot into a store that ``robopolicy train`` reads. No ROS: the recorder node and bags feed it.

Rows are due at the policy's rate. Each holds what the policy would have observed then, by the robot's own model, with every input
as it was at that moment by its header stamp; the action, which is what the arm was told by the end of the row; and the raw
coordinates. A row is formed once the messages of its moment have had time to come.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pydantic

from hardware.ros2.aligned import Track
from robopolicy.config import Config
from robopolicy.data.episodes import Episodes
from robopolicy.data.writer import EpisodeWriter
from robopolicy.deploy.limits import SafetyLimits
from robopolicy.errors import ConfigError, DataError, RobopolicyError
from robopolicy.features import Feature
from robopolicy.provenance import provenance
from robopolicy.robot import Measured, RobotModel

STATE, EXECUTED, COMMANDED = "state", "executed", "commanded"
_MOVED = 2e-3  # [rad, m]: further from where it was, the arm is moving
_SILENT = 0.5  # [s] without a command: the commander has gone; one that holds goes on sending
_STILL = 1.0  # [s] at either end of an episode that are worth a word


class RecordingConfig(Config):
    """How episodes are recorded.

    Attributes:
        action: What a policy shall learn to do. ``executed``: what the arm was told, after the safety filter. ``measured``: where
            it was at the end of the row, for arms that are led by hand and told nothing.
        lag: How long messages may take to come [s]; rows are formed so much later.
        block: Rows that go to the disk together.
        reserve: Free space [MB] at which an episode is ended and stored, while that is still possible.
    """

    action: Literal["executed", "measured"] = "executed"
    lag: float = pydantic.Field(default=0.15, ge=0, le=1)
    block: int = pydantic.Field(default=16, ge=1)
    reserve: float = pydantic.Field(default=500.0, ge=0)


class State(NamedTuple):
    """Measured coordinates ``[n]`` and their velocities ``[n]``."""

    positions: np.ndarray
    velocities: np.ndarray


class Ended(NamedTuple):
    """An episode that has ended.

    Attributes:
        episode: In the store; None: it is lost, or had no rows.
        steps: Rows.
        notes: What a person should know of it.
    """

    episode: int | None
    steps: int
    notes: tuple[str, ...]

    def __str__(self) -> str:
        what = (
            f"no episode stored ({self.steps} steps)" if self.episode is None else f"episode {self.episode}: {self.steps} steps"
        )
        return "; ".join((what, *self.notes))


class Recording:
    """One store. Feed :attr:`tracks`, call :meth:`advance` often, and :meth:`start`, :meth:`stop`, :meth:`discard` as people say.

    Nothing that has been recorded is given up while it can be stored: whatever ends an episode, a full disk, a camera of another
    size, the end of the program, it is committed up to there. Not for several threads.

    Args:
        out: Store to make, or to add to.
        model: Of the robot; only this uses it.
        limits: Of the robot: ages from which an input counts as stale, and units.
        config: See :class:`RecordingConfig`.
        about: Kept with the data.
        offline: What comes has been stored before, and may wait for the disk. Live, waiting would lose what comes meanwhile.

    Attributes:
        model: Of the robot.
        tracks: What comes in: ``state`` (:class:`State`), the model's inputs by name, and ``executed`` and ``commanded``
            coordinates ``[n]``, after and before the safety filter. Without ``commanded``, what was executed is stored for both.
        steps: Rows of the episode in progress, or of the last.
        success: Whether its goal has been met; set by who feeds this.
        stale_now: Inputs that were stale in the last row.

    Raises:
        DataError: The store holds other features, or is written by somebody else.
        ConfigError: The model's action has no rate.
    """

    def __init__(
        self,
        out: str | Path,
        model: RobotModel,
        limits: SafetyLimits,
        config: RecordingConfig | None = None,
        about: Mapping[str, Any] | None = None,
        *,
        offline: bool = False,
    ) -> None:
        self.config, self.model, fresh = config or RecordingConfig(), model, limits.freshness
        if limits.names != tuple(model.names):
            raise ConfigError(f"the model has {', '.join(model.names)}, the limits are for {', '.join(limits.names)}")
        rate = model.action_feature.rate
        if rate is None:
            raise ConfigError(f"action '{model.action_feature.name}' has no rate; declare the policy's in the robot's features")
        self.period = 1.0 / rate
        commands = (EXECUTED,) if self.config.action == "executed" else ()
        self.sources = (STATE, *model.inputs, *commands)
        self._limits = {STATE: fresh.state} | {name: fresh.inputs.get(name, fresh.default) for name in model.inputs}
        self._ages = self._limits | dict.fromkeys(commands, _SILENT)
        self.tracks: dict[str, Track[Any]] = {name: Track() for name in (STATE, *model.inputs, EXECUTED, COMMANDED)}
        units = ",".join(c.unit for c in limits.coordinates)
        self.path, features = Path(out), _features(model, units, self.sources, rate)
        self._episodes = _open(self.path, features, {**(about or {}), "action": self.config.action, **provenance()})
        self._writer = EpisodeWriter(self._episodes, block=self.config.block, wait=offline)
        self._due: float | None = None  # of the next row [s]; None: not recording
        self._ended: Ended | None = None
        self.steps, self.success = 0, False
        self.stale_now: tuple[str, ...] = ()

    # ---- what people say -----------------------------------------------------------------------------------------------------

    @property
    def recording(self) -> bool:
        return self._due is not None

    def missing(self, now: float) -> list[str]:
        """Why nothing can be recorded now: inputs that have not come, or no more. What is executed may come later."""
        reasons = []
        for name, limit in self._limits.items():
            newest = self.tracks[name].newest
            if newest is None:
                reasons.append(f"'{name}' has not come yet")
            elif now - newest.stamp.came > limit:
                reasons.append(f"'{name}' came last {now - newest.stamp.came:.1f} s ago")
        return reasons

    def start(self, now: float) -> None:
        """Begin an episode. Raises DataError when it cannot: nothing to record, no room, one in progress."""
        if self.recording:
            raise DataError(f"episode {len(self._episodes)} is being recorded; stop or discard it first")
        if reasons := self.missing(now):
            raise DataError(f"{'; '.join(reasons)}: start the drivers, or mend the topics of the profile")
        if self._full():
            raise DataError(f"'{self.path}': less than {self.config.reserve:g} MB are free; free some, or record elsewhere")
        self.model.reset(self.tracks[STATE].newest.value.positions)  # type: ignore[union-attr]  # it has come
        self._due = self._start = self._first = now
        self._number, self._began = 0, time.time()
        self.steps, self.success = 0, False
        self._stale: Counter[str] = Counter()
        self.stale_now = ()
        self._moved: list[int] = []  # first and last row of motion
        self._rest: np.ndarray | None = None

    def stop(self, reason: str = "") -> Ended:
        """End the episode and store it; it is safely on disk when this returns. Rows that are not due yet are left out."""
        if not self.recording:
            raise DataError("nothing is being recorded; start first")
        self._due = None
        notes = [reason] * bool(reason) + self._notes()
        if not self.steps:
            self._writer.discard()
            what = "nothing was executed" if self.tracks[EXECUTED].newest is None else "it was too short"
            return Ended(None, 0, (*notes, what))
        try:
            index = self._writer.commit()
        except DataError as error:
            self._writer.discard()
            return Ended(None, self.steps, (*notes, f"LOST: {error}"))
        notes += self._remember(index, reason)
        return Ended(index, self.steps, tuple(notes))

    def discard(self) -> int:
        """Drop the episode in progress; how many rows it had."""
        if not self.recording:
            raise DataError("nothing is being recorded; what is stored stays stored")
        self._due = None
        self._writer.discard()
        return self.steps

    def close(self) -> Ended | None:
        """End everything; an episode in progress is stored."""
        ended = self.stop("the recorder ended") if self.recording else None
        self._writer.close()
        self._episodes.close()
        return ended

    def take_ended(self) -> Ended | None:
        """The episode that ended by itself since the last call, if one did."""
        ended, self._ended = self._ended, None
        return ended

    def forget(self) -> None:
        """Drop all that has come: other messages follow, of another time."""
        self.tracks.update({name: Track() for name in self.tracks})

    @property
    def episodes(self) -> int:
        """Stored so far."""
        return len(self._episodes)

    # ---- rows ----------------------------------------------------------------------------------------------------------------

    def advance(self, now: float) -> None:
        """Form all rows whose messages have had time to come."""
        while self._due is not None and self._due + self.period + self.config.lag <= now:
            due = self._due
            self._number += 1
            self._due = self._start + self._number * self.period
            try:
                if self._full():
                    raise DataError(f"less than {self.config.reserve:g} MB are free")
                self._row(due)
            except RobopolicyError as error:
                self._ended = self.stop(f"ended by itself: {error}")

    def _row(self, due: float) -> None:
        entries = {name: self.tracks[name].at(due) for name in (STATE, *self.model.inputs)}
        executed = self.tracks[EXECUTED].at(due + self.period)
        after = self.tracks[STATE].at(due + self.period)
        if None in entries.values() or (executed is None and self.config.action == "executed") or after is None:
            return  # an episode begins with the first command
        present = {name: entry for name, entry in {**entries, EXECUTED: executed}.items() if entry is not None}
        self.stale_now = tuple(name for name, limit in self._ages.items() if due - present[name].made > limit)
        self._stale.update(self.stale_now)
        state: State = present[STATE].value
        measured = Measured(state.positions, state.velocities, {name: present[name].value for name in self.model.inputs})
        told = after.value.positions if executed is None else executed.value
        wanted = self.tracks[COMMANDED].at(due + self.period)
        silent = wanted is None or due + self.period - wanted.made > _SILENT  # nobody wants anything: the arm holds, goes home
        aim = after.value.positions if self.config.action == "measured" else told
        sources, action = [present[name] for name in self.sources], self.model.action_feature
        if not self.steps:
            self._first = due
        self._writer.add(
            {
                **self.model.observe(measured),
                action.name: np.asarray(self.model.action_of(aim), action.dtype),
                "joint_positions": state.positions,
                "joint_velocities": state.velocities,
                EXECUTED: told,
                COMMANDED: told if wanted is None or silent else wanted.value,
                "timestamp": np.array([due - self._first]),
                "stamps": np.array([entry.made - self._first for entry in sources]),
                "arrivals": np.array([entry.stamp.came - self._first for entry in sources]),
            }
        )
        self._rest = state.positions if self._rest is None else self._rest
        if np.abs(state.positions - self._rest).max() > _MOVED:
            self._rest = state.positions
            self._moved = [*self._moved[:1], self.steps]
        self.steps += 1

    def _full(self) -> bool:
        return shutil.disk_usage(self.path).free < self.config.reserve * 1e6

    # ---- what a person should know -------------------------------------------------------------------------------------------

    def _notes(self) -> list[str]:
        notes = [f"'{name}' was stale in {count} of {self.steps} steps" for name, count in self._stale.items()]
        for name in self.sources:
            if (track := self.tracks[name]).unstamped > track.came / 2 and name not in (EXECUTED, COMMANDED):
                notes.append(f"'{name}' has no usable stamps, times of arrival were taken: synchronise the clocks")
        head, tail = (self._moved[0], self.steps - 1 - self._moved[-1]) if self._moved else (self.steps, 0)
        for rows, where in ((head, "at first"), (tail, "at last")):
            if rows * self.period > _STILL:
                notes.append(f"the arm stood still for {rows * self.period:.1f} s {where}; policies learn to pause from that")
        return notes

    def _remember(self, index: int, reason: str) -> list[str]:
        """Keep with the data what is known of an episode. Not worth an episode: what goes wrong becomes a note."""
        began = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._began))
        entry = {"began": began, "success": self.success, "stale": dict(self._stale), "ended": reason}
        recorded = {**self._episodes.attrs.get("recorded", {}), str(index): entry}
        try:
            self._episodes.set_attrs({**self._episodes.attrs, "recorded": recorded})
        except OSError as error:
            return [f"its description could not be stored ({error})"]
        return []


def _features(model: RobotModel, units: str, sources: tuple[str, ...], rate: float) -> dict[str, Feature]:
    n, s = len(model.names), len(sources)
    speeds = ",".join(f"{unit}/s" for unit in units.split(","))

    def vector(name: str, size: int, unit: str, names: tuple[str, ...]) -> Feature:
        return Feature(name, (size,), "float64", unit, names, rate)

    raw = [
        vector("joint_positions", n, units, model.names),
        vector("joint_velocities", n, speeds, model.names),
        vector(EXECUTED, n, units, model.names),
        vector(COMMANDED, n, units, model.names),
        vector("timestamp", 1, "s", ()),
        vector("stamps", s, "s", sources),
        vector("arrivals", s, "s", sources),
    ]
    own = {**model.observation_features, model.action_feature.name: model.action_feature}
    return {**{feature.name: feature for feature in raw if feature.name not in own}, **own}


def _open(path: Path, features: Mapping[str, Feature], about: Mapping[str, Any]) -> Episodes:
    if not path.exists():
        return Episodes.create(path, features, attrs=about)
    episodes = Episodes.open(path, mode="a")
    if episodes.features != features:
        odd = next(name for name in {**features, **episodes.features} if features.get(name) != episodes.features.get(name))
        episodes.close()
        raise DataError(f"'{path}' holds other features than are recorded now ('{odd}' differs); record to another path")
    return episodes
