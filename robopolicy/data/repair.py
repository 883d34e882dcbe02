"""`robopolicy data repair`: copy what is sound into a new store, and say what was not."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from robopolicy.data.arrays import open_array, read_rows
from robopolicy.data.check import check
from robopolicy.data.ends import read_ends
from robopolicy.data.episodes import Episodes, check_values
from robopolicy.data.layout import ArrayInfo, Layout, missing_chunks, scan
from robopolicy.data.sources import FeatureSource, Mapped, infer_source, map_feature
from robopolicy.data.store import Files, WriteLock, building, check_absent, open_files
from robopolicy.errors import DataError

_EXCHANGE = 2  # RENAME_EXCHANGE of renameat2(2)
_AT_FDCWD = -100


class Repaired(NamedTuple):
    episodes: int
    steps: int
    dropped: list[str]  # one line each
    backup: Path | None  # where the damaged store lies after a repair in place


def repair(path: str | Path, out: str | Path | None = None, progress: bool = False) -> Repaired:
    """Write the sound episodes and features of ``path`` to ``out``.

    An episode is dropped when a step of it cannot be decoded, is not finite, or its bounds are unknown; a feature when its array
    cannot be read at all. Images stored as floats become uint8. The result declares its features.

    Args:
        path: The damaged store.
        out: A path that does not exist; None: repair in place. The repaired store then takes the place of the damaged one in one
            atomic exchange, and the damaged one is kept beside it.

    Raises:
        DataError: Nothing can be saved, or ``out`` exists.
    """
    path = Path(path)
    if out is not None:
        with building(Path(out)) as temporary:
            count, steps, dropped = _rebuild(path, temporary, progress)
        return Repaired(count, steps, dropped, None)
    if path.exists() and not path.stat().st_mode & 0o222:
        raise DataError(f"'{path}' is read-only; repair a copy with --out, or make it writable first")
    if not any(problem.severity == "error" for problem in check(path)):
        raise DataError(f"'{path}' has no errors, so there is nothing to repair in place; use --out for a cleaned copy")
    check_absent(backup := path.with_name(f"{path.name}.damaged"))
    lock = WriteLock(path) if path.is_dir() else None
    try:
        mended = path.with_name(f".repaired-{path.name}")  # ends like the path, so that a zip becomes a zip
        with building(mended) as temporary:
            count, steps, dropped = _rebuild(path, temporary, progress)
        _exchange(mended, path)
        mended.rename(backup)
    finally:
        if lock is not None:
            lock.release()
    return Repaired(count, steps, dropped, backup)


def _rebuild(path: Path, target: Path, progress: bool) -> tuple[int, int, list[str]]:
    files = open_files(path)
    layout = scan(files)
    dropped = [
        f"array {p.where}: {p.text}" for p in layout.errors if p.where.startswith("data/") and p.where[5:] not in layout.arrays
    ]
    if not layout.arrays:
        raise DataError(
            f"'{path}': no array can be read, so nothing can be saved; {layout.errors[0] if layout.errors else 'it is empty'}"
        )
    source = _Source(files, layout, dropped)
    if layout.features is not None:
        dropped += [f"array data/{name}: not declared as a feature" for name in layout.arrays if name not in layout.features]
    features = {name: mapped.feature for name, mapped in source.mapped.items()}
    bounds = list(_sound_bounds(source.ends, source.steps, dropped))
    count = 0
    with Episodes.create(target, features, zarr_format=layout.zarr_format, attrs=layout.provenance) as episodes:
        for number, start, stop in tqdm(bounds, desc="repair", unit="episode", disable=not progress, leave=False):
            try:
                episodes.append(source.read(start, stop))
                count += 1
            except DataError as error:
                dropped.append(f"episode {number} (steps {start}:{stop}): {error}")
        steps = episodes.num_steps
    if not count:
        raise DataError(
            f"'{path}': not one episode is sound ({dropped[-1] if dropped else 'there are none'}); restore a copy of the store"
        )
    return count, steps, dropped


class _Source:
    """The readable part of a damaged store."""

    def __init__(self, files: Files, layout: Layout, dropped: list[str]) -> None:
        store = files.zarr_store(layout.blosc)
        self._arrays: dict[str, Any] = {}
        for name, info in layout.arrays.items():
            if layout.features is None or name in layout.features:
                try:
                    self._arrays[name] = open_array(store, info.path, layout.zarr_format)
                except DataError as error:
                    dropped.append(f"array {error}")
        if not self._arrays:
            raise DataError(
                f"'{files.path}': no declared array can be read, so nothing can be saved; restore a copy of the store"
            )
        infos = {name: layout.arrays[name] for name in self._arrays}
        self.steps = min((info.shape[0] for info in infos.values()), default=0)
        self.mapped = {name: self._map(info, layout) for name, info in infos.items()}
        self._gaps = {name: _gaps(files, info) for name, info in infos.items()} if layout.features is not None else {}
        known = layout.ends is not None
        self.ends = read_ends(store, layout) if known else np.array([self.steps], np.int64)
        if known and not len(self.ends) and layout.ends is not None and layout.ends.shape[0]:
            self.ends = np.array([self.steps], np.int64)

    def _map(self, info: ArrayInfo, layout: Layout) -> Mapped:
        declared = (layout.features or {}).get(info.name)
        if declared is not None and info.shape[1:] == declared.shape and info.dtype == np.dtype(declared.dtype):
            return Mapped(declared, info.name)
        guess = infer_source(info, self._sample(info))
        if declared is not None:
            guess = FeatureSource(dtype=guess.dtype, unit=declared.unit, rate=declared.rate)
        return map_feature(info.name, guess, {info.name: info}, {})

    def _sample(self, info: ArrayInfo) -> np.ndarray:
        try:
            return read_rows(self._arrays[info.name], info.path, 0, min(8, info.shape[0]))
        except DataError:  # the first chunk is damaged: no sample, so no guess; reading the episode reports it
            return np.zeros((0, *info.shape[1:]), info.dtype)

    def read(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """One episode. Raises DataError naming the first thing wrong with it."""
        values: dict[str, np.ndarray] = {}
        for name, mapped in self.mapped.items():
            if any(a < stop and start < b for a, b in self._gaps.get(name, [])):
                raise DataError(f"data/{name}: a chunk is missing")
            raw = read_rows(self._arrays[name], f"data/{name}", start, stop)
            values[name] = check_values(mapped.convert(raw), mapped.feature)
        return values


def _gaps(files: Files, info: ArrayInfo) -> list[tuple[int, int]]:
    """Step ranges of missing chunks."""
    indices = (info.first_index(key) for key in missing_chunks(files, info))
    return [(i * info.chunks[0], (i + 1) * info.chunks[0]) for i in indices if i is not None]


def _sound_bounds(ends: np.ndarray, steps: int, dropped: list[str]) -> Iterator[tuple[int, int, int]]:
    """``(number, start, stop)`` of the episodes whose bounds can be trusted; notes the others.

    Where two neighbouring ends contradict each other either may be wrong, so the episodes that touch either are dropped.
    """
    values = np.concatenate([[0], ends])
    doubtful = (values < 0) | (values > steps)
    possible = np.flatnonzero(~doubtful)
    backwards = np.flatnonzero(np.diff(values[possible]) < 0)
    doubtful[possible[backwards]] = True
    doubtful[possible[backwards + 1]] = True
    doubtful[0] = False  # the first episode starts at 0 whatever its end says
    for number in range(len(ends)):
        start, stop = int(values[number]), int(values[number + 1])
        if doubtful[number] or doubtful[number + 1]:
            dropped.append(f"episode {number}: bounds {start}:{stop} cannot be trusted (the data have {steps} steps)")
        elif start == stop:
            dropped.append(f"episode {number}: no steps")
        else:
            yield number, start, stop


def _exchange(new: Path, old: Path) -> None:
    """Swap two paths in one atomic step. Raises DataError where the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    arguments = (_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old), _EXCHANGE)
    if renameat2 is None or renameat2(*arguments) != 0:
        reason = os.strerror(ctypes.get_errno())
        raise DataError(
            f"this file system cannot exchange '{old}' atomically ({reason}); the mended copy is '{new}', or use --out"
        )
