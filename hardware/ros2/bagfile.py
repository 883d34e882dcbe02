"""Bags as rosbag2 writes them, mcap or sqlite3, read and written without ROS (package ``rosbags``).

What is written can be read by ``ros2 bag`` and the other way around. A recorder that is killed leaves a bag without its end;
everything up to a second before is in it, and :func:`repair` makes a whole bag of that.
"""

from __future__ import annotations

import itertools
import os
import queue
import shutil
import sqlite3
import statistics
import struct
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

from robopolicy.errors import RobopolicyError

Storage = Literal["mcap", "sqlite3"]
_FLUSH = 1.0  # [s] between what is safe and what is lost
_GARBAGE = 64  # bytes
_BLOCK = 1 << 20  # bytes
_MAGIC = b"\x89MCAP0\r\n"
_FOOTER = b"\x02" + struct.pack("<QQQI", 20, 0, 0, 0)  # without a summary: readers scan
_DATA_END = b"\x0f" + struct.pack("<QI", 4, 0)
_STAMPED = "std_msgs/msg/Header"


class BagError(RobopolicyError):
    """A bag cannot be read or written."""


class Message(NamedTuple):
    """One message of a bag.

    Attributes:
        topic: Full name.
        type: As ROS writes it: ``sensor_msgs/msg/JointState``.
        came: When it was recorded, nanoseconds of the wall clock.
        data: Serialised (CDR).
    """

    topic: str
    type: str
    came: int
    data: bytes


class Bag:
    """A bag that is open to read: :func:`open_bag`.

    Attributes:
        types: Type of each topic.
        counts: Messages of each topic.
        start, seconds: First message [ns of the wall clock], and how long it is.
    """

    def __init__(self, reader: Any) -> None:
        self._reader = reader
        self.types = {c.topic: str(c.msgtype) for c in reader.connections}
        self.counts: dict[str, int] = {}
        for connection in reader.connections:
            self.counts[connection.topic] = self.counts.get(connection.topic, 0) + connection.msgcount
        empty = sum(self.counts.values()) == 0
        self.start: int = 0 if empty else reader.start_time
        self.seconds: float = 0.0 if empty else reader.duration * 1e-9

    def messages(self, topics: set[str] | None = None) -> Iterator[Message]:
        """In the order in which they came. Raises BagError where the file is damaged."""
        wanted = [c for c in self._reader.connections if topics is None or c.topic in topics]
        if not wanted:
            return
        try:
            for connection, came, data in self._reader.messages(wanted):
                yield Message(connection.topic, connection.msgtype, came, bytes(data))
        except Exception as error:  # of the reader, its codecs and the storage
            raise BagError(f"bag is damaged ({_line(error)}); `robopolicy bag repair` keeps what is whole") from error

    def read(self, message: Message) -> Any:
        """Its fields, as attributes. Raises BagError."""
        data = message.data
        while True:
            try:
                return self._reader.deserialize(data, message.type)
            except Exception as error:
                # rclpy leaves garbage behind messages with empty sequences, which rosbags takes for a mistake.
                if "size mismatch" in str(error) and len(message.data) - len(data) < _GARBAGE:
                    data = data[:-4]
                    continue
                raise BagError(f"a message of '{message.topic}' does not parse as {message.type} ({_line(error)})") from error

    def stamped(self, topic: str) -> bool:
        """Whether its messages begin with a header."""
        fields = self._reader.typestore.fielddefs[self.types[topic]][1]
        return bool(fields) and fields[0][1][1] == _STAMPED


@contextmanager
def open_bag(path: str | Path) -> Iterator[Bag]:
    """A folder with ``metadata.yaml``, or a single ``.mcap`` or ``.db3``. Raises BagError that says what helps."""
    rosbags = _rosbags()
    path = Path(path)
    if not path.exists():
        raise BagError(f"no bag at '{path}'; record one with `robopolicy bag record`")
    with ExitStack() as stack:
        try:
            stores = rosbags.typesys
            reader = rosbags.AnyReader([path], default_typestore=stores.get_typestore(stores.Stores.ROS2_KILTED))
            bag = Bag(stack.enter_context(reader))
        except Exception as error:
            mend = "it was not closed" if path.is_dir() and not (path / "metadata.yaml").exists() else f"{_line(error)}"
            raise BagError(f"'{path}' cannot be read: {mend}; try `robopolicy bag repair {path} --out NEW`") from error
        yield bag


