"""What goes wrong between a sensor and its reader, made on purpose: a stream of readings with faults in it. No ROS.

Each stream of the virtual arm (joint states, cameras, object poses) goes through a :class:`Channel`. Everything is drawn from a
seed, and every fault has its own draw for every reading: the same readings are dropped whether others are delayed or not.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np
import pydantic

from robopolicy.config import Config

NAMES = ("drop", "delay", "duplicate", "reorder", "nan", "freeze", "stuck", "wrong_names", "wrong_length", "clock_jump")
STREAMS = ("state", "camera", "poses")

Share = pydantic.Field(default=0.0, ge=0.0, le=1.0)


class Faults(Config):
    """Of one stream; shares are of its readings. The defaults are no faults.

    Attributes:
        drop: Share that never comes; 1: the sensor is silent.
        delay: Each comes so much later [s]; its stamp is right.
        duplicate: Share that comes twice.
        reorder: Share that comes after the one that follows it.
        nan: Share with NaN in it; pictures: with random bytes.
        freeze: The last one comes again and again, stamp and all.
        stuck: Old values under new stamps: nothing but the arm's own motion tells.
        wrong_names: Share whose joint, frame or encoding has another name.
        wrong_length: Share that is too short.
        clock_jump: Stamps are so much ahead, or behind if negative [s].
    """

    drop: float = Share
    delay: float = pydantic.Field(default=0.0, ge=0.0, le=10.0)
    duplicate: float = Share
    reorder: float = Share
    nan: float = Share
    freeze: bool = False
    stuck: bool = False
    wrong_names: float = Share
    wrong_length: float = Share
    clock_jump: float = pydantic.Field(default=0.0, ge=-1e6, le=1e6)


class Reading(NamedTuple):
    """One message's content.

    Attributes:
        stamp: When it was made, by the wall clock [ns].
        values: ``[..., n]``: joints, or a pose, float; or the bytes of a picture, uint8.
        names: Of the entries, or of the frame or the encoding.
    """

    stamp: int
    values: np.ndarray
    names: tuple[str, ...]


class Channel:
    """A stream with faults. Push what the sensor makes; send what is :meth:`due`. For one thread; any may set ``faults``.

    Attributes:
        faults: In force.
        counters: How often each was put in.
    """

    def __init__(self, seed: int) -> None:
        self.faults = Faults()
        self.counters: Counter[str] = Counter()
        self._rng = np.random.default_rng(seed)
        self._waiting: list[tuple[float, Reading]] = []
        self._overtaken: Reading | None = None
        self._last: Reading | None = None  # as pushed
        self._frozen: Reading | None = None
        self._stuck: Reading | None = None

    def push(self, now: float, reading: Reading) -> None:
        """A reading was made at ``now`` [s]."""
        faults, draws = self.faults, dict(zip(NAMES, self._rng.random(len(NAMES)), strict=True))
        self._frozen = (self._frozen or self._last or reading) if faults.freeze else None
        self._stuck = (self._stuck or self._last or reading) if faults.stuck else None
        self._last = reading
        # As often as their draws say; or whenever they are on at all.
        happens = {name: draws[name] < value for name in NAMES if isinstance(value := getattr(faults, name), float)}
        happens |= {
            "freeze": faults.freeze,
            "stuck": faults.stuck,
            "delay": faults.delay > 0,
            "clock_jump": faults.clock_jump != 0,
        }
        self.counters.update(name for name, does in happens.items() if does)
        if self._frozen is not None:
            reading = self._frozen
        if self._stuck is not None:
            reading = reading._replace(values=self._stuck.values)
        if happens["drop"]:
            return
        if happens["nan"]:
            reading = reading._replace(values=_spoilt(reading.values, self._rng))
        if happens["wrong_names"]:
            reading = reading._replace(names=(f"not_{reading.names[0]}", *reading.names[1:]))
        if happens["wrong_length"]:
            reading = reading._replace(values=reading.values[..., : max(1, int(0.9 * reading.values.shape[-1]))])
        reading = reading._replace(stamp=reading.stamp + round(faults.clock_jump * 1e9))
        due = now + faults.delay
        overtaken, self._overtaken = self._overtaken, None
        if happens["reorder"] and overtaken is None:
            self._overtaken = reading
            return
        for item in (reading, *([reading] if happens["duplicate"] else []), *([overtaken] if overtaken is not None else [])):
            self._waiting.append((due, item))

    def due(self, now: float) -> list[Reading]:
        """What comes out by ``now``, in the order in which it comes."""
        if not self._waiting:
            return []
        out = sorted((entry for entry in self._waiting if entry[0] <= now), key=lambda entry: entry[0])
        self._waiting = [entry for entry in self._waiting if entry[0] > now]
        return [reading for _, reading in out]


def _spoilt(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """With NaN in one entry of the last axis; bytes: random ones."""
    if values.dtype == np.uint8:
        return rng.integers(0, 256, values.shape, np.uint8)
    values = np.array(values, np.float64)
    values[..., int(rng.integers(values.shape[-1]))] = np.nan
    return values
