"""``RosRobot``: the :class:`robopolicy.robot.Robot` behind ROS 2 topics."""

from __future__ import annotations

import math
import re
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from hardware.ros2.contract import Topic, message_type, robot_topics
from hardware.ros2.inputs import Decoder, Latest, Slot, with_origin
from hardware.ros2.joints import make_model, near
from hardware.ros2.kinematics import DHKinematics
from hardware.ros2.messages import JointReader, read_image, read_pose
from hardware.ros2.outputs import Outputs, Send
from hardware.ros2.permits import Word
from hardware.ros2.profile import POSE, RosProfile
from hardware.ros2.runtime import RosClock, RosError
from hardware.ros2.services import ANSWER, TRIGGER, call, client, set_parameter
from hardware.ros2.topics import node_of
from robopolicy.deploy.safety import Reason, Stamp
from robopolicy.robot import Measured, RobotModel, Sample, State

READY = 20.0  # [s]: for a driver and its topics to be found
_POLL = 0.01  # [s]
_ACKNOWLEDGED = 0.5  # [s] that a controller gets to confirm the last velocity
_MEASURED = ("state", "gripper_state")  # keys of topics
_UNHEARD = re.compile(r"permit '[^']*': (nobody publishes|nothing has come on) ")
_NEVER = Stamp(-math.inf)  # older than any limit


class Absent(str):
    """Why an arm does not move, where a driver ends that by coming: nobody says, hears or goes on saying something.

    Whatever else keeps it from moving is for a person to end: messages that come and are refused, too.
    """