class Described(NamedTuple):
    """One topic.

    Attributes:
        messages: How many.
        rate: Mean [Hz].
        gap: Longest time between two [s].
        age: Median of arrival less header stamp [s]; None where there is no stamp. Far from a few ms: clocks disagree.
    """

    messages: int
    rate: float
    gap: float
    age: float | None


def describe(bag: Bag) -> dict[str, Described]:
    """What comes on each topic. Reads the whole bag."""
    came: dict[str, list[int]] = {name: [] for name in bag.types}
    ages: dict[str, list[float]] = {name: [] for name in bag.types}
    stamped = {name for name in bag.types if bag.stamped(name)}
    for message in bag.messages():
        came[message.topic].append(message.came)
        if message.topic in stamped and (stamp := stamp_of(message.data)):
            ages[message.topic].append((message.came - stamp) * 1e-9)
    found = {}
    for name, times in came.items():
        span = (times[-1] - times[0]) * 1e-9 if len(times) > 1 else 0.0
        gap = max((b - a for a, b in itertools.pairwise(times)), default=0) * 1e-9
        age = statistics.median(ages[name]) if ages[name] else None
        found[name] = Described(len(times), (len(times) - 1) / span if span > 0 else 0.0, gap, age)
    return found


class BagWriter:
    """Writes a bag in a thread of its own. A context manager.

    Args:
        path: A folder that does not exist.
        storage: Of the file.
        reserve: Free space [MB] at which writing ends while the bag can still be closed.

    Raises:
        BagError: From the constructor when the path exists; from :meth:`write` when writing has failed.
    """

    def __init__(self, path: str | Path, storage: Storage = "mcap", reserve: float = 100.0) -> None:
        rosbags = _rosbags()
        self.path, self._reserve = Path(path), reserve
        if self.path.exists():
            raise BagError(f"'{path}' exists; record to another path, nothing is overwritten")
        self._stores = rosbags.typesys
        self._types = self._stores.get_typestore(self._stores.Stores.ROS2_KILTED)
        self._writer = rosbags.Writer(self.path, version=9, storage_plugin=rosbags.StoragePlugin[storage.upper()])
        self._storage: Storage = storage
        self._connections: dict[str, Any] = {}
        self._queue: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self.counts: dict[str, int] = {}
        self.error: BagError | None = None
        self._unclosed: BagError | None = None
        self._opened = threading.Event()
        self._thread = threading.Thread(target=self._work, name="bag", daemon=True)

    def knows(self, type_: str) -> bool:
        """Whether messages of a type can be described, which a bag needs."""
        return type_ in self._types.fielddefs

    def write(self, message: Message) -> None:
        """Hand over a message; never waits."""
        if self.error is not None:
            raise self.error
        self._queue.put(message)

    def __enter__(self) -> Self:
        self._thread.start()
        self._opened.wait()
        if self.error is not None:
            raise self.error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._queue.put(None)
        self._thread.join()
        if self._unclosed is not None and self.error is None and kind is None:
            raise self._unclosed

    def _work(self) -> None:
        """The thread: the only one that touches the bag, as sqlite wants it."""
        try:
            self._writer.open()
        except OSError as error:
            self.error = BagError(f"'{self.path}' cannot be made ({error}); mend the path or its permissions")
            return
        finally:
            self._opened.set()
        try:
            flushed, fresh = time.monotonic(), False
            while True:
                with suppress(queue.Empty):  # also when nothing comes any more, what came is brought to the file
                    if (message := self._queue.get(timeout=_FLUSH)) is None:
                        break
                    self._put(message)
                    fresh = True
                if fresh and time.monotonic() - flushed > _FLUSH:
                    self._flush()
                    flushed, fresh = time.monotonic(), False
        except Exception as error:  # kept for the one who writes
            self.error = BagError(f"'{self.path}': {_line(error)}")
        try:
            self._writer.close()  # also after an error: what is there is closed where there is still room
        except Exception as error:
            text = f"'{self.path}' cannot be closed ({_line(error)}); make room, then `robopolicy bag repair`"
            self._unclosed = BagError(text)

    def _put(self, message: Message) -> None:
        connection = self._connections.get(message.topic)
        if connection is None:
            connection = self._writer.add_connection(message.topic, message.type, typestore=self._types)
            self._connections[message.topic] = connection
        self._writer.write(connection, message.came, message.data)
        self.counts[message.topic] = self.counts.get(message.topic, 0) + 1

    def _flush(self) -> None:
        """Bring what was written to the file. rosbags offers no way, so this reaches into its storages (0.11)."""
        if shutil.disk_usage(self.path).free < self._reserve * 1e6:
            raise BagError(f"less than {self._reserve:g} MB are free")
        storage = self._writer.storage
        if self._storage == "sqlite3":
            storage.conn.commit()
            return
        if storage.chunk.msgs:
            storage.close_chunk()
        storage.bio.flush()


