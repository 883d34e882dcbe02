"""Crash-safe files under a zarr hierarchy.

The commit protocol of a store directory rests on two facts. A chunk or metadata file is only ever replaced by an atomic rename of
a complete, synced file; and rows of a chunk beyond the shape in the metadata do not exist for any reader. So a writer first
writes all chunks of an episode (they lie beyond the published shape), then publishes the shapes of ``data/*``, and last the shape
of ``meta/episode_ends``: that one rename is the commit. Killed at any instant before it, the store is what it was.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import weakref
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Protocol, Self

from zarr.abc.store import ByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import LocalStore, WrapperStore, ZipStore

from robopolicy.errors import DataError

METADATA = (".zarray", ".zattrs", ".zgroup", "zarr.json")
TEMPORARY = ".partial"  # suffix of files being written; zarr's own store uses the same


def is_zip(path: Path) -> bool:
    return path.suffix == ".zip"


def sync_path(path: Path) -> None:
    """Make the contents of a file, or the renames inside a directory, survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Write a file that appears at ``path`` complete and synced, or not at all. The caller syncs the directory."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_file(path: Path, content: Any) -> None:
    with replacing(path) as file:
        file.write(content)


class GuardedStore(WrapperStore[Store]):
    """A zarr store that refuses truncated Blosc chunks, past whose end the codec would read foreign memory.

    Args:
        store: The store behind.
        blosc: Paths of the arrays whose chunks are Blosc containers.
    """

    def __init__(self, store: Store, blosc: frozenset[str] = frozenset()) -> None:
        super().__init__(store)
        self._blosc = blosc

    def _with_store(self, store: Store) -> Self:
        return type(self)(store, self._blosc)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        value = await super().get(key, prototype, byte_range)
        whole_chunk = value is not None and byte_range is None and PurePosixPath(key).name not in METADATA
        if value is not None and whole_chunk and any(key.startswith(f"{path}/") for path in self._blosc):
            said = int.from_bytes(value[12:16].to_bytes(), "little")  # bytes of the whole container, in its header
            if len(value) < 16 or said != len(value):
                raise DataError(f"chunk '{key}' has {len(value)} bytes, its header says {said}")
        return value


class CommitStore(GuardedStore):
    """A local zarr store that writes chunks at once and holds metadata back until :meth:`publish`.

    Until then this process sees the new shapes and every other process the published ones.
    """

    def __init__(self, root: Path, blosc: frozenset[str] = frozenset()) -> None:
        super().__init__(LocalStore(root), blosc)
        self._root = root
        self._pending: dict[str, bytes] = {}
        self._touched: set[Path] = set()

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        if byte_range is None and key in self._pending:
            return prototype.buffer.from_bytes(self._pending[key])
        return await super().get(key, prototype, byte_range)

    async def exists(self, key: str) -> bool:
        return key in self._pending or await super().exists(key)

    async def set(self, key: str, value: Buffer) -> None:
        if PurePosixPath(key).name in METADATA:
            self._pending[key] = value.to_bytes()
        else:
            self._write(key, value.as_buffer_like())

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        if not await self.exists(key):
            await self.set(key, value)

    def _write(self, key: str, content: Any) -> None:
        path = self._root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, content)
        self._touched.add(path.parent)

    def publish(self, last: str) -> None:
        """Write the metadata held back, that under the prefix ``last`` at the very end. Raises OSError (full disk).

        Everything before is on the disk, names included, before ``last`` is touched; power may fail at any instant, too.
        """
        for key in [key for key in self._pending if not key.startswith(last)]:
            self._replace(key)
        self._sync()
        for key in [key for key in self._pending if key.startswith(last)]:
            self._replace(key)
        self._sync()
        self._pending.clear()

    def _replace(self, key: str) -> None:
        path = self._root / key
        if not path.exists() or path.read_bytes() != self._pending[key]:  # zarr hands over what it did not change, too
            self._write(key, self._pending[key])

    def _sync(self) -> None:
        for directory in self._touched:
            sync_path(directory)
        self._touched.clear()

    def forget(self) -> None:
        """Drop the metadata held back: the published shapes hold again."""
        self._pending.clear()


class Files(Protocol):
    """Plain read access to the files of a store, without interpreting them."""

    path: Path

    def read(self, key: str) -> bytes | None:
        """Content of a file, None when it is absent. Raises DataError when it cannot be read."""
        ...

    def children(self, prefix: str) -> list[str]:
        """Names of the files and folders directly under ``prefix``, sorted."""
        ...

    def walk(self, prefix: str) -> Iterator[tuple[str, int, int]]:
        """All files under ``prefix`` with size [bytes] and a fingerprint that changes with the content."""
        ...

    def zarr_store(self, blosc: frozenset[str]) -> Store:
        """A read-only zarr store on the same files; ``blosc`` as in :class:`GuardedStore`."""
        ...


