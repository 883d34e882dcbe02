"""``robopolicy doctor ros``: what is wrong with ROS on this machine and with the robot on it, before anything moves.

Checks are functions of what was found, so that tests can give them what no machine of ours has. Each finding says how to mend it.
"""

from __future__ import annotations

import argparse
import json
import os
import pwd
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from hardware.ros2.findings import Check, judge
from robopolicy.evaluate.commands import positive

if TYPE_CHECKING:
    from hardware.ros2.profile import RosProfile
    from hardware.ros2.topics import Seen

EPILOG = """\
examples:
  robopolicy doctor ros                              # with the robot's driver, or `robopolicy up virtual`, running
  robopolicy doctor ros --profile ur5e --seconds 10
  robopolicy doctor ros --profile ./mine.yaml --namespace left --json
  robopolicy doctor ros --clean                      # deletes what killed processes left in /dev/shm

Exit code 1 when something is wrong. 'note' is worth knowing, and no reason to stop."""

SEGMENT = 512 * 1024  # [bytes] of Fast DDS's shared memory: larger best-effort messages are lost with its default transports
_LARGE = {"LARGE_DATA", "LARGE_DATAv6"}
_DELIVERED = 20  # messages of the delivery test
_MUCH = 0.1  # of the shared memory there is: then left-overs are no small matter


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("what", choices=["ros"], help="what to check")
    parser.add_argument("--profile", default="virtual", metavar="NAME|FILE", help="the robot's (default virtual)")
    parser.add_argument("--namespace", default="", help="of the arm's topics")
    parser.add_argument("--node", default="robopolicy_policy", help="the policy node's name (default robopolicy_policy)")
    parser.add_argument("--seconds", type=positive, default=3.0, help="how long to listen to the topics (default 3)")
    parser.add_argument("--clean", action="store_true", help="delete shared memory that killed processes have left")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    from hardware.ros2.profile import load_profile
    from hardware.ros2.runtime import RosError, require

    profile = load_profile(args.profile)
    before = dict(os.environ)  # `require` sets what is missing
    try:
        require()
        checks = [installed()]
    except RosError as error:
        checks = [Check("rclpy", "wrong", "it cannot be imported", str(error))]
    checks += [*domain(before), shared_memory(args.clean)]
    topics: dict[str, Seen] = {}
    if checks[0].level != "wrong":
        from rclpy import get_rmw_implementation_identifier

        images = [source.topic for source in profile.inputs.values() if source.type == "image"]
        checks += [messages(), middleware(get_rmw_implementation_identifier(), before), transports(before, images)]
        checks += [delivery(deliver()), *robot(args, profile, topics)]
    if args.json:
        found = {name: asdict(seen) | {"rate": seen.rate, "age": seen.age} for name, seen in topics.items()}
        for entry in found.values():
            del entry["arrivals"], entry["ages"]
        print(json.dumps({"checks": [check._asdict() for check in checks], "topics": found}, indent=2))
    else:
        show(checks)
    return int(any(check.level == "wrong" for check in checks))


def show(checks: Iterable[Check]) -> None:
    """One line each, and the mend below it."""
    for check in checks:
        print(f"{check.level.upper() if check.level == 'wrong' else check.level:<6} {check.name:<24} {check.found}")
        if check.mend:
            print(f"{'':<31} mend: {check.mend}")


# ---- this machine -------------------------------------------------------------------------------------------------------------


def installed() -> Check:
    """Which rclpy."""
    import rclpy

    place = Path(rclpy.__file__).resolve()
    from_packages = str(place).startswith(str(Path(sys.prefix).resolve()))
    distribution = os.environ.get("ROS_DISTRO", "")
    if from_packages and distribution:
        return Check(
            "rclpy", "wrong", f"packages in {sys.prefix} shadow ROS {distribution}, which is sourced",
            "use one: open a shell without sourcing ROS, or: uv pip uninstall ros-rclpy ros-common-interfaces",
        )  # fmt: skip
    return Check("rclpy", "ok", f"from {'packages' if from_packages else f'ROS {distribution} at {place.parent}'}")


def messages() -> Check:
    """Every type of the contract can be imported."""
    from hardware.ros2.contract import NODE_SERVICES, NODE_TOPICS, message_type, robot_topics
    from hardware.ros2.profile import load_profile, profile_names
    from hardware.ros2.runtime import RosError, packages_mend

    names = {topic.type for name in profile_names() for topic in robot_topics(load_profile(name))}
    names |= {entry.type for entry in (*NODE_TOPICS, *NODE_SERVICES)} | {"trajectory_msgs/msg/JointTrajectory"}
    missing = []
    for name in sorted(names):
        try:
            message_type(name)
        except RosError:
            missing.append(name)
    if missing:
        mend = packages_mend({name.split("/")[0] for name in missing}, os.environ.get("ROS_DISTRO", ""))
        return Check("messages", "wrong", f"{', '.join(missing)} cannot be imported", mend)
    return Check("messages", "ok", f"all {len(names)} types of the contract")