def repair(path: str | Path, out: str | Path) -> dict[str, int]:
    """Write what is whole in a bag that was not closed, or in its files, into a new one; messages of each topic.

    Raises:
        BagError: Nothing can be read, or ``out`` exists.
    """
    path = Path(path)
    files = sorted(f for f in path.iterdir() if f.suffix in (".mcap", ".db3")) if path.is_dir() else [path]
    if not files or not path.exists():
        raise BagError(f"'{path}' holds no .mcap and no .db3; give the bag's folder, or one of its files")
    with tempfile.TemporaryDirectory(prefix="bag_") as folder, BagWriter(out, reserve=0.0) as writer:
        for file in files:
            mended = Path(folder, file.name)
            (_mend_mcap if file.suffix == ".mcap" else _mend_sqlite)(file, mended)
            with open_bag(mended) as bag:
                for message in bag.messages():
                    writer.write(message)
            mended.unlink()
    if writer.error is not None:
        raise writer.error
    return writer.counts


def _mend_mcap(path: Path, out: Path) -> None:
    """All whole records, and an end."""
    size = path.stat().st_size
    end = len(_MAGIC)
    with path.open("rb") as file:
        if file.read(end) != _MAGIC:
            raise BagError(f"'{path}' is no mcap file")
        while len(head := file.read(9)) == 9 and head[0] not in (0x02, 0x0F):  # footer, end of data
            following = file.tell() + struct.unpack("<Q", head[1:])[0]
            if following > size:
                break
            end = file.seek(following)
        file.seek(0)
        with out.open("wb") as target:
            for at in range(0, end, _BLOCK):
                target.write(file.read(min(_BLOCK, end - at)))
            target.write(_DATA_END + _FOOTER + _MAGIC)


def _mend_sqlite(path: Path, out: Path) -> None:
    """A copy, from which sqlite itself takes back the transaction that was under way."""
    for suffix in ("", "-journal", "-wal"):
        if (part := path.with_name(path.name + suffix)).exists():
            shutil.copyfile(part, out.with_name(out.name + suffix))
    try:
        with sqlite3.connect(out) as connection:
            connection.execute("SELECT count(*) FROM messages").fetchone()
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.close()
    except sqlite3.Error as error:
        raise BagError(f"'{path}' cannot be mended ({error})") from error


class _Rosbags(NamedTuple):
    AnyReader: Any
    Writer: Any
    StoragePlugin: Any
    typesys: Any


def _rosbags() -> _Rosbags:
    try:
        from rosbags import typesys
        from rosbags.highlevel import AnyReader
        from rosbags.rosbag2 import StoragePlugin, Writer
    except ImportError as error:
        raise BagError(
            f"bags need the package rosbags ({error}); run `make setup` in the checkout, or install rosbags alone"
        ) from error
    return _Rosbags(AnyReader, Writer, StoragePlugin, typesys)


def stamp_of(data: bytes) -> int:
    """The stamp [ns] of a serialised message that begins with a header; 0: none."""
    sec, nanosec = struct.unpack_from("<iI" if data[1] & 1 else ">iI", data, 4)
    return int(sec * 1_000_000_000 + nanosec)


def restamped(data: bytes, shift: int) -> bytes:
    """The same, its stamp ``shift`` nanoseconds later; zero stamps stay zero."""
    if (stamp := stamp_of(data)) == 0:
        return data
    order, total = "<" if data[1] & 1 else ">", stamp + shift
    return data[:4] + struct.pack(f"{order}iI", total // 1_000_000_000, total % 1_000_000_000) + data[12:]


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def size_of(path: Path) -> int:
    """Bytes of a bag."""
    return sum(f.stat().st_size for f in path.rglob("*")) if path.is_dir() else os.path.getsize(path)
