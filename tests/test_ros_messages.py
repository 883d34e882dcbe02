"""Messages, slots and the runtime: every way in which what comes from a driver can be wrong, and what is made of it."""

import array
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hardware.ros2 import messages, runtime
from hardware.ros2.inputs import Decoder, Slot, with_origin
from hardware.ros2.messages import JointReader, Rejected, read_image, read_pose
from hardware.ros2.profile import Input, Joints
from hardware.ros2.runtime import Ros, RosClock, RosError

ROOT = Path(__file__).resolve().parents[1]
CLOCK = RosClock()
FINGERS = {
    "a": Joints(names=("ja",)),
    "b": Joints(names=("jb",)),
    "width": Joints(names=("left", "right"), scale=2.0, offset=0.5),
}


def state(names: list[str], positions: list[float], velocities: list[float] | None = None, stamp: Any = None) -> Any:
    rate = None if velocities is None else np.array(velocities)
    return messages.joint_state(names, np.array(positions), rate, CLOCK.stamp() if stamp is None else stamp)


# ---- joint states --------------------------------------------------------------------------------------------------------------


def test_joints_are_matched_by_name_whatever_their_order_and_others_are_ignored() -> None:
    read = JointReader(FINGERS)
    positions, velocities = read(
        state(["right", "wheel", "jb", "ja", "left"], [0.2, 9.0, 2.0, 1.0, 0.1], [4.0, 9.0, 2.0, 1.0, 3.0])
    )
    np.testing.assert_allclose(positions, [1.0, 2.0, 0.5 + 2.0 * 0.3])
    np.testing.assert_allclose(velocities, [1.0, 2.0, 14.0])
    positions, velocities = read(state(["ja", "jb", "left", "right"], [1.0, 2.0, 0.0, 0.0]))  # the order changes on the way
    np.testing.assert_allclose(positions, [1.0, 2.0, 0.5])
    assert velocities is None


@pytest.mark.parametrize(
    ("message", "kind", "detail"),
    [
        (state(["ja", "left", "right"], [1, 2, 3]), "names", "jb missing; found ja, left, right"),
        (state([], []), "names", "found none"),
        (state(["ja", "jb", "left", "right", "ja"], [1, 2, 3, 4, 5]), "names", "twice"),
        (state(["ja", "jb", "left", "right"], [1, 2, 3]), "length", "3 positions for 4 names"),
        (state(["ja", "jb", "left", "right"], [1, 2, 3, 4], [1, 2]), "length", "2 velocities for 4 names"),
        (state(["ja", "jb", "left", "right"], [1, np.nan, 3, 4]), "not_finite", "jb"),
        (state(["ja", "jb", "left", "right"], [1, 2, 3, np.inf]), "not_finite", "right"),
    ],
)
def test_joint_states_that_cannot_be_trusted_are_refused_with_the_reason(message: Any, kind: str, detail: str) -> None:
    with pytest.raises(Rejected, match=re.escape(detail)) as raised:
        JointReader(FINGERS)(message)
    assert raised.value.kind == kind


def test_nan_where_it_is_nobodys_does_not_matter() -> None:
    """joint_state_broadcaster writes NaN for interfaces that the hardware lacks."""
    read = JointReader({"a": Joints(names=("ja",))})
    positions, velocities = read(state(["ja", "passive"], [1.0, np.nan], [np.nan, np.nan]))
    assert positions[0] == 1.0
    assert velocities is None


# ---- images and poses ----------------------------------------------------------------------------------------------------------

PICTURE = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)


@pytest.mark.parametrize("encoding", ["rgb8", "bgr8", "mono8"])
def test_images_come_back_as_they_were_sent(encoding: Any) -> None:
    message = messages.image(PICTURE, CLOCK.stamp(), "eye", encoding)
    found = read_image(message, Input(type="image", topic="t", encoding=encoding, size=(12, 16)))
    if encoding == "mono8":
        assert (found[..., 0] == found[..., 1]).all()
        assert np.abs(found[..., 0].astype(int) - PICTURE @ [0.299, 0.587, 0.114]).max() <= 1
    else:
        np.testing.assert_array_equal(found, PICTURE)