class DirectoryFiles:
    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, key: str) -> bytes | None:
        try:
            return (self.path / key).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise DataError(
                f"{self.path}: file '{key}' cannot be read ({error}); mend its permissions or restore a copy"
            ) from error

    def children(self, prefix: str) -> list[str]:
        folder = self.path / prefix
        return sorted(os.listdir(folder)) if folder.is_dir() else []

    def walk(self, prefix: str) -> Iterator[tuple[str, int, int]]:
        for folder, _, names in os.walk(self.path / prefix):
            for name in names:
                path = Path(folder, name)
                with contextlib.suppress(FileNotFoundError):  # a writer's temporary file may vanish under us
                    status = path.stat()
                    yield path.relative_to(self.path).as_posix(), status.st_size, status.st_mtime_ns

    def zarr_store(self, blosc: frozenset[str]) -> Store:
        return GuardedStore(LocalStore(self.path, read_only=True), blosc)


class ZipFiles:
    """Files of a zip archive; refuses archives whose names lead outside, which no honest writer makes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._zip = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError, EOFError) as error:
            raise DataError(f"{path}: not a readable zip archive ({error}); copy it again or restore a backup") from error
        self._entries = {info.filename: info for info in self._zip.infolist() if not info.is_dir()}
        for name in self._entries:
            parts = PurePosixPath(name.replace("\\", "/"))
            if parts.is_absolute() or ".." in parts.parts or ":" in parts.parts[0]:
                raise DataError(
                    f"{path}: zip entry '{name}' leads outside the archive; do not use this file, ask its author for a clean one"
                )

    def read(self, key: str) -> bytes | None:
        if key not in self._entries:
            return None
        try:
            return self._zip.read(key)
        except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError) as error:
            raise DataError(
                f"{self.path}: zip entry '{key}' is damaged ({error}); copy the archive again or run `robopolicy data repair`"
            ) from error

    def children(self, prefix: str) -> list[str]:
        depth = len(PurePosixPath(prefix).parts) if prefix else 0
        inside = (PurePosixPath(name).parts for name in self._entries if not prefix or name.startswith(prefix + "/"))
        return sorted({parts[depth] for parts in inside})

    def walk(self, prefix: str) -> Iterator[tuple[str, int, int]]:
        for name, info in self._entries.items():
            if not prefix or name.startswith(prefix + "/"):
                yield name, info.file_size, info.CRC

    def zarr_store(self, blosc: frozenset[str]) -> Store:
        return GuardedStore(ZipStore(self.path, mode="r", read_only=True), blosc)


def open_files(path: Path) -> Files:
    """The files behind a store path. Raises DataError when there is no store there."""
    if not path.exists():
        raise DataError(f"no dataset at '{path}'; check the path, or record one with `robopolicy data demos`")
    if path.is_dir():
        return DirectoryFiles(path)
    if zipfile.is_zipfile(path) or is_zip(path):
        return ZipFiles(path)
    raise DataError(f"'{path}' is a file and no zip archive; expected a zarr directory or a .zip of one")


class WriteLock:
    """Advisory lock on a store directory; vanishes with its process, however that dies."""

    def __init__(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise DataError(
                f"'{path}' is being written by another process; wait for it to finish, or record to another path"
            ) from error

        self._close = weakref.finalize(self, os.close, descriptor)

    def release(self) -> None:
        self._close()


def check_absent(path: Path) -> None:
    """Raises DataError when ``path`` exists: nothing here overwrites data."""
    if path.exists():
        raise DataError(f"'{path}' already exists; choose another path, or delete it first")


@contextlib.contextmanager
def building(path: Path) -> Iterator[Path]:
    """A fresh directory that becomes ``path`` (a directory, or a zip when it ends so) only when the block succeeds."""
    check_absent(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.building")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        yield temporary
        if is_zip(path):
            pack(temporary, path)
        else:
            temporary.rename(path)
            sync_path(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def pack(source: Path, target: Path) -> None:
    """Put a store directory into an uncompressed zip (chunks are compressed already) that appears complete or not at all."""
    check_absent(target)
    with replacing(target) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(p for p in source.rglob("*") if p.is_file() and p.suffix != TEMPORARY):
            archive.write(path, path.relative_to(source).as_posix())
    sync_path(target.parent)
