"""Aligned, Recording: what is stored is what was, side by side by header stamps; nothing recorded is lost. No ROS."""

import copy
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hardware.ros2.aligned import Track
from hardware.ros2.heard import CommandReader
from hardware.ros2.outputs import Outputs
from hardware.ros2.profile import load_profile, profile_names
from hardware.ros2.recording import COMMANDED, EXECUTED, STATE, Recording, RecordingConfig, State
from hardware.ros2.runtime import RosClock
from robopolicy.data.check import check
from robopolicy.data.episodes import Episodes
from robopolicy.deploy.limits import SafetyLimits
from robopolicy.deploy.safety import Stamp
from robopolicy.errors import ConfigError, DataError
from robopolicy.features import Feature
from robopolicy.robot import Measured
from sim.arm.robot import ArmModel

RATE = 20.0
LIMITS = SafetyLimits.model_validate(
    {
        "coordinates": [
            {"name": name, "lower": -2, "upper": 2, "velocity": 1, "acceleration": 5, "jerk": 50} for name in ("a", "b")
        ]
    }
)


class Model:
    """Two joints and a camera; the action is where the joints shall be, in another order."""

    names, kinematics, inputs = ("a", "b"), None, ("front",)
    action_feature = Feature("action", (2,), "float32", "rad", ("b", "a"), RATE)
    observation_features = {
        "pos": Feature("pos", (2,), "float32", "rad", ("a", "b"), RATE),
        "image": Feature("image", (8, 8, 3), "uint8", "1", (), RATE),
    }

    def reset(self, positions: np.ndarray) -> None:
        pass

    def observe(self, measured: Measured) -> dict[str, np.ndarray]:
        return {"pos": measured.positions.astype(np.float32), "image": measured.inputs["front"]}

    def targets(self, action: np.ndarray) -> np.ndarray:
        return action[[1, 0]]

    def action_of(self, positions: np.ndarray) -> np.ndarray:
        return positions[[1, 0]]