def test_rows_may_be_padded() -> None:
    message = messages.image(PICTURE, CLOCK.stamp())
    message.step = 16 * 3 + 5
    padded = np.zeros((12, message.step), np.uint8)
    padded[:, : 16 * 3] = PICTURE.reshape(12, -1)
    message.data = array.array("B", padded.tobytes())
    np.testing.assert_array_equal(read_image(message, Input(type="image", topic="t")), PICTURE)


def test_compressed_pictures_are_rgb_and_may_be_resized() -> None:
    smooth = np.zeros((40, 60, 3), np.uint8)
    smooth[:, :, 0] = 200  # red
    message = messages.compressed(smooth, CLOCK.stamp())
    found = read_image(message, Input(type="compressed", topic="t", size=(40, 60), resize=(20, 30)))
    assert found.shape == (20, 30, 3)
    assert np.abs(found.astype(int).mean((0, 1)) - [200, 0, 0]).max() < 4


def broken(**changes: Any) -> Any:
    message = messages.image(PICTURE, CLOCK.stamp())
    for name, value in changes.items():
        setattr(message, name, value)
    return message


@pytest.mark.parametrize(
    ("message", "source", "kind"),
    [
        (broken(), {"type": "image", "encoding": "bgr8"}, "encoding"),
        (broken(), {"type": "image", "size": (16, 12)}, "size"),
        (broken(height=13), {"type": "image"}, "length"),
        (broken(step=10), {"type": "image"}, "length"),
        (broken(height=0, width=0, data=array.array("B")), {"type": "image"}, "length"),
        (SimpleNamespace(data=b"no picture", format="jpeg"), {"type": "compressed"}, "length"),
        (SimpleNamespace(data=b"", format="jpeg"), {"type": "compressed"}, "length"),
    ],
)
def test_pictures_that_are_not_what_was_declared_are_refused(message: Any, source: dict[str, Any], kind: str) -> None:
    with pytest.raises(Rejected) as raised:
        read_image(message, Input(topic="t", **source))
    assert raised.value.kind == kind


def test_a_large_picture_becomes_a_message_and_back_in_milliseconds() -> None:
    """An ndarray given to ``msg.data`` costs 115 ms and more."""
    picture = np.zeros((480, 640, 3), np.uint8)

    def once() -> float:
        begin = time.perf_counter()
        read_image(messages.image(picture, CLOCK.stamp()), Input(type="image", topic="t"))
        return time.perf_counter() - begin

    assert min(once() for _ in range(10)) < 0.005


def test_poses_are_checked() -> None:
    good = messages.pose(np.array([1.0, 2.0, 3.0]), np.array([0.0, 0.0, 0.6, 0.8]), CLOCK.stamp(), "world")
    np.testing.assert_array_equal(read_pose(good, "world"), [1, 2, 3, 0, 0, 0.6, 0.8])
    with pytest.raises(Rejected, match="expected 'base'"):
        read_pose(good, "base")
    with pytest.raises(Rejected, match="norm 0"):
        read_pose(messages.pose(np.zeros(3), np.zeros(4), CLOCK.stamp(), "world"))
    with pytest.raises(Rejected, match="not_finite"):
        read_pose(messages.pose(np.array([0, np.nan, 0]), np.array([0, 0, 0, 1.0]), CLOCK.stamp(), "world"))


def test_a_trajectory_starts_now_and_has_no_velocities() -> None:
    """A stamp whose end is past is refused, and so is a last point that moves."""
    message = messages.trajectory(["a", "b"], np.array([1.0, 2.0]), 1.25)
    assert (message.header.stamp.sec, message.header.stamp.nanosec) == (0, 0)
    (point,) = message.points
    assert list(message.joint_names) == ["a", "b"]
    assert list(point.positions) == [1.0, 2.0]
    assert len(point.velocities) == 0
    assert (point.time_from_start.sec, point.time_from_start.nanosec) == (1, 250_000_000)


