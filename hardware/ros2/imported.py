"""Bags to zarr: each bag an episode, through the same recording as live."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from hardware.ros2.bagfile import open_bag
from hardware.ros2.heard import COMMANDED_TOPIC, Heard
from hardware.ros2.joints import make_model
from hardware.ros2.played import BagClock, BagNode
from hardware.ros2.profile import load_profile
from hardware.ros2.recording import Ended, Recording, RecordingConfig
from robopolicy.errors import DataError


def import_bags(
    paths: Sequence[Path],
    out: Path,
    profile: str,
    *,
    config: RecordingConfig | None = None,
    namespace: str = "",
    told: Callable[[Path, Ended], None] = lambda path, ended: None,
) -> Mapping[Path, Ended]:
    """Add an episode to ``out`` for each bag, in their order.

    An episode begins as soon as every input has come, and with the first command.

    Args:
        paths: Bags.
        out: Store to make, or to add to.
        profile: Of the robot: a name, or a file.
        config: As of recording.
        namespace: That the robot's topics had.
        told: Called with each bag that is done.

    Raises:
        BagError: A bag cannot be read, or has none of the profile's topics.
        DataError: A bag gives no episode: something of what the profile names never came.
    """
    robot = load_profile(profile)
    about = {"source": "bags", "profile": profile, "bags": [str(path) for path in paths]}
    recording = Recording(out, make_model(robot), robot.safety, config, about, offline=True)
    done: dict[Path, Ended] = {}
    try:
        for path in paths:
            with open_bag(path) as bag:
                clock = BagClock(bag.start)
                node = BagNode(bag, clock, namespace)
                recording.forget()
                heard = Heard(robot, node, clock, recording, COMMANDED_TOPIC)
                node.robot = heard.robot
                try:
                    done[path] = _one(path, node, clock, heard, recording)
                finally:
                    heard.close()
            told(path, done[path])
    finally:
        recording.close()
    return done


def _one(path: Path, node: BagNode, clock: BagClock, heard: Heard, recording: Recording) -> Ended:
    began = False
    for message in node.messages():
        node.deliver(message)
        heard.poll()
        if not began and not recording.missing(clock.now()):
            recording.start(clock.now())
            began = True
        recording.advance(clock.now())
        if (ended := recording.take_ended()) is not None:
            return ended
    if not began:
        problems = heard.robot.problems() or recording.missing(clock.now())
        raise DataError(f"'{path}' gives no episode: {problems[0] if problems else 'its inputs never came together'}")
    clock.sleep_until(clock.now() + recording.config.lag)  # nothing more will come
    recording.advance(clock.now())
    return recording.stop()
