"""Bags: what is written is read back, by rosbags and by us; one whose writer was killed is mended."""

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hardware.ros2.bagfile import BagError, BagWriter, Message, Storage, open_bag, repair, restamped

JOINT_STATE = "sensor_msgs/msg/JointState"
START = 1_700_000_000_000_000_000


@functools.cache
def typestore() -> Any:
    from rosbags.typesys import Stores, get_typestore

    return get_typestore(Stores.ROS2_KILTED)


def joint_state(stamp: int, positions: list[float]) -> bytes:
    store = typestore()
    types = store.types
    header = types["std_msgs/msg/Header"](
        stamp=types["builtin_interfaces/msg/Time"](sec=stamp // 10**9, nanosec=stamp % 10**9), frame_id="base"
    )
    message = types[JOINT_STATE](
        header=header, name=["a", "b"], position=np.array(positions, np.float64), velocity=np.zeros(2), effort=np.zeros(0)
    )
    return bytes(store.serialize_cdr(message, JOINT_STATE))


@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
def test_what_is_written_is_read_back(tmp_path: Path, storage: Storage) -> None:
    with BagWriter(tmp_path / "bag", storage) as writer:
        for k in range(300):
            writer.write(Message("/joint_states", JOINT_STATE, START + k * 10_000_000, joint_state(START + k, [k, -k])))
        writer.write(Message("/quiet", "std_msgs/msg/Bool", START + 5, b"\x00\x01\x00\x00\x01"))
    with open_bag(tmp_path / "bag") as bag:
        assert bag.counts == {"/joint_states": 300, "/quiet": 1}
        assert bag.seconds == pytest.approx(2.99, abs=1e-3)
        assert (bag.stamped("/joint_states"), bag.stamped("/quiet")) == (True, False)
        messages = list(bag.messages({"/joint_states"}))
        assert [m.came for m in messages] == [START + k * 10_000_000 for k in range(300)]
        read = bag.read(messages[7])
        assert read.position.tolist() == [7.0, -7.0]
        assert read.header.stamp.nanosec == 7
        assert bag.read(next(bag.messages({"/quiet"}))).data
    with pytest.raises(BagError, match="exists"):
        BagWriter(tmp_path / "bag", storage)


def test_stamps_are_shifted_in_the_serialised_message() -> None:
    store = typestore()
    data = joint_state(START, [1.0, 2.0])
    shifted = store.deserialize_cdr(restamped(data, 2_500_000_000), JOINT_STATE)
    assert (shifted.header.stamp.sec, shifted.header.stamp.nanosec) == (START // 10**9 + 2, 500_000_000)
    assert shifted.position.tolist() == [1.0, 2.0]
    assert restamped(joint_state(0, [1.0, 2.0]), 5) == joint_state(0, [1.0, 2.0])  # zero says: no stamp


KILLED = """
import sys, time
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
from test_bag import JOINT_STATE, START, joint_state
from hardware.ros2.bagfile import BagWriter, Message
data = joint_state(START, [1.0, 2.0])
with BagWriter({path!r}, {storage!r}) as writer:
    k = 0
    while True:
        writer.write(Message("/joint_states", JOINT_STATE, time.time_ns(), data))
        k += 1
        print(k, flush=True)
        time.sleep(0.002)
"""


@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
def test_a_bag_whose_writer_was_killed_is_mended_to_within_seconds_of_its_end(tmp_path: Path, storage: Storage) -> None:
    tests = Path(__file__).parent
    code = KILLED.format(root=str(tests.parent), tests=str(tests), path=str(tmp_path / "bag"), storage=storage)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "1\n"
    began, last = time.monotonic(), time.time_ns()
    while time.monotonic() - began < 2.5:
        process.stdout.readline()
        last = time.time_ns()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with pytest.raises(BagError, match="bag repair"), open_bag(tmp_path / "bag"):
        pass
    counts = repair(tmp_path / "bag", tmp_path / "mended")
    with open_bag(tmp_path / "mended") as bag:
        came = [m.came for m in bag.messages()]
    assert counts == {"/joint_states": len(came)}
    assert (last - came[-1]) * 1e-9 < 2.0  # flushed every second


def test_a_cut_mcap_keeps_its_whole_records(tmp_path: Path) -> None:
    data = joint_state(START, [0.0] * 30_000)
    with BagWriter(tmp_path / "bag") as writer:
        for k in range(20):
            writer.write(Message("/joint_states", JOINT_STATE, START + k, data))
    file = tmp_path / "bag" / "bag.mcap"
    content = file.read_bytes()
    cut = tmp_path / "cut.mcap"
    cut.write_bytes(content[: int(0.6 * len(content))])
    kept = repair(cut, tmp_path / "mended")["/joint_states"]
    assert 8 <= kept <= 12
    (tmp_path / "no.mcap").write_bytes(b"nonsense")
    with pytest.raises(BagError, match="no mcap file"):
        repair(tmp_path / "no.mcap", tmp_path / "other")


def test_a_missing_bag_is_told(tmp_path: Path) -> None:
    with pytest.raises(BagError, match="no bag at"), open_bag(tmp_path / "none"):
        pass