def middleware(name: str, environment: Mapping[str, str]) -> Check:
    """Which one carries the messages."""
    asked = environment.get("RMW_IMPLEMENTATION", "")
    if asked and asked != name:
        return Check(
            "middleware", "wrong", f"{name} runs although RMW_IMPLEMENTATION is {asked}", "install it, or unset the variable"
        )
    if name != "rmw_fastrtps_cpp":
        return Check("middleware", "note", f"{name}: this project was tested with rmw_fastrtps_cpp alone")
    return Check("middleware", "ok", name)


def domain(environment: Mapping[str, str]) -> list[Check]:
    """Who hears whom."""
    checks = []
    text, reach = environment.get("ROS_DOMAIN_ID", ""), environment.get("ROS_AUTOMATIC_DISCOVERY_RANGE", "")
    if text == "":
        mend = "export ROS_DOMAIN_ID=N, 1 to 101, the same on the robot's computers, another for other robots"
        where = "computer" if reach == "LOCALHOST" else "network"
        checks.append(Check("ROS_DOMAIN_ID", "note", f"not set: 0, which every ROS on this {where} shares by default", mend))
    elif not text.isdecimal() or int(text) > 232:
        checks.append(Check("ROS_DOMAIN_ID", "wrong", f"'{text}' is no domain", "export ROS_DOMAIN_ID=N with N from 0 to 101"))
    elif int(text) > 101:
        mend = "take one from 0 to 101"
        checks.append(Check("ROS_DOMAIN_ID", "note", f"{text}: its ports may be those of other connections", mend))
    else:
        checks.append(Check("ROS_DOMAIN_ID", "ok", text))
    if reach == "OFF":
        mend = "export ROS_AUTOMATIC_DISCOVERY_RANGE=LOCALHOST, or SUBNET where the robot is another computer"
        checks.append(Check("discovery", "wrong", "ROS_AUTOMATIC_DISCOVERY_RANGE=OFF: no process finds another", mend))
    elif environment.get("ROS_LOCALHOST_ONLY", "0") == "1":
        mend = "unset it and export ROS_AUTOMATIC_DISCOVERY_RANGE=LOCALHOST"
        checks.append(Check("discovery", "note", "ROS_LOCALHOST_ONLY=1 is deprecated, and slow: 3 s to find a node", mend))
    else:
        checks.append(Check("discovery", "ok", reach or "SUBNET (default): this network segment"))
    return checks


def transports(environment: Mapping[str, str], images: Iterable[str]) -> Check:
    """What Fast DDS loses by default; ``images``: topics of raw ones."""
    value = environment.get("FASTDDS_BUILTIN_TRANSPORTS", "")
    raw = ", ".join(images)
    if any(name in environment for name in ("FASTDDS_DEFAULT_PROFILES_FILE", "FASTRTPS_DEFAULT_PROFILES_FILE")):
        return Check("transports", "note", "an XML profile says; see 'delivery' for what it does to large messages")
    if environment.get("ROS_AUTOMATIC_DISCOVERY_RANGE") == "LOCALHOST" and raw:
        from hardware.ros2.runtime import LOCALHOST

        found = f"with LOCALHOST rmw_fastrtps ignores FASTDDS_BUILTIN_TRANSPORTS: a camera driver of {raw} loses messages"
        mend = " ".join(f"export {name}={path}" for name, path in LOCALHOST.items())
        return Check("transports", "note", found, f"in the driver's shell: {mend}")
    if value.split("?")[0] in _LARGE:
        return Check("transports", "ok", f"FASTDDS_BUILTIN_TRANSPORTS={value}")
    mend = "export FASTDDS_BUILTIN_TRANSPORTS=LARGE_DATA in the driver's shell, too, or send compressed images"
    if value:
        found = f"FASTDDS_BUILTIN_TRANSPORTS={value}: best-effort messages above {SEGMENT // 1024} KB may be lost"
        return Check("transports", "wrong" if raw else "note", f"{found}{f', such as {raw}' if raw else ''}", mend)
    if not raw:
        return Check("transports", "ok", "FASTDDS_BUILTIN_TRANSPORTS is not set; this profile sends no raw images")
    found = f"FASTDDS_BUILTIN_TRANSPORTS is not set: our processes set it, a camera driver of {raw} must have it as well"
    return Check("transports", "note", found, mend)


