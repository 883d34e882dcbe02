"""The recorder node: episodes of an arm to zarr, whoever moves it: a policy, a leader arm, or a person's hands on it.

``python -m hardware.ros2.recorder --ros-args -p profile:=virtual -p out:=data/mine.zarr``, or ``robopolicy up record``. It only
listens. Services ``~/start``, ``~/stop`` (stores) and ``~/discard``; ``~/state`` says what goes on. docs/bag.md.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pydantic

from hardware.ros2.contract import LATCHED, message_type
from hardware.ros2.heard import COMMANDED_TOPIC, Heard
from hardware.ros2.joints import make_model
from hardware.ros2.profile import load_profile
from hardware.ros2.recording import Ended, Recording, RecordingConfig
from hardware.ros2.runtime import Ros, RosClock
from robopolicy.config import parse
from robopolicy.errors import DataError, RobopolicyError

NODE = "robopolicy_recorder"
_TELL = 1.0  # [s]: the state is said again so often, it counts steps
_POLLS = 4  # a row


class RecorderConfig(RecordingConfig):
    """The node's parameters: beside those of :class:`RecordingConfig`, where from and where to."""

    profile: str = pydantic.Field(default="virtual", description="The robot: the name of a profile, or a YAML file.")
    out: str = pydantic.Field(default="data/recorded.zarr", description="The zarr store to make, or to add episodes to.")
    commanded: str = pydantic.Field(
        default=COMMANDED_TOPIC, description="Topic of the coordinates that were wanted, before the safety filter."
    )
    autostart: bool = pydantic.Field(default=False, description="Begin an episode as soon as the inputs are there.")


class Recorder:
    """The node. Everything but the writing happens in the thread that spins it.

    Args:
        ros: Context; the node is made in it.

    Raises:
        RobopolicyError: A parameter is wrong, or the store cannot be written.
    """

    def __init__(self, ros: Ros) -> None:
        self.node = node = ros.node(NODE)
        config = _parameters(node)
        profile, self.clock = load_profile(config.profile), RosClock()
        own = RecordingConfig(**{name: getattr(config, name) for name in RecordingConfig.model_fields})
        about = {"source": "ROS 2", "profile": config.profile, "model": profile.model.model_dump(), "limits": profile.limits}
        about["limits"] = profile.limits if isinstance(profile.limits, str) else "inline"
        self.recording = Recording(config.out, make_model(profile), profile.safety, own, about)
        self.heard = Heard(profile, node, self.clock, self.recording, config.commanded)
        self._autostart = config.autostart
        self._note, self._told, self._said = "", -_TELL, ""
        self._stale: tuple[str, ...] = ()
        self._log: Any = node.get_logger()
        self._state = node.create_publisher(message_type("std_msgs/msg/String"), "~/state", LATCHED.to_ros())
        for name, act in (("start", self._start), ("stop", self._stop), ("discard", self._discard)):
            node.create_service(message_type("std_srvs/srv/Trigger"), f"~/{name}", self._answer(name, act))
        node.create_timer(self.recording.period / _POLLS, self._tick)
        self._log.info(f"{self.recording.episodes} episodes in '{self.recording.path}'; call ~/start to record another")

    def close(self) -> None:
        """End; an episode in progress is stored."""
        self.heard.close()
        if (ended := self.recording.close()) is not None:
            self._report(ended)

    # ---- services ------------------------------------------------------------------------------------------------------------

    def _answer(self, name: str, act: Callable[[], str]) -> Callable[[Any, Any], Any]:
        def call(request: Any, response: Any) -> Any:
            try:
                response.success, response.message = True, act()
            except RobopolicyError as error:
                response.success, response.message = False, str(error)
            if response.success:  # not one line: rclpy lets a line of code log at one level only
                self._log.info(f"{name}: {response.message}")
            else:
                self._log.warning(f"{name}: {response.message}")
            self._note = response.message
            self._tell()
            return response

        return call

    def _start(self) -> str:
        if problems := self.heard.robot.problems():
            raise DataError(problems[0])
        self.recording.start(self.clock.now())
        self._autostart = False
        return f"recording episode {self.recording.episodes} of '{self.recording.path}'"

    def _stop(self) -> str:
        self.recording.advance(self.clock.now())
        ended = self.recording.stop()
        if ended.episode is None:
            raise DataError(str(ended))
        return str(ended)

    def _discard(self) -> str:
        return f"discarded {self.recording.discard()} steps; {self.recording.episodes} episodes are stored"

    # ---- periods -------------------------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        self.heard.poll()
        now = self.clock.now()
        if self._autostart and not self.recording.missing(now):
            try:
                self._note = self._start()
            except DataError as error:  # the disk is full, say: it goes on trying
                self._note = str(error)
        self.recording.advance(now)
        if (ended := self.recording.take_ended()) is not None:
            self._report(ended)
        stale = self.recording.stale_now if self.recording.recording else ()
        for name in set(stale) - set(self._stale):
            self._log.warning(f"'{name}' is stale: its last value is recorded until it comes again")
        changed, self._stale = stale != self._stale, stale
        if changed or now - self._told >= _TELL:
            self._tell()

    def _report(self, ended: Ended) -> None:
        self._note = str(ended)
        if ended.episode is not None:
            self._log.info(self._note)
        else:
            self._log.error(self._note)
        self._tell()

    def _tell(self) -> None:
        recording = self.recording
        state = {
            "recording": recording.recording,
            "episode": recording.episodes,
            "steps": recording.steps if recording.recording else 0,
            "stale": list(self._stale),
            "note": self._note,
        }
        self._told, text = self.clock.now(), json.dumps(state)
        if text != self._said:
            self._said = text
            self._state.publish(message_type("std_msgs/msg/String")(data=text))


def _parameters(node: Any) -> RecorderConfig:
    from rcl_interfaces.msg import ParameterDescriptor

    values = {}
    for name, field in RecorderConfig.model_fields.items():
        descriptor = ParameterDescriptor(name=name, description=field.description or "", read_only=True)
        values[name] = node.declare_parameter(name, field.default, descriptor).value
    return parse(RecorderConfig, values, where="parameters")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the node until SIGINT or SIGTERM; exit code."""
    try:
        with Ros(sys.argv if arguments is None else arguments) as ros:
            recorder = Recorder(ros)
            try:
                ros.spin()
            finally:
                recorder.close()
    except RobopolicyError as error:
        print(f"{NODE}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