# ---- slots ---------------------------------------------------------------------------------------------------------------------


def slot() -> Slot[Any]:
    return Slot("state", CLOCK, JointReader({"a": Joints(names=("ja",))}))


def at(seconds: float, value: float = 0.0) -> Any:
    """A joint state whose stamp is so far from now."""
    return state(["ja"], [value], stamp=CLOCK.stamp(CLOCK.now() + seconds))


def test_a_slot_keeps_the_newest_and_when_it_was_made() -> None:
    inputs = slot()
    assert inputs.age(CLOCK.now()) == np.inf
    inputs.take(at(-0.2, 1.0))
    inputs.take(at(-0.1, 2.0))
    assert inputs.latest is not None
    assert inputs.latest.value[0] == 2.0
    assert inputs.latest.number == 2
    assert 0.09 < inputs.age(CLOCK.now()) < 5.0  # of the stamp, not of the arrival
    assert inputs.latest.stamp.made is not None
    assert inputs.latest.stamp.came > inputs.latest.stamp.made


def test_overtaken_and_repeated_messages_are_refused_and_counted() -> None:
    inputs, newest = slot(), at(-0.1, 1.0)
    inputs.take(newest)
    inputs.take(newest)
    inputs.take(at(-0.3, 2.0))
    assert inputs.rejected == {"duplicate": 1, "out_of_order": 1}
    assert inputs.latest is not None
    assert inputs.latest.value[0] == 1.0
    assert "before the one" in inputs.last_rejection


def test_a_source_whose_clock_was_set_back_is_heard_again() -> None:
    """Otherwise one stamp from the future would silence it for ever; old stamps are for the safety filter to judge."""
    inputs = slot()
    inputs.take(at(3600.0, 1.0))
    inputs.take(at(0.0, 2.0))
    assert inputs.latest is not None
    assert inputs.latest.value[0] == 2.0
    assert inputs.rejected == {"clock_set": 1}


def test_nan_does_not_enter_so_what_is_there_grows_old() -> None:
    inputs = slot()
    inputs.take(at(-0.01, 1.0))
    for _ in range(20):
        inputs.take(at(0.0, np.nan))
    assert inputs.rejected["not_finite"] == 20
    assert inputs.latest is not None
    assert inputs.latest.value[0] == 1.0
    assert inputs.age(CLOCK.now() + 1.0) > 1.0


def test_drivers_without_stamps_are_judged_by_arrival() -> None:
    inputs = slot()
    message = at(0.0)
    message.header.stamp.sec = message.header.stamp.nanosec = 0
    inputs.take(message)
    inputs.take(message)
    assert inputs.latest is not None
    assert inputs.latest.number == 2
    assert inputs.latest.stamp.made is None
    assert inputs.age(inputs.latest.stamp.came + 0.5) == pytest.approx(0.5)


def test_refusals_count_while_they_come_and_nothing_else_does() -> None:
    inputs, first, second = slot(), at(0.1), at(0.2)
    inputs.accept(first, came=10.0)
    assert inputs.refusing(10.0) == ""
    inputs.accept(first, came=10.1)
    assert inputs.refusing(10.2) == "duplicate: the same stamp again"
    assert inputs.refusing(12.0) == "", "the driver has ended since"
    inputs.accept(second, came=10.3)
    assert inputs.refusing(10.4) == ""


def test_publishers_side_by_side_are_told_from_one_that_takes_over() -> None:
    inputs = slot()

    def hear(*heard: tuple[bytes, float], joint: str = "ja") -> list[bytes]:
        for origin, came in heard:
            inputs.accept(state([joint], [0.0], stamp=CLOCK.stamp(CLOCK.now())), came, origin)
        return inputs.origins(heard[-1][1])

    assert hear((b"a", 100.0), (b"a", 100.1)) == [b"a"]
    assert hear((b"other joints", 100.15), joint="jb") == [b"a"]
    assert hear((b"b", 100.2), (b"b", 100.3)) == [b"b"]  # a driver that was started again
    assert sorted(hear((b"a", 100.35), (b"b", 100.4))) == [b"a", b"b"]
    assert hear((b"b", 101.3), (b"b", 101.5)) == [b"b"]
    assert inputs.origins(110.0) == []


