"""``Episodes``: demonstrations in a zarr store, read and appended to.

Layout: ``data/<name>`` with time on axis 0 and all episodes one after another, ``meta/episode_ends`` (int64, cumulative ends),
declared features in the root attributes. :mod:`robopolicy.data.store` explains why an append is atomic.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.storage import LocalStore

from robopolicy.data.arrays import open_array, read_rows
from robopolicy.data.ends import check_ends, read_ends
from robopolicy.data.layout import ENDS, REPAIR, ROOT_KEY, SCHEMA, Layout, missing_chunks, scan, stale_files
from robopolicy.data.sources import FeatureSource, Mapped, infer_source, map_feature
from robopolicy.data.store import CommitStore, WriteLock, building, check_absent, is_zip, open_files, write_file
from robopolicy.errors import DataError, nearest
from robopolicy.features import Feature

__all__ = ["Episodes", "FeatureSource"]

IMAGE_CHUNK = 16  # frames; small enough for random windows, large enough to compress across frames (docs/data.md has the figures)
VECTOR_CHUNK_BYTES = 2**17  # rewritten at each append, so small
ENDS_CHUNK = 4096


class Episodes:
    """A set of demonstrations. Make one with :meth:`open` or :meth:`create`; usable as a context manager.

    Attributes:
        path: Where it lies.
        features: Declared features by name (inferred ones in a foreign store).
        ends: Cumulative ends of the episodes, int64 ``[E]``.
        attrs: Provenance kept with the data: task, seeds, who recorded it.
    """

    def __init__(self, path: Path, mode: Literal["r", "a"], features: Mapping[str, FeatureSource] | None) -> None:
        self.path = path
        self._lock = WriteLock(path) if mode == "a" else None
        try:
            self._files = open_files(path)
            layout = scan(self._files)
            self._store = CommitStore(path, layout.blosc) if mode == "a" else self._files.zarr_store(layout.blosc)
            self._mode: Literal["r", "r+"] = "r+" if mode == "a" else "r"
            self.zarr_format = layout.zarr_format
            self.ends = read_ends(self._files.zarr_store(layout.blosc), layout)
            self._load(layout, features)
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(
        cls, path: str | Path, mode: Literal["r", "a"] = "r", features: Mapping[str, FeatureSource] | None = None
    ) -> Episodes:
        """Open a store to read, or (``mode="a"``) to append to.

        Args:
            path: A zarr directory, or a zip of one (read only).
            mode: ``"a"`` takes the write lock and removes what a killed writer left behind.
            features: How features are read from the arrays of a foreign store; they replace or add to what is found by itself,
                and damage in arrays that they do not name is then no error.

        Raises:
            DataError: No store, damaged, inconsistent, locked, or a zip opened for appending.
        """
        path = Path(path)
        if mode == "a":
            if features:
                raise DataError(f"'{path}': appending goes to the stored arrays; open it for appending without data.features")
            if is_zip(path) or path.is_file():
                raise DataError(
                    f"'{path}' is a zip, which cannot be appended to safely; `robopolicy data unpack` it to a directory first"
                )
            if not path.exists():
                raise DataError(
                    f"no dataset at '{path}'; make it with Episodes.create, or record one with `robopolicy data demos`"
                )
        return cls(path, mode, features)

    @classmethod
    def create(
        cls,
        path: str | Path,
        features: Mapping[str, Feature],
        *,
        zarr_format: Literal[2, 3] = 3,
        attrs: Mapping[str, Any] | None = None,
    ) -> Episodes:
        """Make an empty store and open it for appending.

        Args:
            path: A directory that does not exist yet.
            features: What each step holds, the action among them.
            zarr_format: 2 for readers built on zarr 2.
            attrs: Provenance, JSON values only.

        Raises:
            DataError: The path exists or ends in ``.zip``, or no feature is declared.
        """
        path = Path(path)
        if is_zip(path):
            raise DataError(
                f"'{path}': a zip cannot be recorded into safely; record to a directory, then `robopolicy data pack` it"
            )
        if not features:
            raise DataError(f"'{path}': no features declared; declare at least an observation and an action")
        for name, feature in features.items():
            if name != feature.name or not name or "/" in name or name.startswith("."):
                raise DataError(
                    f"feature '{feature.name}' under the key '{name}': names must agree, without '/' or a leading dot"
                )
        check_absent(path)
        with building(path) as temporary:
            root = zarr.open_group(LocalStore(temporary), mode="w", zarr_format=zarr_format)
            root.attrs.update({ROOT_KEY: _root_attributes(features, attrs or {})})
            for name, feature in features.items():
                _create_array(root, f"data/{name}", feature.shape, feature.dtype, zarr_format, _chunk_rows(feature))
            _create_array(root, ENDS, (), "int64", zarr_format, ENDS_CHUNK)
        return cls(path, "a", None)

    def _load(self, layout: Layout, sources: Mapping[str, FeatureSource] | None) -> None:
        named = {source.key or name for name, source in (sources or {}).items()}
        check_ends(self.ends, layout, named or None)
        errors = [p for p in layout.errors if not named or not p.where.startswith("data/") or p.where.split("/")[1] in named]
        if errors:
            more = f" (and {len(errors) - 1} more: `robopolicy data check`)" if len(errors) > 1 else ""
            raise DataError(f"'{self.path}': {errors[0]}{more}")
        self.attrs: dict[str, Any] = dict(layout.provenance)
        self.declared = layout.features is not None
        usable = {n: layout.arrays[n] for n in layout.features or layout.arrays if layout.arrays[n].shape[0] >= self.num_steps}
        try:
            self._arrays = {name: self._open_array(info.path) for name, info in usable.items()}
        except DataError as error:
            raise DataError(f"'{self.path}': {error}") from error
        self._mapped: dict[str, Mapped] = {}
        for name, info in usable.items():
            if layout.features is None:
                guess = infer_source(info, self._slice(name, 0, min(8, self.num_steps)))
                self._mapped[name] = map_feature(name, guess, usable, {})
            else:
                self._mapped[name] = Mapped(layout.features[name], name)
                if missing := missing_chunks(self._files, info, self.num_steps):
                    raise DataError(
                        f"'{self.path}': {info.path}: chunk '{missing[0]}' is missing ({len(missing)} in all); {REPAIR}"
                    )
        for name, source in (sources or {}).items():
            self._mapped[name] = map_feature(name, source, usable, layout.features or {})
        self.features: dict[str, Feature] = {name: mapped.feature for name, mapped in self._mapped.items()}
        self._uncommitted = 0
        if self._mode == "r+":
            self._ends_array = self._open_array(ENDS)
            self._cut_tails(layout)

    def _open_array(self, path: str) -> Any:
        return open_array(self._store, path, self.zarr_format, self._mode)

    def _cut_tails(self, layout: Layout) -> None:
        """Remove what killed writers left beyond the last committed episode."""
        self._drop_consolidated()
        for array in self._arrays.values():
            if array.shape[0] > self.num_steps:
                array.resize((self.num_steps, *array.shape[1:]))
        self._publish()
        for info in [*scan(self._files).arrays.values(), layout.ends]:
            for key in stale_files(self._files, info) if info else []:
                (self.path / key).unlink(missing_ok=True)

    def _drop_consolidated(self) -> None:
        """Remove foreign copies of all metadata in one place, which an append would leave stale."""
        (self.path / ".zmetadata").unlink(missing_ok=True)
        root = self.path / "zarr.json"
        if root.exists() and "consolidated_metadata" in (value := json.loads(root.read_bytes())):
            write_file(root, json.dumps({k: v for k, v in value.items() if k != "consolidated_metadata"}).encode())

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def num_steps(self) -> int:
        """Committed steps of all episodes together."""
        return int(self.ends[-1]) if len(self.ends) else 0

    @property
    def starts(self) -> np.ndarray:
        """First step of each episode, int64 ``[E]``."""
        return np.concatenate([np.zeros(1, np.int64), self.ends[:-1]]) if len(self.ends) else self.ends

    @property
    def mapped(self) -> Mapping[str, Mapped]:
        """How each feature is read from the arrays."""
        return self._mapped

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Steps ``start:stop`` of one feature, ``[stop - start, *shape]``.

        Raises:
            DataError: The name or range is not in the store, or a chunk is damaged.
        """
        if name not in self._mapped:
            raise DataError(f"'{self.path}' has no feature '{name}'; {nearest(name, self._mapped)}")
        if not 0 <= start <= stop <= self.num_steps:
            raise DataError(f"'{self.path}': steps {start}:{stop} of '{name}' are outside 0:{self.num_steps}")
        mapped = self._mapped[name]
        return mapped.convert(self._slice(mapped.key, start, stop))

    def blocks(self, name: str, steps: int | None = None) -> Iterator[np.ndarray]:
        """One feature from beginning to end in blocks of at most 32 MiB (or ``steps``), aligned with its chunks."""
        mapped = self._mapped[name]
        array = self._arrays[mapped.key]
        chunk = array.chunks[0]
        row = max(1, math.prod(array.shape[1:]) * array.dtype.itemsize)
        block = steps or max(1, 2**25 // (row * chunk)) * chunk
        for start in range(0, self.num_steps, block):
            yield self.read(name, start, min(start + block, self.num_steps))

    def episode(self, index: int) -> dict[str, np.ndarray]:
        """All features of one episode, each ``[T, *shape]``."""
        if not 0 <= index < len(self):
            raise DataError(f"'{self.path}': no episode {index}; it holds {len(self)}")
        return {name: self.read(name, int(self.starts[index]), int(self.ends[index])) for name in self._mapped}

    def _slice(self, key: str, start: int, stop: int) -> np.ndarray:
        try:
            return read_rows(self._arrays[key], f"data/{key}", start, stop)
        except DataError as error:
            raise DataError(f"'{self.path}': {error}") from error

    def append(self, episode: Mapping[str, np.ndarray]) -> int:
        """Add one episode, all of it or nothing, and return its index.

        Args:
            episode: Every feature as ``[T, *shape]``, in its declared dtype or one that casts to it without loss of kind.

        Raises:
            DataError: A feature is missing, unknown, of the wrong shape, length or dtype, not finite; or the disk is full. The
                store keeps all earlier episodes.
        """
        if self._uncommitted:
            raise DataError(f"'{self.path}': an EpisodeWriter has an episode in progress; commit or discard it before append()")
        self.extend(episode)
        return self.commit()

    def extend(self, block: Mapping[str, np.ndarray]) -> None:
        """Write steps of the episode in progress; no reader sees them before :meth:`commit`. Raises as :meth:`append`."""
        self._check_writable()
        values = self._checked(block)
        start = self.num_steps + self._uncommitted
        count = len(next(iter(values.values())))
        try:
            for name, value in values.items():
                array = self._arrays[name]
                array.resize((start + count, *array.shape[1:]))
                array[start : start + count] = value
        except OSError as error:
            self.rollback()
            raise self._write_error(error) from error
        self._uncommitted += count

    def commit(self) -> int:
        """End the episode in progress and make it visible to all readers; returns its index. Raises DataError."""
        self._check_writable()
        if not self._uncommitted:
            raise DataError(f"'{self.path}': the episode has no steps; add at least one before commit")
        end = self.num_steps + self._uncommitted
        try:
            self._ends_array.resize((len(self.ends) + 1,))
            self._ends_array[len(self.ends)] = end
            self._publish()
        except OSError as error:
            self.rollback()
            raise self._write_error(error) from error
        self.ends = np.append(self.ends, np.int64(end))
        self._uncommitted = 0
        return len(self.ends) - 1

    def rollback(self) -> None:
        """Forget the episode in progress."""
        store = self._store
        assert isinstance(store, CommitStore)
        store.forget()
        self._arrays = {name: self._open_array(f"data/{name}") for name in self._arrays}
        self._ends_array = self._open_array(ENDS)
        self._uncommitted = 0

    def set_attrs(self, attrs: Mapping[str, Any], *, publish: bool = True) -> None:
        """Replace the provenance (JSON values); ``publish=False`` leaves it to reach the disk with the next commit."""
        self._check_writable()
        root = zarr.open_group(self._store, mode="r+", zarr_format=self.zarr_format, use_consolidated=False)
        root.attrs.update({ROOT_KEY: _root_attributes(self.features, attrs)})
        self.attrs = dict(attrs)
        if publish and not self._uncommitted:
            self._publish()

    def _publish(self) -> None:
        assert isinstance(self._store, CommitStore)
        self._store.publish(last=ENDS)

    def _check_writable(self) -> None:
        if self._lock is None:
            raise DataError(f"'{self.path}' was opened to read; open it with mode='a' to append")

    def _write_error(self, error: OSError) -> DataError:
        return DataError(
            f"'{self.path}': cannot write ({error}); the {len(self)} committed episodes are intact, free some space and go on"
        )

    def _checked(self, block: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        if missing := set(self.features) - set(block):
            raise DataError(f"episode lacks feature '{min(missing)}'; give all of {', '.join(self.features)}")
        if extra := set(block) - set(self.features):
            raise DataError(f"episode has an undeclared feature '{min(extra)}'; {nearest(min(extra), self.features)}")
        values = {name: check_values(np.asarray(block[name]), feature) for name, feature in self.features.items()}
        lengths = {name: len(value) for name, value in values.items()}
        if len(set(lengths.values())) > 1:
            raise DataError(
                f"episode has features of different lengths ({', '.join(f'{k} {v}' for k, v in lengths.items())}); "
                "record all at each step"
            )
        if 0 in lengths.values():
            raise DataError("episode has no steps; record at least one")
        return values

    def close(self) -> None:
        """Release the write lock; an episode in progress is dropped. Reading goes on working."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> Episodes:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def check_values(value: np.ndarray, feature: Feature) -> np.ndarray:
    """``value [T, *shape]`` in the feature's dtype. Raises DataError when shape or kind differ or a number is not finite."""
    if value.ndim == 0 or value.shape[1:] != feature.shape:
        raise DataError(f"feature '{feature.name}': shape {value.shape}, expected (steps, {', '.join(map(str, feature.shape))})")
    dtype = np.dtype(feature.dtype)
    integers = value.dtype.kind in "iu" and dtype.kind in "iu"  # their range is checked below
    if not integers and not np.can_cast(value.dtype, dtype, "same_kind"):
        raise DataError(
            f"feature '{feature.name}': dtype {value.dtype} does not convert to {dtype} without loss; "
            "convert it where it is measured"
        )
    if value.dtype.kind == "f" and not np.isfinite(value).all():
        raise DataError(f"feature '{feature.name}': holds NaN or infinity; find out which sensor or command made it")
    if integers and value.size:
        bounds = np.iinfo(dtype)
        if value.min() < bounds.min or value.max() > bounds.max:
            raise DataError(
                f"feature '{feature.name}': values {value.min()}..{value.max()} do not fit {dtype}; declare a wider type"
            )
    return value.astype(dtype, copy=False)


def _root_attributes(features: Mapping[str, Feature], provenance: Mapping[str, Any]) -> dict[str, Any]:
    return {"schema": SCHEMA, "features": {n: f.to_json() for n, f in features.items()}, "provenance": dict(provenance)}


def _chunk_rows(feature: Feature) -> int:
    if feature.is_image:
        return IMAGE_CHUNK
    return int(np.clip(VECTOR_CHUNK_BYTES // (feature.size * np.dtype(feature.dtype).itemsize), 16, 4096))


def _create_array(root: Any, path: str, shape: tuple[int, ...], dtype: str, zarr_format: int, rows: int) -> None:
    arguments: dict[str, Any] = {"shape": (0, *shape), "chunks": (rows, *shape), "dtype": dtype, "fill_value": 0}
    if zarr_format == 2:
        blosc = {"id": "blosc", "cname": "zstd", "clevel": 5, "shuffle": 2, "blocksize": 0}  # 2: bit shuffle
        root.create_array(path, compressors=blosc, **arguments)
        return
    # The checksum notices bit rot, which Blosc does not; keys with dots spare a folder per chunk and axis.
    codecs = [BloscCodec(cname="zstd", clevel=5, shuffle="bitshuffle"), Crc32cCodec()]
    root.create_array(path, compressors=codecs, chunk_key_encoding={"name": "default", "separator": "."}, **arguments)
