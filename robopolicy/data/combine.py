"""Whole stores from whole stores: merge, split, pack, unpack. Every result appears complete or not at all."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from robopolicy.data import store
from robopolicy.data.episodes import Episodes
from robopolicy.data.layout import scan
from robopolicy.errors import DataError

_PART_NAMES = ("train", "val", "test")


def merge(paths: Sequence[str | Path], out: str | Path, progress: bool = False) -> int:
    """Put the episodes of several stores, in order, into a new one; returns their number.

    Raises:
        DataError: Features differ between the stores (name, shape, dtype, unit, names and rate must agree), or ``out`` exists.
    """
    sources = [Episodes.open(path) for path in paths]
    first = sources[0]
    for other in sources[1:]:
        _check_agree(first, other)
    provenance = {"merged": [{"store": s.path.name, "episodes": len(s), **s.attrs} for s in sources]}
    with store.building(Path(out)) as temporary, _like(first, temporary, provenance) as target:
        for source in sources:
            _copy(source, range(len(source)), target, progress)
        return len(target)


def split(path: str | Path, fractions: Sequence[float], out_dir: str | Path, seed: int = 0, progress: bool = False) -> list[Path]:
    """Deal the episodes at random into one store per fraction; returns their paths.

    Up to three parts are called train, val and test. Every part gets at least one episode.

    Raises:
        DataError: Fractions are not positive or sum to more than 1, there are too few episodes, or a part exists.
    """
    if not fractions or min(fractions) <= 0 or sum(fractions) > 1 + 1e-9 or not all(map(math.isfinite, fractions)):
        raise DataError(
            f"fractions {', '.join(map(str, fractions))}: each must be positive and their sum at most 1, for example .9,.1"
        )
    source = Episodes.open(path)
    counts = [max(1, round(f * len(source))) for f in fractions]
    counts[0] = min(counts[0], len(source) - sum(counts[1:]))
    if counts[0] < 1:
        raise DataError(f"'{path}' has {len(source)} episodes, too few for {len(fractions)} parts; record more or split less")
    order = np.random.default_rng(seed).permutation(len(source))
    stem = Path(path).name.removesuffix(".zip").removesuffix(".zarr")
    names = _PART_NAMES if len(fractions) <= len(_PART_NAMES) else [f"part{i}" for i in range(len(fractions))]
    targets = [Path(out_dir) / f"{stem}_{name}.zarr" for name, _ in zip(names, counts, strict=False)]
    for target in targets:
        store.check_absent(target)
    for number, target in enumerate(targets):
        chosen = np.sort(order[sum(counts[:number]) : sum(counts[: number + 1])])
        provenance = {"split": {"store": source.path.name, "seed": seed, "episodes": chosen.tolist()}, **source.attrs}
        with store.building(target) as temporary, _like(source, temporary, provenance) as part:
            _copy(source, chosen, part, progress)
    return targets


def pack(path: str | Path, out: str | Path) -> None:
    """A store directory into a zip. Raises DataError when the store is damaged or ``out`` exists or is no ``.zip``."""
    path, out = Path(path), Path(out)
    if not store.is_zip(out):
        raise DataError(f"'{out}' does not end in .zip; name the archive so, for example {path.name}.zip")
    if not path.is_dir():
        raise DataError(f"'{path}' is no directory; pack takes a zarr directory")
    lock = store.WriteLock(path)
    try:
        Episodes.open(path)
        store.pack(path, out)
    finally:
        lock.release()


def unpack(path: str | Path, out: str | Path) -> None:
    """A zip into a store directory. Raises DataError when the archive is damaged, unsafe, or ``out`` exists."""
    files = store.open_files(Path(path))
    if not isinstance(files, store.ZipFiles):
        raise DataError(f"'{path}' is no zip archive; there is nothing to unpack")
    if store.is_zip(Path(out)):
        raise DataError(f"'{out}' ends in .zip; unpack makes a directory, name it so")
    scan(files)
    with store.building(Path(out)) as temporary:
        for key, _, _ in files.walk(""):
            target = temporary / key  # ZipFiles refused names that lead outside
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(files.read(key) or b"")
        try:
            Episodes.open(temporary)
        except DataError:
            shutil.rmtree(temporary)
            raise


def _check_agree(first: Episodes, other: Episodes) -> None:
    if odd := first.features.keys() ^ other.features.keys():
        name = min(odd)
        owner, lacking = (first, other) if name in first.features else (other, first)
        raise DataError(f"feature '{name}' is in '{owner.path}' and not in '{lacking.path}'; merge stores with the same features")
    for name, feature in first.features.items():
        if feature != other.features[name]:
            a, b = feature.to_json(), other.features[name].to_json()
            key = next(k for k in a if a[k] != b[k])
            raise DataError(
                f"feature '{name}' has {key} {a[key]!r} in '{first.path}' and {b[key]!r} in '{other.path}'; "
                "convert or re-declare one of them first"
            )


def _like(source: Episodes, path: Path, provenance: dict[str, Any]) -> Episodes:
    return Episodes.create(path, source.features, zarr_format=source.zarr_format, attrs=provenance)


def _copy(source: Episodes, indices: Sequence[int] | range | np.ndarray, target: Episodes, progress: bool) -> None:
    for index in tqdm(indices, desc=source.path.name, unit="episode", disable=not progress, leave=False):
        target.append(source.episode(int(index)))