def test_the_same_to_the_bit_again_and_again_is_told_from_what_moves_by_one() -> None:
    picture = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)
    noisy = picture.copy()
    noisy[7, 8, 0] ^= 1
    given = [picture] * 5 + [noisy] + [noisy.copy() for _ in range(3)]
    inputs: Slot[Any] = Slot("front", CLOCK, lambda message: message.picture, compared=True)
    blind: Slot[Any] = Slot("front", CLOCK, lambda message: message.picture)
    found = []
    for k, one in enumerate(given):
        for slot_ in (inputs, blind):
            slot_.accept(SimpleNamespace(picture=one), 10.0 + k)
        found.append(inputs.unchanged)
    assert found == [0, 1, 2, 3, 4, 0, 1, 2, 3]
    assert blind.unchanged == 0.0


def test_a_driver_that_hands_out_its_old_buffers_in_turn_says_nothing_new() -> None:
    buffers = np.random.default_rng(0).integers(0, 255, (4, 48, 64, 3), np.uint8)
    inputs: Slot[Any] = Slot("front", CLOCK, lambda message: message.picture, compared=True)
    found = []
    for k, index in enumerate([0, 1, 2, 0, 1, 2, 0, 1, 3, 0]):
        inputs.accept(SimpleNamespace(picture=buffers[index].copy()), 10.0 + k)
        found.append(inputs.unchanged)
    assert found == [0, 0, 0, 1, 2, 3, 4, 5, 0, 0]


@pytest.mark.parametrize("given", [("m", {"publisher_gid": {"data": b"ab"}}), (("m", {"publisher_gid": {"data": b"ab"}}),)])
def test_whoever_hands_over_a_message_its_origin_is_found(given: tuple[Any, ...]) -> None:
    seen: list[Any] = []
    take = with_origin(lambda message, origin: seen.append((message, origin)))
    take(*given)
    take("of a bag")
    take("of an old rclpy", {"source_timestamp": 1})
    assert seen == [("m", b"ab"), ("of a bag", None), ("of an old rclpy", None)]


def test_rates_are_of_arrivals() -> None:
    inputs = slot()
    for k in range(60):
        inputs.accept(at(k * 1e-3), came=100.0 + 0.02 * k)
    assert inputs.rate == pytest.approx(50.0)


def test_pictures_are_decoded_elsewhere_and_only_the_newest() -> None:
    seen: list[Any] = []

    def read(message: Any) -> Any:
        time.sleep(0.05)
        seen.append(message)
        return message

    inputs: Slot[Any] = Slot("eye", CLOCK, read)
    decoder = Decoder(CLOCK)
    take = decoder.callback(inputs)
    begin = time.monotonic()
    for k in range(100):
        take(SimpleNamespace(number=k), b"one")
    assert time.monotonic() - begin < 0.05 * 50  # 100 decoded ones would take 5 s
    end = time.monotonic() + 10.0
    while not seen or seen[-1].number != 99:
        assert time.monotonic() < end
        time.sleep(0.01)
    decoder.close()
    assert len(seen) < 50
    assert inputs.origins(CLOCK.now()) == [b"one"]


# ---- clock ---------------------------------------------------------------------------------------------------------------------


def test_stamps_are_converted_and_survive_a_wall_clock_that_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = RosClock()
    moment = clock.now() - 2.0
    assert clock.made(clock.stamp(moment)) == pytest.approx(moment, abs=1.0)
    true = time.time_ns
    monkeypatch.setattr(runtime.time, "time_ns", lambda: true() - 3_600_000_000_000)  # the machine's clock was an hour ahead
    made = clock.made(clock.stamp())
    assert made is not None
    assert abs(clock.now() - made) < 1.0


# ---- runtime -------------------------------------------------------------------------------------------------------------------


