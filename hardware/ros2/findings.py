"""What is wrong with a robot, from what its topics looked like: the second half of ``robopolicy doctor ros``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from hardware.ros2.contract import Topic
    from hardware.ros2.profile import RosProfile
    from hardware.ros2.topics import Seen

_FUTURE, _SKEW = 0.002, 0.05  # [s] stamps may be ahead, and behind


class Check(NamedTuple):
    """One finding.

    Attributes:
        name: What was looked at.
        level: ``ok``, ``note`` or ``wrong``.
        found: What there is.
        mend: What to do; empty where nothing needs to be done.
    """

    name: str
    level: Literal["ok", "note", "wrong"]
    found: str
    mend: str = ""


def judge(profile: RosProfile, topics: Iterable[Topic], seen: Mapping[str, Seen], policy: str) -> list[Check]:
    """The findings; ``policy``: full name of our node."""
    if not any(entry.publishers for key, entry in seen.items() if key != "diagnostics") and not seen["command"].subscriptions:
        mend = "start its driver, or `robopolicy up virtual`, with this ROS_DOMAIN_ID, and look again; then --namespace"
        return [Check("robot", "note", "nobody publishes or listens to a topic of the profile; topics were not checked", mend)]
    checks: list[Check] = []
    for topic in topics:
        entry = seen[topic.key]
        found = [*_quality(topic, entry)]
        if topic.key.startswith("permit."):
            found += _permitted(topic, entry, profile)
        elif topic.direction == "in" and topic.key not in ("estop", "deadman"):
            found += _source(topic, entry, profile)
        if topic.key in ("command", "gripper"):
            found += _commanded(topic, entry, policy)
        if not found and (entry.publishers or entry.subscriptions):
            found = [Check(entry.name, "ok", _describe(entry))]
        checks += found
    return checks


def _quality(topic: Topic, entry: Seen) -> list[Check]:
    """Types and quality of service of both ends."""
    checks = []
    for end in (*entry.publishers, *entry.subscriptions):
        if end.type != topic.type:
            mend = f"expected {topic.type}: mend the profile's topic or type, or remap"
            checks.append(Check(entry.name, "wrong", f"{end.node} uses {end.type}", mend))
        if end.trouble:
            side = "subscription" if topic.direction == "in" else "publisher"
            mend = f"our {side} is {topic.quality}; set that node's quality of service to fit it"
            checks.append(Check(entry.name, "wrong", f"no message passes to or from {end.node}: {end.trouble}", mend))
    return checks


def _source(topic: Topic, entry: Seen, profile: RosProfile) -> list[Check]:
    """Something that the robot publishes: is it there, often enough, of now, complete?"""
    name = entry.name
    if not entry.publishers:
        if topic.key == "success":
            return []
        mend = "start its driver; if it has another name, mend the profile's topic or remap, and mind --namespace"
        return [Check(name, "wrong" if topic.key == "state" else "note", f"nobody publishes {topic.what}", mend)]
    if topic.quality.latched:
        return []
    if not entry.arrivals:
        mend = "is the driver running, not only its node? Across computers: a firewall, or multicast that Wi-Fi drops"
        return [Check(name, "wrong", f"{entry.publishers[0].node} publishes, but no message came in {entry.seconds:.1f} s", mend)]
    checks = []
    if topic.key in ("state", "gripper_state"):
        limit = profile.safety.freshness.state
        if limit is not None and entry.longest_gap > limit:
            found = f"{entry.rate:.0f} Hz, once {entry.longest_gap:.2f} s without: the arm is held after {limit:g} s"
            checks.append(Check(name, "wrong", found, "raise the driver's rate; look for load, and Wi-Fi, between it and here"))
        elif entry.rate < 0.9 * profile.rate:
            found = f"{entry.rate:.0f} Hz; the control loop of the profile runs at {profile.rate:g} Hz"
            checks.append(Check(name, "note", found, "raise the driver's rate, or lower 'rate'"))
    wanted = _joints(profile).get(topic.key, ())
    measured = topic.key in ("state", "gripper_state")
    ours = [node for node, joints in entry.speakers if measured and set(wanted) <= set(joints)]  # as RosRobot.rivals
    if len(ours) > 1:
        found = f"{' and '.join(ours)} say where our joints are: an arm jumps between the two, and the policy refuses to start"
        checks.append(Check(name, "wrong", found, "keep one: end the others, or remap them"))
    elif len(entry.publishers) > 1:
        nodes = ", ".join(end.node for end in entry.publishers)
        level: Literal["note", "wrong"] = "note" if measured else "wrong"  # gripper drivers add to joint states
        checks.append(Check(name, level, f"published by {nodes}", "one of them should go, or be remapped"))
    if entry.mad:
        checks.append(
            Check(name, "wrong", f"{entry.mad} messages held NaN or infinity", "mend the driver: such messages are dropped")
        )
    checks += _stamps(entry)
    if missing := [joint for joint in wanted if not ours and joint not in entry.joints]:
        found = f"no {', '.join(missing)} among {', '.join(entry.joints)}"
        checks.append(
            Check(name, "wrong", found, "mend the names in the profile's state.joints; a prefix, such as left_, is usual")
        )
    return checks


def _permitted(topic: Topic, entry: Seen, profile: RosProfile) -> list[Check]:
    """Without it no start is granted."""
    from hardware.ros2.profile import NO_PERMIT

    assert profile.permits is not None  # the topic is of one
    mend = profile.permits[topic.key.removeprefix("permit.")].mend
    if not entry.publishers:
        mend = f"start the driver; {NO_PERMIT}"
        return [Check(entry.name, "wrong", f"nobody publishes {topic.what}: the arm is not commanded", mend)]
    if entry.said:
        return []
    found = "says false" if entry.said is False else "has said nothing"
    return [Check(entry.name, "wrong", f"{topic.what} {found}: the arm is not commanded", mend)]


def _joints(profile: RosProfile) -> dict[str, tuple[str, ...]]:
    """Those that each topic must hold."""
    if profile.state.type == "pose":
        return {}
    gripper = profile.gripper
    if gripper is None or gripper.state_topic is None:
        return {"state": profile.joint_names}
    apart = profile.state.joints[gripper.coordinate].names
    return {"state": tuple(name for name in profile.joint_names if name not in apart), "gripper_state": apart}


def _stamps(entry: Seen) -> list[Check]:
    """Clocks of two computers."""
    if entry.age is None:
        return [Check(entry.name, "note", "messages carry no stamp: their age is counted from their arrival", "")]
    if entry.age < -_FUTURE:
        mend = "synchronise the clocks: chrony or PTP on both computers"
        return [Check(entry.name, "wrong", f"stamps are {-1e3 * entry.age:.0f} ms in the future", mend)]
    if entry.age > _SKEW:
        mend = "synchronise the clocks (chrony, PTP), if the driver takes no such time; use_sim_time must be false"
        level: Literal["note", "wrong"] = "wrong" if entry.age > 0.15 else "note"
        return [Check(entry.name, level, f"messages are {1e3 * entry.age:.0f} ms old when they come", mend)]
    return []


def _commanded(topic: Topic, entry: Seen, policy: str) -> list[Check]:
    """The command topic: one publisher, one controller."""
    checks = []
    strangers = [end.node for end in entry.publishers if end.node not in (policy, f"{policy}_io")]  # messages have a node apart
    if len(entry.publishers) > 1:
        found = (
            f"{len(entry.publishers)} publishers: {', '.join(end.node for end in entry.publishers)}; the arm gets both's commands"
        )
        checks.append(Check(entry.name, "wrong", found, f"end {', '.join(strangers) or 'one of them'}: one node commands an arm"))
    elif strangers:
        mend = f"end it before the policy starts, or name it with --node if it is ours; ours is {policy}"
        checks.append(Check(entry.name, "wrong", f"{strangers[0]} publishes commands", mend))
    if not entry.subscriptions:
        controller = entry.name.rpartition("/")[0].rpartition("/")[2]
        if topic.key == "gripper":
            mend = "start the gripper's driver, or name its topic in the profile"
        elif controller.endswith("controller"):  # as those of ros2_control are called
            mend = f"activate it, in place of another: ros2 control switch_controllers --deactivate OTHER --activate {controller}"
        else:
            mend = "start or activate what takes it, or name its topic in the profile"
        checks.append(Check(entry.name, "wrong", "nobody listens: no controller carries out the commands", mend))
    return checks


def _describe(entry: Seen) -> str:
    parts = []
    if entry.publishers:
        parts.append("from " + ", ".join(dict.fromkeys(end.node for end in entry.publishers)))
    if entry.subscriptions:
        parts.append("to " + ", ".join(dict.fromkeys(end.node for end in entry.subscriptions)))
    if entry.rate:
        parts.append(f"{entry.rate:.0f} Hz")
    if entry.largest:
        parts.append(f"{entry.largest / 1024:.1f} KB")
    if entry.age is not None:
        parts.append(f"{1e3 * entry.age:.1f} ms old")
    return ", ".join(parts)