def shared_memory(clean: bool = False, folder: Path | None = None) -> Check:
    """What killed processes have left."""
    from hardware.ros2 import shm

    folder = folder or shm.FOLDER
    before = shm.leftovers(folder=folder)
    freed = shm.remove(before) if clean else 0
    left = [path for path in before if path.exists()]
    deleted = f"deleted {len(before) - len(left)} files, {freed / 1e6:.1f} MB" if clean and before else ""
    if not left:
        return Check("shared memory", "ok", deleted or "nothing is left over")
    owners = {path: _owner(path) for path in left}
    size, total = sum(map(_size, left)), shutil.disk_usage(folder).total
    found = f"{len(left)} files, {size / 1e6:.1f} MB of {total / 1e6:.0f} in {folder}, of killed processes of "
    found = "; ".join(filter(None, (deleted, found + ", ".join(sorted(set(owners.values()))))))
    mend = "`robopolicy doctor ros --clean` deletes those of who runs it, and spares what is in use"
    mine = [path for path in left if owners[path] == _user(os.getuid())]
    full = sum(map(_size, mine)) > _MUCH * total
    return Check("shared memory", "wrong" if full else "note", found, mend)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # gone
        return 0


def _owner(path: Path) -> str:
    try:
        return _user(path.stat().st_uid)
    except OSError:
        return "nobody any more"


def _user(number: int) -> str:
    """Name of an account."""
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:  # containers know few
        return f"user {number}"


def deliver(size: int = 1_000_000) -> int:
    """How many of :data:`_DELIVERED` best-effort messages of ``size`` bytes come from another process."""
    import multiprocessing
    import time

    from rclpy.qos import qos_profile_sensor_data
    from std_msgs.msg import UInt8MultiArray

    from hardware.ros2.runtime import Ros

    topic, came = f"/robopolicy_doctor_{os.getpid()}", []
    talker = multiprocessing.get_context("spawn").Process(target=_talk, args=(topic, size), daemon=True)
    with Ros(signals=False) as ros:
        node = ros.node(f"robopolicy_doctor_delivery_{os.getpid()}")
        node.create_subscription(UInt8MultiArray, topic, lambda raw: came.append(len(raw)), qos_profile_sensor_data, raw=True)
        talker.start()
        end = time.monotonic() + 20.0
        ros.spin(until=lambda: len(came) >= _DELIVERED or not talker.is_alive() or time.monotonic() > end)
    talker.join(5.0)
    talker.kill()
    return len(came)


def _talk(topic: str, size: int) -> None:
    """In a process of its own: within one, no transport is used."""
    import array
    import time

    from rclpy.qos import qos_profile_sensor_data
    from std_msgs.msg import UInt8MultiArray

    from hardware.ros2.runtime import Ros

    with Ros(signals=False) as ros:
        node = ros.node(f"robopolicy_doctor_talker_{os.getpid()}")
        publisher = node.create_publisher(UInt8MultiArray, topic, qos_profile_sensor_data)
        end = time.monotonic() + 10.0
        ros.spin(until=lambda: publisher.get_subscription_count() > 0 or time.monotonic() > end)
        message = UInt8MultiArray(data=array.array("B", bytes(size)))
        time.sleep(1.0)  # large messages take another way, which is made only now
        for _ in range(_DELIVERED):
            publisher.publish(message)
            time.sleep(0.03)
        time.sleep(0.5)


def delivery(came: int) -> Check:
    """Whether large messages arrive."""
    found = f"{came} of {_DELIVERED} best-effort messages of 1 MB came from another process"
    if came >= _DELIVERED - 2:  # the first ones may be earlier than the match
        return Check("delivery", "ok", found)
    return Check(
        "delivery",
        "wrong",
        found,
        "export FASTDDS_BUILTIN_TRANSPORTS=LARGE_DATA for every process, drivers too; see 'transports'",
    )


# ---- the robot ----------------------------------------------------------------------------------------------------------------


def robot(args: argparse.Namespace, profile: RosProfile, seen: dict[str, Seen]) -> list[Check]:
    """Listen to it, and judge. Fills ``seen``."""
    from hardware.ros2.contract import NODE_TOPICS, robot_topics
    from hardware.ros2.runtime import Ros
    from hardware.ros2.topics import look

    topics = [*robot_topics(profile)]
    topics += [topic._replace(name=topic.name.replace("~", args.node, 1)) for topic in NODE_TOPICS]
    namespace = f"/{args.namespace.strip('/')}"
    with Ros(signals=False) as ros:
        node = ros.node(f"robopolicy_doctor_{os.getpid()}", namespace=namespace)
        seen.update(look(ros, node, topics, args.seconds))
    return judge(profile, topics, seen, policy=f"{namespace.rstrip('/')}/{args.node}")