class World:
    """Messages of a moving arm: joints at 100 Hz and 2 ms, a camera at 25 Hz and 80 ms old, commands at 100 Hz ahead of it."""

    def __init__(self, recording: Recording, start: float = 100.0) -> None:
        self.recording, self.now, self.tick = recording, start, 0
        self.camera, self.commands, self.wants, self.lag = True, True, True, 0.08
        self.waiting: list[tuple[float, str, Any, Stamp]] = []

    @staticmethod
    def at(time: float) -> np.ndarray:
        return np.array([0.1 * time % 2 - 1, np.sin(time)])

    def run(self, seconds: float) -> None:
        for _ in range(round(seconds * 100)):
            now, tracks = self.now, self.recording.tracks
            self._send(STATE, State(self.at(now), np.zeros(2)), now, 0.002)
            if self.tick % 4 == 0 and self.camera:
                self._send("front", np.full((8, 8, 3), self.tick // 4 % 256, np.uint8), now, self.lag)
            if self.commands:
                tracks[EXECUTED].add(self.at(now) + 0.01, Stamp(now))
                if self.wants:
                    tracks[COMMANDED].add(self.at(now) + 0.02, Stamp(now))
            for due, name, value, stamp in [m for m in self.waiting if m[0] <= now + 1e-9]:
                tracks[name].add(value, Stamp(due, stamp.made))
            self.waiting = [m for m in self.waiting if m[0] > now + 1e-9]
            self.recording.advance(now)
            self.tick += 1
            self.now = 100.0 + self.tick / 100

    def _send(self, name: str, value: Any, made: float, delay: float) -> None:
        self.waiting.append((made + delay, name, value, Stamp(made + delay, made)))


@pytest.fixture
def recording(tmp_path: Path) -> Iterator[Recording]:
    made = Recording(tmp_path / "set.zarr", Model(), LIMITS, RecordingConfig(reserve=0))
    yield made
    made.close()


def episode(recording: Recording, index: int = 0) -> dict[str, np.ndarray]:
    return Episodes.open(recording.path).episode(index)


def test_stamps_are_believed_only_where_they_can_be_true() -> None:
    track: Track[str] = Track()
    track.add("no stamp", Stamp(1.0))
    track.add("stamped", Stamp(2.0, 1.9))
    assert track.at(1.95).value == "stamped"  # type: ignore[union-attr]
    assert track.at(1.5).value == "no stamp"  # type: ignore[union-attr]
    assert track.at(0.5) is None
    track.add("future", Stamp(3.0, 9.0))
    track.add("an hour ago", Stamp(4.0, -3596.0))
    assert (track.at(3.5).value, track.at(9.0).value) == ("future", "an hour ago")  # type: ignore[union-attr]
    assert track.unstamped == 3
    track.add("overtaken", Stamp(4.1, 3.9))
    assert track.disordered == 1
    assert track.newest.value == "an hour ago"  # type: ignore[union-attr]
    for k in range(1000):
        track.add("much", Stamp(5.0 + k))
    assert len(track._entries) < 10


def test_rows_hold_what_was_at_their_time_by_header_stamps(recording: Recording) -> None:
    world = World(recording)
    world.run(0.5)
    began = world.now - 0.005  # not at the very moment of a message
    recording.start(began)
    world.run(3.0)
    ended = recording.stop()
    assert ended.episode == 0
    assert 54 <= ended.steps <= 58  # three seconds, less the last moment, whose messages have not come yet
    stored = episode(recording)
    due = began + stored["timestamp"][:, 0]
    np.testing.assert_allclose(np.diff(due), 1 / RATE, atol=1e-9)
    np.testing.assert_allclose(stored["joint_positions"], [world.at(t) for t in due], atol=0.0101)  # of the newest by then
    np.testing.assert_array_equal(stored["pos"], stored["joint_positions"].astype(np.float32))
    # The camera's picture is the one that was taken by then, although it came 80 ms later.
    taken = began - 100.0 + stored["timestamp"][:, 0]
    np.testing.assert_array_equal(stored["image"][:, 0, 0, 0], np.floor(taken * 25 + 1e-6) % 256)
    # What the arm was told by the end of the row, in the action's own order.
    np.testing.assert_allclose(stored[EXECUTED], [world.at(t + 1 / RATE) + 0.01 for t in due], atol=0.0101)
    np.testing.assert_allclose(stored[COMMANDED] - stored[EXECUTED], 0.01, atol=1e-9)
    np.testing.assert_array_equal(stored["action"], stored[EXECUTED][:, [1, 0]].astype(np.float32))
    # Stamp and arrival of each source, from the first row on.
    assert Episodes.open(recording.path).features["stamps"].names == (STATE, "front", EXECUTED)
    delays = stored["arrivals"] - stored["stamps"]
    np.testing.assert_allclose(delays, np.broadcast_to([0.01, 0.08, 0.0], delays.shape), atol=0.0101)
    assert (stored["stamps"][:, :2] <= stored["timestamp"] + 1e-9).all()
    assert [p for p in check(recording.path) if p.severity == "error"] == []


def test_start_says_what_is_missing_and_stop_what_a_person_should_know(recording: Recording) -> None:
    with pytest.raises(DataError, match=r"'state' has not come yet; 'front' has not come yet"):
        recording.start(0.0)
    world = World(recording)
    world.run(0.2)
    recording.start(world.now)
    with pytest.raises(DataError, match="episode 0 is being recorded"):
        recording.start(world.now)
    world.run(1.0)
    world.camera = False
    world.run(2.0)
    assert recording.stale_now == ("front",)
    world.camera = True
    world.run(1.0)
    ended = recording.stop()
    text = str(ended)
    assert ended.episode == 0
    assert ended.steps > 70
    assert "'front' was stale in 3" in text  # some 34 to 39 of them
    stored = episode(recording)
    ages = stored["timestamp"][:, 0] - stored["stamps"][:, 1]
    assert ages.max() > 1.5
    attrs = Episodes.open(recording.path).attrs
    assert attrs["recorded"]["0"]["stale"]["front"] == int((ages > 0.3).sum())
    world.camera = False
    world.run(1.0)
    with pytest.raises(DataError, match=r"'front' came last \d\.\d s ago"):
        recording.start(world.now)
    with pytest.raises(DataError, match="nothing is being recorded"):
        recording.stop()


def test_an_episode_begins_with_the_first_command_and_standing_still_is_told(recording: Recording) -> None:
    world = World(recording)
    world.commands = False
    world.run(0.3)
    recording.start(world.now)
    world.run(1.0)
    assert recording.steps == 0
    assert "nothing was executed" in str(recording.stop())
    recording.start(world.now)
    world.run(0.5)
    world.at = lambda time: np.zeros(2)  # type: ignore[method-assign]
    world.commands = True
    world.run(2.0)
    ended = recording.stop()
    stored = episode(recording)
    assert stored["timestamp"][0, 0] == 0
    assert len(stored["timestamp"]) == ended.steps < 45
    assert "the arm stood still" in str(ended)


def test_an_arm_that_is_led_by_hand_learns_from_where_it_was_led(tmp_path: Path) -> None:
    recording = Recording(tmp_path / "led.zarr", Model(), LIMITS, RecordingConfig(reserve=0, action="measured"))
    world = World(recording)
    world.commands = False
    world.run(0.3)
    recording.start(world.now)
    began = world.now
    world.run(1.0)
    recording.stop()
    stored = episode(recording)
    due = began + stored["timestamp"][:, 0]
    np.testing.assert_allclose(stored["action"], [world.at(t + 1 / RATE)[[1, 0]] for t in due], atol=0.0101)
    recording.close()


def test_what_nobody_wants_any_more_is_not_stored_as_wanted(recording: Recording) -> None:
    world = World(recording)
    world.run(0.3)
    recording.start(world.now)
    world.run(1.0)
    recording.tracks[COMMANDED] = Track()  # the policy is stopped, the arm goes home
    recording.tracks[COMMANDED].add(np.array([9.0, 9.0]), Stamp(world.now))
    world.wants = False
    world.run(1.5)
    recording.stop()
    stored = episode(recording)
    off = np.abs(stored[COMMANDED] - stored[EXECUTED]).max(axis=1)
    np.testing.assert_array_equal(off[-10:], 0)
    assert off.max() > 5


def test_discarded_episodes_leave_no_trace_and_a_store_goes_on(tmp_path: Path) -> None:
    def made(**changes: Any) -> Recording:
        return Recording(tmp_path / "set.zarr", Model(), LIMITS, RecordingConfig(reserve=0, **changes))

    recording = made()
    world = World(recording)
    world.run(0.3)
    recording.start(world.now)
    world.run(1.0)
    assert recording.discard() > 10
    recording.start(world.now)
    world.run(1.0)
    assert recording.stop().episode == 0
    with pytest.raises(DataError, match="written by another process"):
        made()
    recording.start(world.now)
    world.run(1.0)
    ended = recording.close()  # as on Ctrl-C: an episode in progress is stored
    assert ended is not None
    assert ended.episode == 1
    with pytest.raises(DataError, match=r"other features.*'stamps' differs"):
        made(action="measured")
    again = made()
    assert again.episodes == 2
    again.close()


def test_a_disk_that_is_nearly_full_ends_the_episode_while_it_can_be_stored(
    recording: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(recording)
    world.run(0.3)
    recording.start(world.now)
    world.run(1.0)
    real = shutil.disk_usage(recording.path)
    recording.config = RecordingConfig(reserve=500)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: real._replace(free=4e8))
        world.run(0.1)
        ended = recording.take_ended()
        assert ended is not None
        assert ended.episode == 0
        assert "less than 500 MB are free" in str(ended)
        assert recording.take_ended() is None
        with pytest.raises(DataError, match="less than 500 MB"):
            recording.start(world.now)
    assert len(episode(recording)["action"]) == ended.steps >= 15


def test_a_camera_that_changes_its_size_ends_the_episode_and_loses_nothing(recording: Recording) -> None:
    world = World(recording)
    world.run(0.3)
    recording.start(world.now)
    world.run(1.0)
    world.camera, world.waiting = False, []
    recording.tracks["front"].add(np.zeros((9, 9, 3), np.uint8), Stamp(world.now, world.now))
    world.run(0.5)
    ended = recording.take_ended()
    assert ended is not None
    assert ended.episode == 0
    assert ended.steps >= 15
    assert "image" in str(ended)


@pytest.mark.parametrize("control", ["ee", "joint"])
def test_our_arms_actions_come_back_from_its_targets(control: str) -> None:
    model = ArmModel("lift", control=control)
    start = np.array([0.0, 0.4873, 0.0, 1.7975, 0.0, 0.8567, 0.0, 0.06])
    model.reset(start)
    action = np.array([0.47, 0.03, 0.18, 0.3, 0.05]) if control == "ee" else start + 0.01
    for _ in range(30):
        targets = model.targets(action)
    np.testing.assert_allclose(model.action_of(targets), action, atol=2e-3)


@pytest.mark.parametrize("name", profile_names())
@pytest.mark.parametrize("kind", ["as it is", "trajectory"])
def test_commands_of_every_profile_come_back_as_the_coordinates_that_were_sent(name: str, kind: str) -> None:
    profile = load_profile(name)
    if kind == "trajectory":
        profile = profile.model_copy(update={"command": profile.command.model_copy(update={"type": "trajectory"})})
    reader, sent = CommandReader(profile), []
    outputs = Outputs(profile, RosClock(), sent.append, reader.gripper)
    rng = np.random.default_rng(0)
    lower = np.array([c.lower for c in profile.safety.coordinates])
    upper = np.array([c.upper for c in profile.safety.coordinates])
    for _ in range(5):
        target = rng.uniform(lower, upper)
        for _ in range(2):  # a gripper's small changes are sent once it rests
            outputs.send(target, None)
        np.testing.assert_allclose(reader.read(sent[-1], np.zeros(len(target))), target, atol=1e-9)
    broken = copy.deepcopy(sent[-1])
    if hasattr(broken, "points"):
        broken.points = []
    else:
        broken.data = broken.data[:-1]
    assert reader.read(broken, np.zeros(len(target))) is None
    velocity = profile.command.model_copy(update={"type": "velocity"})
    with pytest.raises(ConfigError, match="action:=measured"):
        CommandReader(profile.model_copy(update={"command": velocity})).check()