class RosRobot:
    """An arm behind the topics of a profile.

    The node's subscriptions fill slots, whoever spins it; the methods of :class:`Robot` look at what is newest there and never
    wait. Only :meth:`ready` and :meth:`reset` wait, for messages: never call them from a callback.

    Args:
        profile: Which topics, joints and controllers.
        node: Anything with rclpy's methods of nodes; spun by its owner, in another thread than the one that waits.
        clock: Of stamps.
        model: What measurements and actions mean; None: the profile's.
        enabled: Whether commands go out. False, for shadow mode: there is not even a publisher.

    Attributes:
        limits: Of the safety filter, the profile's.
        resets: Whether :meth:`reset` brings it to where an episode begins; if not, it is brought ``home`` by who commands it.
        home: Where that is ``[n]``; None: there is no such place.
        slots: ``state``, ``gripper_state`` and every input by name: their values, ages, rates and refusals.
    """

    def __init__(
        self, profile: RosProfile, node: Any, clock: RosClock, model: RobotModel | None = None, *, enabled: bool = True
    ) -> None:
        self.profile, self.node, self.clock = profile, node, clock
        self.limits = profile.safety
        self.resets, self.home = profile.reset is not None, profile.home_positions
        self.model = make_model(profile) if model is None else model
        self.names, self.kinematics = self.model.names, self.model.kinematics
        self.observation_features, self.action_feature = self.model.observation_features, self.model.action_feature
        self.topics = robot_topics(profile, self.model.inputs)
        self.slots: dict[str, Slot[Any]] = {}
        self._paths: dict[str, str] = {}  # names of topics as resolved, by key
        self._made: list[tuple[Callable[[Any], Any], Any]] = []  # how to undo it, and what
        self._permits: dict[str, Word] = {}  # by key; of an arm that is commanded
        self._decoder: Decoder | None = None
        self._success = self._said = False  # in this episode; and the last word, whenever it was
        self._success_told = threading.Event()
        if profile.reset is not None and enabled:
            client(node, f"{profile.reset.node}/{profile.reset.service}", TRIGGER)  # not asked twice, so discovered by then
        self._seen: Latest[Any] | None = None  # of the state
        self._before: Latest[Any] | None = None
        self._positions = np.full(len(self.names), np.nan)
        self._read_state, self._read_gripper = self._readers()
        self._publishers: dict[str, Any] = {}
        for topic in self.topics:
            if topic.key.startswith("permit.") and not enabled:
                continue
            if topic.direction == "in":
                self._subscribe(topic)
            elif enabled:
                self._advertise(topic)
        self._outputs: Outputs | None = None
        if enabled:
            gripper = self._publishers.get("gripper")
            self._outputs = Outputs(profile, clock, self._publishers["command"].publish, gripper and gripper.publish)
            if profile.command.velocity:
                self._keep(node.create_timer(1.0 / profile.rate, self._outputs.watch), node.destroy_timer)

    # ---- Robot ---------------------------------------------------------------------------------------------------------------

    def state(self) -> State:
        latest = self.slots["state"].latest
        if latest is None:
            return State(self._positions.copy(), _NEVER)
        if self._seen is None or latest.number != self._seen.number:
            self._before, self._seen = self._seen, latest
            self._positions[self._arm_columns] = self._arm_positions(latest)
        if self._read_gripper is not None and (gripper := self.slots["gripper_state"].latest) is not None:
            self._positions[self._gripper_columns] = gripper.value[0]
        return State(self._positions.copy(), latest.stamp)

    def observe(self) -> Sample:
        state = self.state()
        inputs: dict[str, np.ndarray] = {}
        stamps: dict[str, Stamp] = {}
        for name, slot in self.slots.items():
            if name == "state":
                continue
            if slot.latest is None:
                raise RosError(f"nothing has come for input '{name}'; {self._mend(name)}")
            stamps[name] = slot.latest.stamp
            if name in self.model.inputs:
                inputs[name] = slot.latest.value
        measured = Measured(state.positions, self._velocities(), inputs)
        # The rows of the plan count from when the world looked like this: the oldest of what was seen.
        times = [stamp.came if stamp.made is None else min(stamp.came, stamp.made) for stamp in (state.stamp, *stamps.values())]
        return Sample(self.model.observe(measured), min(times), stamps, self._stuck())

    def targets(self, action: np.ndarray) -> np.ndarray:
        return self.model.targets(action)

    def command(self, positions: np.ndarray) -> None:
        if self._outputs is not None:
            fresh = self.slots["state"].age(self.clock.now()) <= self.limits.freshness.state
            self._outputs.send(positions, self._positions if fresh else None)

    def stop(self) -> None:
        if self._outputs is not None:
            self._outputs.stop()

    def reset(self, seed: int | None = None) -> None:
        """Begin an episode: by the simulator's service where the profile has one. Else nothing moves, see :attr:`resets`.

        Raises:
            RosError: A permit is missing; somebody else commands the arm, too; a service does not answer or refuses; no message
                comes after it; or the goal is said to be met already.
        """
        if hindrances := self.hindrances():
            raise RosError(hindrances[0])
        how = self.profile.reset
        self._success = False
        if how is not None:
            if seed is not None and how.seed_parameter is not None:
                set_parameter(self.node, how.node, how.seed_parameter, seed)
            self._success_told.clear()
            call(self.node, f"{how.node}/{how.service}", TRIGGER)
            if self.profile.success is not None and not self._success_told.wait(ANSWER):
                raise RosError(f"'{self.profile.success}' was not false within {ANSWER:g} s of the reset; who publishes it?")
        else:
            self._await_undone()
        self._seen = self._before = None  # no velocity across a reset
        self._await_newer()
        self.seat(self.state().positions)

    def seat(self, positions: np.ndarray) -> None:
        """An episode begins at these measured positions ``[n]``; nothing moves."""
        self._success = False
        self.model.reset(positions)

    # ---- more than Robot -----------------------------------------------------------------------------------------------------

    @property
    def success(self) -> bool | None:
        """Whether the goal has been met since the last reset; None where nobody says so."""
        return None if self.profile.success is None else self._success

    def ready(self, timeout: float = READY) -> None:
        """Wait until everything needed comes, permits too, and somebody takes the commands. Raises RosError: what is missing."""
        end = time.monotonic() + timeout
        while problems := [*self.problems(), *self.denied()]:
            if time.monotonic() > end:
                raise RosError(f"the robot is not ready after {timeout:g} s: {'; '.join(problems)}")
            time.sleep(_POLL)

    def problems(self) -> list[str]:
        """What keeps the arm from moving: topics that nobody publishes, refused messages, controllers that do not listen."""
        found = [
            (str if slot.rejected else Absent)(f"nothing has come on '{self._paths[self._key(name)]}'; {self._mend(name)}")
            for name, slot in self.slots.items()
            if slot.latest is None
        ]
        for key, publisher in self._publishers.items():
            if publisher.get_subscription_count() == 0:
                mend = "activate the controller or driver that does, or remap it"
                found.append(Absent(f"nobody listens on '{self._paths[key]}'; {mend}"))
        return found

    def unheard(self) -> list[str]:
        """Permits of which nobody has said anything yet, or nobody is there who has."""
        return [Absent(line) for line in self.denied() if _UNHEARD.match(line)]

    def denied(self) -> list[str]:
        """Permits that are missing: why, and what a person does. While there is one, the arm must not be commanded."""
        return [line for key, word in self._permits.items() if (line := word.missing(self._paths[key]))]

    def hindrances(self) -> list[str]:
        """As :meth:`robopolicy.robot.RealRobot.hindrances`: permits that are missing, and second masters."""
        return [*self.denied(), *self.rivals()]

    def rivals(self) -> list[str]:
        """Second masters: somebody else who commands, or measures our joints or an input. An arm would jump between them.

        4 us a topic where all is well; 80 us where it is not. Others may use a topic for what is not ours: other joints, frames.
        """
        found = self.masters()
        for name, slot in self.slots.items():
            path, origins = self._paths[self._key(name)], slot.origins(self.clock.now())
            if len(origins) > 1:
                there = self.node.get_publishers_info_by_topic(path)
                ours = [info for info in there if bytes(info.endpoint_gid) in origins]
                if len(ours) != 1:  # the others have ended
                    found.append(f"{len(origins)} nodes say on '{path}' {_what(name)}: {_named(ours or there)}; keep one")
        return found

    def masters(self) -> list[str]:
        """Those of :meth:`rivals` who command it, or could."""
        found = []
        for key in self._publishers:
            path = self._paths[key]
            if (count := self.node.count_publishers(path)) > 1:
                who = _named(self.node.get_publishers_info_by_topic(path))
                found.append(f"{count} nodes publish on '{path}': {who}; two masters make an arm jump, end the others")
        return found

    def explained(self, refusal: str) -> str:
        """A refusal, and behind every input that it calls stale why its messages are refused, if they are.

        Absent: inputs are stale, and nothing else is wrong.
        """

        def add(match: re.Match[str]) -> str:
            slot = self.slots.get(match["name"])
            why = "" if slot is None else slot.refusing(self.clock.now())
            return f"{match[0]} (messages are refused: {why})" if why else match[0]

        text = re.sub(r"stale (?P<name>[^:;]+): [^;]*", add, refusal)
        return Absent(text) if text == refusal and re.fullmatch(r"(stale [^:;]+: [^;]*(; )?)+", refusal) else text

    def doubts(self) -> list[str]:
        """Topics with several publishers of which the middleware does not tell whose messages we take."""
        now, found = self.clock.now(), []
        for name, slot in self.slots.items():
            if slot.arriving(now) and not slot.origins(now):
                infos = self.node.get_publishers_info_by_topic(path := self._paths[self._key(name)])
                if len(infos) > 1:
                    found.append(f"several nodes publish on '{path}': {_named(infos)}; only one may say {_what(name)}")
        return found

    def close(self) -> None:
        """Take back subscriptions, publishers and threads. The node stays. No velocity is left behind."""
        try:
            if self._outputs is not None:
                self._outputs.close()
                if self.profile.command.velocity and "command" in self._publishers:
                    self._confirm()
        finally:
            if self._decoder is not None:
                self._decoder.close()
                self._decoder = None
            for undo, thing in reversed(self._made):
                undo(thing)
            self._made.clear()
            self._publishers = {}

    def _confirm(self) -> None:
        """Wait until the last velocity has arrived: a zero that is lost would never be said again, nobody is left to say it."""
        from rclpy.duration import Duration

        if not self._publishers["command"].wait_for_all_acked(Duration(seconds=_ACKNOWLEDGED)):
            path = self._paths["command"]
            self.node.get_logger().error(f"who listens on '{path}' has not confirmed the zero velocity: does the arm stand?")

    # ---- topics --------------------------------------------------------------------------------------------------------------

    def _readers(self) -> tuple[Callable[[Any], Any], JointReader | None]:
        """Of the state's topic, and of the gripper's own if it has one; and which coordinates each gives."""
        state, gripper, names = self.profile.state, self.profile.gripper, self.profile.names
        apart = [gripper.coordinate] if gripper is not None and gripper.state_topic is not None else []
        together = [name for name in state.joints if name not in apart]
        self._gripper_columns = [names.index(name) for name in apart]
        separate = JointReader({name: state.joints[name] for name in apart}) if apart else None
        if state.type == "pose":
            self._arm_columns = [names.index(name) for name in POSE]
            return read_pose, separate
        if state.type == "fk":
            assert self.profile.kinematics is not None  # the profile has seen to it
            self._chain = DHKinematics(self.profile.kinematics)
            rest = [name for name in together if name in names]
            together = [name for name in together if name not in names] + rest
            self._arm_columns = [names.index(name) for name in (*POSE, *rest)]
        else:
            together = [name for name in names if name not in apart]
            self._arm_columns = [names.index(name) for name in together]
        return JointReader({name: state.joints[name] for name in together}), separate

    def _arm_positions(self, latest: Latest[Any]) -> np.ndarray:
        if self.profile.state.type == "joints":
            positions: np.ndarray = latest.value[0]
            return positions
        if self.profile.state.type == "pose":
            position, rotation = latest.value[:3], Rotation.from_quat(latest.value[3:])
            rest = np.zeros(0)
        else:
            position, matrix = self._chain.pose(latest.value[0])
            rotation, rest = Rotation.from_matrix(matrix), latest.value[0][self._chain.joints :]
        before = self._positions[self._arm_columns][3:6]
        vector = rotation.as_rotvec()
        return np.concatenate([position, near(vector, before) if np.isfinite(before).all() else vector, rest])

    def _velocities(self) -> np.ndarray:
        """As the driver says, or the difference of the last two states; zero where there is but one."""
        velocities = np.zeros(len(self.names))
        if self._seen is None:
            return velocities
        if self.profile.state.type == "joints":
            given = self._seen.value[1]
            if given is not None:
                velocities[self._arm_columns] = given
            elif self._before is not None:
                elapsed = _moment(self._seen.stamp) - _moment(self._before.stamp)
                if elapsed > 0:
                    velocities[self._arm_columns] = (self._seen.value[0] - self._before.value[0]) / elapsed
        if self._read_gripper is not None and (gripper := self.slots["gripper_state"].latest) is not None:
            velocities[self._gripper_columns] = 0.0 if gripper.value[1] is None else gripper.value[1]
        return velocities

    def _subscribe(self, topic: Topic) -> None:
        if topic.key == "success":
            callback: Send = self._told
        elif topic.key.startswith("permit."):
            name = topic.key.removeprefix("permit.")
            assert self.profile.permits is not None  # the topic is of one
            word = self._permits[topic.key] = Word(name, self.profile.permits[name], self.node, self.clock)
            callback = with_origin(word.take)
        else:
            name = topic.key.removeprefix("input.")
            source = None if topic.key in _MEASURED else self.profile.inputs[name]
            compared = source is not None and source.stuck is not None
            slot = self.slots[name] = Slot(name, self.clock, self._reader(topic.key, name), compared=compared)
            take: Callable[[Any, bytes | None], None] = slot.take
            if source is not None and source.type != "pose":
                self._decoder = self._decoder or Decoder(self.clock)
                take = self._decoder.callback(slot)
            callback = with_origin(take)
        made = self.node.create_subscription(message_type(topic.type), topic.name, callback, topic.quality.to_ros())
        self._keep(made, self.node.destroy_subscription)
        self._paths[topic.key] = made.topic_name
        if topic.key in self._permits:
            self._permits[topic.key].missing(made.topic_name)  # who is there from before

    def _advertise(self, topic: Topic) -> None:
        made = self.node.create_publisher(message_type(topic.type), topic.name, topic.quality.to_ros())
        self._keep(made, self.node.destroy_publisher)
        self._paths[topic.key], self._publishers[topic.key] = made.topic_name, made

    def _reader(self, key: str, name: str) -> Callable[[Any], Any]:
        if key == "state":
            return self._read_state
        if key == "gripper_state":
            assert self._read_gripper is not None
            return self._read_gripper
        source = self.profile.inputs[name]
        if source.type == "pose":
            return lambda message: read_pose(message, source.frame)
        return lambda message: read_image(message, source)

    def _stuck(self) -> Reason | None:
        """The first input whose content is the same for too long."""
        for name in self.model.inputs:
            limit = self.profile.inputs[name].stuck
            if limit is not None and self.slots[name].unchanged > limit:
                return Reason("stuck", name, self.slots[name].unchanged, limit)
        return None

    def _keep(self, thing: Any, undo: Callable[[Any], Any]) -> None:
        self._made.append((undo, thing))

    def _told(self, message: Any) -> None:
        self._success = self._said = bool(message.data)
        if not message.data:  # a late "true" of the episode before is no answer to a reset
            self._success_told.set()

    def _key(self, name: str) -> str:
        return name if name in self._paths else f"input.{name}"

    def _mend(self, name: str) -> str:
        """Why nothing has come for a slot."""
        key, slot = self._key(name), self.slots[name]
        topic = next(topic for topic in self.topics if topic.key == key)
        if slot.rejected:
            return f"{sum(slot.rejected.values())} messages were refused, the last for its {slot.last_rejection}"
        publishers = self.node.get_publishers_info_by_topic(self._paths[key])
        if not publishers:
            need = f"nobody publishes it, and the policy needs '{name}'" if name in self.model.inputs else "nobody publishes it"
            return f"{need}: start the driver, or check namespace, remapping and ROS_DOMAIN_ID"
        if wrong := {info.topic_type for info in publishers} - {topic.type}:
            return f"it carries {', '.join(sorted(wrong))}, expected {topic.type}; change the profile"
        return "somebody publishes it and nothing arrives: run `robopolicy doctor ros`"

    # ---- waiting -------------------------------------------------------------------------------------------------------------

    def _await_undone(self) -> None:
        """Whoever still sees the goal met would call the next episode a success in its first period."""
        end = time.monotonic() + ANSWER
        while self._said:
            if time.monotonic() > end:
                raise RosError(
                    f"'{self.profile.success}' still says after {ANSWER:g} s that the goal is met, and no episode has begun; put "
                    "the objects back, or mend who publishes it"
                )
            time.sleep(_POLL)

    def _await_newer(self) -> None:
        """Two messages for every slot: the first may have been on its way."""
        numbers = {name: 0 if slot.latest is None else slot.latest.number for name, slot in self.slots.items()}
        end = time.monotonic() + ANSWER
        for name, slot in self.slots.items():
            while slot.latest is None or slot.latest.number < numbers[name] + 2:
                if time.monotonic() > end:
                    raise RosError(f"no good message on '{self._paths[self._key(name)]}' within {ANSWER:g} s; {self._mend(name)}")
                time.sleep(_POLL)


def _moment(stamp: Stamp) -> float:
    return stamp.came if stamp.made is None else stamp.made


def _what(name: str) -> str:
    """What messages of a slot say, for people."""
    return "where our joints are" if name in _MEASURED else f"what '{name}' is"


def _named(infos: Iterable[Any]) -> str:
    """Full names of the nodes behind publishers."""
    return " and ".join(map(node_of, infos))
