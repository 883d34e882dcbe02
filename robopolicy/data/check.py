"""`robopolicy data check`: everything that is damaged, inconsistent or suspicious in a store, each with its mend.

Structure comes from :func:`robopolicy.data.layout.scan`; this module reads every value once, chunk by chunk, so it works on sets
larger than memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from robopolicy.data.arrays import open_array, read_rows
from robopolicy.data.ends import check_ends, read_ends
from robopolicy.data.layout import REPAIR, ArrayInfo, Layout, Problem, missing_chunks, scan, stale_files
from robopolicy.data.store import open_files
from robopolicy.errors import DataError
from robopolicy.features import Feature

STUCK_STEPS = 20  # a sensor that repeats itself for this many steps and for STUCK_SECONDS while others move is reported
STUCK_SECONDS = 3.0  # objects that a hand has yet to reach lie still for a while
_ANGLE_NAME = re.compile(r"joint|qpos|angle|theta|yaw|pitch|roll", re.IGNORECASE)
_TIME_NAME = re.compile(r"^(.*_)?(timestamps?|stamp|time)$", re.IGNORECASE)
_MOST_RADIANS = 7.0  # joints turn at most about one revolution either way; beyond this the numbers are hardly radians
_HUGE = 1e6


def check(path: str | Path, progress: bool = False) -> list[Problem]:
    """All problems of a store, structural ones first.

    Raises:
        DataError: There is no store at the path, or none that can be opened at all.
    """
    files = open_files(Path(path))
    layout = scan(files)
    store = files.zarr_store(layout.blosc)
    ends = read_ends(store, layout)
    check_ends(ends, layout)
    for info in layout.arrays.values():
        if missing := missing_chunks(files, info, int(ends.max()) if len(ends) else None):
            text = f"{len(missing)} chunks are missing, the first '{missing[0]}'; they read as the fill value"
            if layout.features is not None:
                layout.error(info.path, text, f"{REPAIR} to drop the episodes that they held")
            else:
                layout.warning(info.path, text, "some writers leave all-zero chunks out; if yours does not, episodes are damaged")
        if stale := stale_files(files, info):
            layout.warning(
                info.path, f"{len(stale)} files left by a killed writer ({stale[0]})", "harmless; opening for append removes them"
            )
    if len(ends) == 0 and layout.ends is not None and not layout.errors:
        layout.warning("meta/episode_ends", "no episodes", "record some")
    valid = bool(len(ends)) and bool((np.diff(ends, prepend=0) > 0).all())
    _check_rates(layout)
    movement: dict[str, np.ndarray] = {}
    for name, info in tqdm(layout.arrays.items(), desc="check", unit="array", disable=not progress, leave=False):
        feature = (layout.features or {}).get(name)
        if feature is None or feature.shape != info.shape[1:]:
            feature = Feature(name, info.shape[1:], _dtype_name(info))
        steps = min(info.shape[0], int(ends[-1])) if valid else info.shape[0]
        inside = ends[ends <= steps] if valid else np.array([steps])
        try:
            array = open_array(store, info.path, layout.zarr_format)
        except DataError as error:
            layout.error(
                info.path, str(error).removeprefix(f"{info.path}: ").partition(";")[0], f"restore it from a copy, or {REPAIR}"
            )
            continue
        moved = _ArrayCheck(layout, info, feature, inside).run(array, steps)
        if moved is not None and valid and steps == ends[-1]:
            movement[name] = moved
    if valid:
        _check_stuck(layout, movement, ends)
    return layout.problems


def _dtype_name(info: ArrayInfo) -> str:
    name = info.dtype.name
    return {"float16": "float32", "uint32": "int64", "uint64": "int64"}.get(name, name)


class _ArrayCheck:
    """The values of one array."""

    def __init__(self, layout: Layout, info: ArrayInfo, feature: Feature, ends: np.ndarray) -> None:
        self.layout, self.info, self.feature, self.ends = layout, info, feature, ends
        self.starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
        self.image = len(feature.shape) == 3 and feature.shape[-1] in (1, 3, 4) and min(feature.shape[:2]) >= 8
        self.vector = not self.image and feature.size <= 1024
        self.low = self.high = np.zeros(0)
        self.episode_low = np.full((len(ends), feature.size if self.vector else 0), np.inf)
        self.episode_high = -self.episode_low

    def run(self, array: Any, steps: int) -> np.ndarray | None:
        """Note all problems; returns where the value differs from the step before, bool ``[steps]``, or None if unreadable."""
        moved = np.ones(steps, bool)
        damaged: list[int] = []
        bad_steps: list[int] = []
        norms: list[int] = []
        times: list[np.ndarray] = []
        previous: np.ndarray | None = None
        fractions = False
        rows = array.chunks[0]
        for start in range(0, steps, rows):
            stop = min(start + rows, steps)
            try:
                block = read_rows(array, self.info.path, start, stop).reshape(stop - start, -1)
            except DataError as error:
                damaged.append(start)
                reason, previous = error.__cause__ or error, None
                continue
            if block.dtype.kind == "f":
                finite = np.isfinite(block).all(axis=1)
                bad_steps += (start + np.flatnonzero(~finite)).tolist()
                fractions = fractions or bool((block != np.rint(block)).any())
            self._accumulate(block, start)
            if previous is not None:
                moved[start] = bool((block[0] != previous).any())
            moved[start + 1 : start + len(block)] = (block[1:] != block[:-1]).any(axis=1)
            previous = block[-1]
            norms += (start + self._off_norm(block)).tolist()
            if self._is_time():
                times.append(block[:, 0].astype(np.float64))
        where = self.info.path
        if damaged:
            text = f"{len(damaged)} chunks cannot be decoded, the first at steps {damaged[0]}:{damaged[0] + rows} ({reason})"
            self.layout.error(
                where, text, f"restore the chunk from a copy, or {REPAIR} to drop {self._episodes(np.array(damaged))}"
            )
        if bad_steps:
            text = f"NaN or infinity at {len(bad_steps)} steps, the first {bad_steps[0]}"
            self.layout.error(where, text, f"{REPAIR} to drop {self._episodes(np.array(bad_steps))}")
        if norms:
            kind = self.feature.unit or "quaternions"
            text = f"rotations ({kind}) are not of unit length at {len(norms)} steps, the first {norms[0]}"
            self.layout.error(
                where, text, f"normalise them where they are recorded, or {REPAIR} to drop {self._episodes(np.array(norms))}"
            )
        if self.low.size and not bad_steps:
            self._check_range(fractions)
        if times and not damaged:
            self._check_times(np.concatenate(times))
        return None if damaged else moved

    def _accumulate(self, block: np.ndarray, start: int) -> None:
        if not block.size:
            return
        low, high = block.min(axis=0), block.max(axis=0)
        self.low, self.high = (np.minimum(self.low, low), np.maximum(self.high, high)) if self.low.size else (low, high)
        if self.vector:
            stop = start + len(block)
            first, last = np.searchsorted(self.ends, [start, stop - 1], side="right").tolist()
            for episode in range(first, min(last + 1, len(self.ends))):
                part = block[max(self.starts[episode] - start, 0) : self.ends[episode] - start]
                self.episode_low[episode] = np.minimum(self.episode_low[episode], part.min(axis=0))
                self.episode_high[episode] = np.maximum(self.episode_high[episode], part.max(axis=0))

    def _off_norm(self, block: np.ndarray) -> np.ndarray:
        """Rows whose rotation is not of unit length, to 1 %."""
        unit, shape = self.feature.unit, self.feature.shape
        if unit == "quat_xyzw" or (not unit and "quat" in self.feature.name.lower() and shape[-1:] == (4,)):
            vectors = block.reshape(len(block), -1, 4)
        elif unit == "rot6d":
            vectors = block.reshape(len(block), -1, 3)
        else:
            return np.zeros(0, np.int64)
        with np.errstate(invalid="ignore"):
            norm = np.linalg.norm(vectors.astype(np.float64), axis=-1)
            return np.flatnonzero((np.abs(norm - 1) > 0.01).any(axis=1))

    def _check_range(self, fractions: bool) -> None:
        where, feature = self.info.path, self.feature
        low, high = float(self.low.min()), float(self.high.max())
        if self.image and self.info.dtype.kind == "f":
            if low >= 0 and 1 < high <= 255 and not fractions:
                times = self.info.dtype.itemsize
                text = f"an image stored as {self.info.dtype} with integers {low:g}..{high:g}, {times} times as large as uint8"
                self.layout.warning(where, text, "name it with dtype: uint8 in data.features, or re-record as uint8")
            else:
                text = f"an image stored as {self.info.dtype} with values {low:g}..{high:g}; encoders expect uint8"
                self.layout.warning(where, text, "multiply to 0..255 and convert to uint8")
        if self.image and low == high:
            self.layout.warning(where, f"every pixel of every image is {low:g}", "check the camera")
        if not self.vector:
            return
        units = [u.strip() for u in feature.unit.split(",")]
        units = units if len(units) == len(self.low) else [feature.unit] * len(self.low)
        reach = np.maximum(np.abs(self.low.astype(np.float64)), np.abs(self.high.astype(np.float64)))
        names = feature.names if len(feature.names) == len(self.low) else [""] * len(self.low)
        said = [
            "rad" if unit == "rad" else not unit and _ANGLE_NAME.search(f"{feature.name} {n}")
            for unit, n in zip(units, names, strict=True)
        ]
        wide = (reach > _MOST_RADIANS) & (reach <= 720) & (self.info.dtype.kind == "f")
        if degrees := [entry for entry in range(len(said)) if said[entry] and wide[entry]]:
            declared = "declared rad" if said[degrees[0]] == "rad" else "no unit declared"
            text = f"{_some('entry', degrees)} reaches {reach[degrees].max():.4g}, which looks like degrees ({declared})"
            self.layout.warning(where, text, "convert to radians when recording, or declare the true unit")
        if self.info.dtype.kind == "f" and reach.max() > _HUGE and not self._is_time():
            text = f"entry {int(reach.argmax())} reaches {reach.max():.3g}"
            self.layout.warning(where, text, "check the unit and the driver; garbage memory looks like this")
        if self.info.dtype.kind == "f":
            self._check_constant()

    def _check_constant(self) -> None:
        still = self.episode_low == self.episode_high
        always = self.low == self.high
        if always.any():
            values = ", ".join(f"{v:g}" for v in self.low[always][:5])
            text = f"{_some('entry', np.flatnonzero(always))} is constant ({values}) through all episodes"
            self.layout.warning(self.info.path, text, "leave it out if it means nothing, or check the sensor")
        for entry in np.flatnonzero(~always).tolist():
            stuck = np.flatnonzero(still[:, entry])
            if 0 < len(stuck) <= 0.1 * len(self.ends):
                text = f"entry {entry} does not change in {_some('episode', stuck)}, though it does in the others; a stuck sensor"
                self.layout.warning(self.info.path, text, "look at those episodes; drop them when the sensor was dead")

    def _is_time(self) -> bool:
        return self.feature.size == 1 and (self.feature.unit == "s" or bool(_TIME_NAME.match(self.feature.name)))

    def _check_times(self, times: np.ndarray) -> None:
        steps = np.diff(times)
        within = np.ones(len(steps), bool)
        within[self.ends[:-1] - 1] = False
        steps, at = steps[within], np.flatnonzero(within) + 1
        if not len(steps):
            return
        if (backwards := at[steps <= 0]).size:
            text = f"does not increase at {len(backwards)} steps, the first {backwards[0]}"
            self.layout.error(self.info.path, text, "find out which clock was recorded; drop the episodes with jumps")
            return
        period = float(np.median(steps))
        rate = self.feature.rate
        if rate is not None and abs(period * rate - 1) > 0.1:
            text = f"steps are {period:.4g} s apart (median), which is {1 / period:.4g} Hz; declared {rate:g} Hz"
            self.layout.warning(self.info.path, text, "declare the true rate")
        irregular = at[np.abs(steps - period) > 0.5 * period]
        if irregular.size:
            spread = f"shortest {steps.min():.4g}, longest {steps.max():.4g}"
            text = f"{len(irregular)} steps are more than 50 % off the median of {period:.4g} s ({spread})"
            self.layout.warning(self.info.path, text, "frames were lost or late; resample, or drop the worst episodes")

    def _episodes(self, steps: np.ndarray) -> str:
        return _some(
            "episode", np.unique(np.minimum(np.searchsorted(self.ends, steps, side="right"), max(len(self.ends) - 1, 0)))
        )


def _check_rates(layout: Layout) -> None:
    rates = {name: f.rate for name, f in (layout.features or {}).items() if f.rate is not None}
    if len(set(rates.values())) > 1:
        text = (
            f"features declare different rates ({', '.join(f'{n} {r:g} Hz' for n, r in rates.items())}), but share one time axis"
        )
        layout.warning("attribute 'robopolicy' features", text, "declare the rate at which steps were recorded")


def _check_stuck(layout: Layout, movement: dict[str, np.ndarray], ends: np.ndarray) -> None:
    """Features that usually change at each step, and then repeat for long while others move; and steps that repeat entirely."""
    if len(movement) < 2:
        return
    moved = np.stack(list(movement.values()))
    rates = [f.rate for f in (layout.features or {}).values() if f.rate is not None]
    least = max(STUCK_STEPS, round(STUCK_SECONDS * min(rates, default=0.0)))
    first = np.concatenate([[0], ends[:-1]])
    for row, name in enumerate(movement):
        others = np.asarray(np.delete(moved, row, axis=0).any(axis=0))
        if moved[row].mean() < 0.5:
            continue
        runs = [r for r in _runs(~moved[row], first) if r[1] - r[0] >= least and others[r[0] : r[1]].mean() >= 0.5]
        if runs:
            start, stop = max(runs, key=lambda r: r[1] - r[0])
            text = f"repeats itself {len(runs)} times for {least} steps or more while others change, longest {start}:{stop}"
            layout.warning(
                f"data/{name}",
                text,
                "a stuck sensor, or an object that lay still; look at those episodes, drop them if it was dead",
            )
    repeated = ~np.asarray(moved.any(axis=0))
    repeated[first] = False
    if repeated.mean() > 0.01:
        text = f"{repeated.sum()} steps ({repeated.mean():.1%}) repeat the step before in every feature"
        layout.warning("data", text, "pauses, or frames recorded twice; a policy learns to pause from them")


def _runs(flags: np.ndarray, breaks: np.ndarray) -> Iterator[tuple[int, int]]:
    """Maximal runs of True that do not cross ``breaks``, where an episode starts."""
    flags = flags.copy()
    flags[breaks] = False
    edges = np.flatnonzero(np.diff(flags.astype(np.int8), prepend=0, append=0))
    yield from map(tuple, edges.reshape(-1, 2).tolist())


def _some(what: str, items: Sequence[int] | np.ndarray) -> str:
    """``episode 7`` or ``3 episodes (1, 4, 6)``."""
    if len(items) == 1:
        return f"{what} {int(items[0])}"
    plural = "entries" if what == "entry" else f"{what}s"
    shown = ", ".join(str(int(i)) for i in items[:5])
    return f"{len(items)} {plural} ({shown}{', ...' if len(items) > 5 else ''})"