def test_nothing_but_hardware_ros2_imports_rclpy_and_importing_that_does_not_either() -> None:
    wrong = [
        path
        for package in ("robopolicy", "sim")
        for path in (ROOT / package).rglob("*.py")
        if re.search(r"^\s*(import|from) (rclpy|\w+_msgs|std_srvs)", path.read_text(), re.MULTILINE)
    ]
    assert wrong == []
    modules = [
        "contract",
        "inputs",
        "joints",
        "kinematics",
        "messages",
        "outputs",
        "own",
        "profile",
        "robot",
        "runtime",
        "services",
    ]
    code = f"import sys; from hardware.ros2 import {', '.join(modules)}; sys.exit('rclpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_nobody_spins_an_events_executor_without_a_timeout() -> None:
    """``EventsExecutor.spin()`` never dispatches anything, and ignores signals."""
    for path in (ROOT / "hardware").rglob("*.py"):
        assert not re.search(r"executor\.spin\(|rclpy\.spin\(|spin_once\(\)|MultiThreadedExecutor\(", path.read_text()), path


def test_without_rclpy_there_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rclpy", None)
    with pytest.raises(RosError, match="run `make setup`"):
        runtime.require()


def test_the_mend_depends_on_what_is_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    error = ImportError("No module named 'rclpy'")
    monkeypatch.delenv("ROS_DISTRO", raising=False)
    monkeypatch.setattr(runtime.importlib.util, "find_spec", lambda name: None)
    assert "make setup" in runtime._mend(error, tmp_path)
    (tmp_path / "humble").mkdir()
    (tmp_path / "humble" / "setup.bash").touch()
    told = runtime._mend(error, tmp_path)
    assert re.match(r"ROS humble is installed, but .* Python 3\.10 .*; docs/virtual_arm\.md#with-a-ros-installation", told)
    (tmp_path / "jazzy").mkdir()
    (tmp_path / "jazzy" / "setup.bash").touch()
    assert f"source {tmp_path}/jazzy/setup.bash" in runtime._mend(error, tmp_path)
    monkeypatch.setenv("ROS_DISTRO", "jazzy")
    assert "--system-site-packages" in runtime._mend(error, tmp_path)
    monkeypatch.setenv("ROS_DISTRO", "humble")
    told = runtime._mend(error, tmp_path)
    assert re.match(r"ROS humble is sourced, but .* Python 3\.10 .*; docs/virtual_arm\.md#with-a-ros-installation", told)
    monkeypatch.delenv("ROS_DISTRO")
    monkeypatch.setattr(runtime.platform, "machine", lambda: "aarch64")
    assert "no wheel for Linux on aarch64" in runtime._mend(error, tmp_path / "nowhere")


def test_timers_tick_and_ctrl_c_leaves_the_context_alive(ros: Any) -> None:
    """rclpy's own handler ends the context at once: nothing could be published any more, not even a stop."""
    from std_msgs.msg import Bool

    before = signal.getsignal(signal.SIGINT)
    ticks = []
    with Ros() as own:
        node = own.node("patient")
        publisher = node.create_publisher(Bool, "late", 1)
        node.create_timer(0.01, lambda: ticks.append(0))
        node.create_timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT))
        own.spin()
        assert len(ticks) > 5
        assert own.context.ok()
        publisher.publish(Bool(data=True))
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    assert not own.context.ok()


def test_a_host_program_keeps_its_own_ctrl_c(ros: Any) -> None:
    """``eval --robot ros2``: Python's KeyboardInterrupt comes, and the context lives on for the last commands."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background of a shell
    try:
        with Ros(signals=False) as own:
            own.node("guest")
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            time.sleep(0.3)
            assert own.context.ok()
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_callback_that_fails_is_kept_by_the_spin_thread(ros: Any) -> None:
    with Ros(signals=False) as own:
        own.node("clumsy").create_timer(0.01, lambda: 1 / 0)
        own.spin_in_thread()
        end = time.monotonic() + 10.0
        while own.fault is None:
            assert time.monotonic() < end
            time.sleep(0.01)
        assert isinstance(own.fault, ZeroDivisionError)
