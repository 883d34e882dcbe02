"""Permits: topics that must say true for the arm to be commanded, see :class:`hardware.ros2.profile.Permit`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from hardware.ros2.profile import NO_PERMIT, Permit
from hardware.ros2.runtime import RosClock
from hardware.ros2.topics import UNKNOWN

_TYPE = "std_msgs/msg/Bool"
_SECOND = 1.0  # [s]: a false counts for so long, whatever follows; and so long may one be silent that is not latched


class Word:
    """What was said on a permit's topic. Written by the thread of the topics, read by any.

    A word holds while the publisher that said it is there: a latched true of a driver that has begun anew says nothing of it.
    Discovery knows of a killed one for some 20 s more, so of publishers of the same node only the one that came last has a say.

    Args:
        name: Of the permit.
        permit: Its topic, and what a person does.
        node: Knows who publishes.
        clock: Of :meth:`missing`.
    """

    def __init__(self, name: str, permit: Permit, node: Any, clock: RosClock) -> None:
        self._name, self._permit, self._node, self._clock = name, permit, node, clock
        self._said: dict[bytes | None, tuple[bool, float]] = {}  # by publisher; None: nobody says whose it is
        self._since: dict[bytes, float] | None = None  # when publishers were first seen; -inf: they were there before this
        self._false = -math.inf  # when it was last said

    def take(self, message: Any, origin: bytes | None = None) -> None:
        """The subscription's callback, see :func:`hardware.ros2.inputs.with_origin`."""
        now = self._clock.now()
        if not message.data:
            self._false = now
        self._said[origin] = bool(message.data), now

    def missing(self, path: str) -> str:
        """Why the arm must not be commanded, and what to do; empty: it may. ``path``: the topic's full name. 80 us.

        Look once at the start, and then often: who was there before whom is told by when they were first seen.
        """
        there = self._node.get_publishers_info_by_topic(path)
        now, mend, words = self._clock.now(), self._permit.mend, self._words(there)
        if not there:
            why, mend = f"nobody publishes '{path}'", f"start the driver; {NO_PERMIT}"
        elif not words:
            why, mend = f"nothing has come on '{path}'", self._unheard(there) or mend
        elif not all(said for said, _ in words):
            why = f"'{path}' says false"
        elif now - self._false <= _SECOND:
            why, mend = f"'{path}' has just said false", "it says true again: find out why, then start"
        elif not self._permit.latched and now - min(came for _, came in words) > _SECOND:
            why, mend = f"'{path}' has been silent for more than {_SECOND:g} s", "look after the node that says it"
        else:
            return ""
        return f"permit '{self._name}': {why}; {mend}"

    def _words(self, there: Sequence[Any]) -> list[tuple[bool, float]]:
        """Those that count: of the newest publisher of each node, and of others of its name that have spoken since."""
        now, said = self._clock.now(), self._said.copy()
        nodes: dict[object, list[bytes]] = {}
        for info in there:
            gid, name = bytes(info.endpoint_gid), (info.node_namespace, info.node_name)
            nodes.setdefault(gid if info.node_name == UNKNOWN else name, []).append(gid)
        before = {} if self._since is None else self._since
        first = -math.inf if self._since is None else now
        self._since = since = {gid: before.get(gid, first) for gids in nodes.values() for gid in gids}
        words = [said[None]] if there and None in said else []
        # One that came since, and whose name is not known yet, may be the successor of any.
        nameless = any(gid not in said and since[gid] > -math.inf for gid in nodes if isinstance(gid, bytes))
        for gids in nodes.values():
            newest = max(since[gid] for gid in gids)
            # Two that came between two looks: nobody knows which is alive. A ghost from before says nothing to who is new.
            silent = newest > -math.inf and any(since[gid] == newest and gid not in said for gid in gids)
            for gid in gids:
                true, came = said.get(gid, (True, -math.inf))
                if gid in said and (since[gid] == newest or came > newest) and not (true and (silent or nameless)):
                    words.append((true, came))
        return words

    def _unheard(self, there: Sequence[Any]) -> str:
        """Why nothing can have come from those that publish; empty: it can."""
        from rclpy.qos import DurabilityPolicy, ReliabilityPolicy

        if wrong := sorted({info.topic_type for info in there} - {_TYPE}):
            return f"it carries {', '.join(wrong)}, expected {_TYPE}; change the permit's topic"
        if not self._permit.latched:
            return ""
        qualities = [info.qos_profile for info in there]
        if any(quality.durability != DurabilityPolicy.TRANSIENT_LOCAL for quality in qualities):
            return "its publisher is volatile and the permit latched: make it transient local, or say `latched: false`"
        if any(quality.reliability == ReliabilityPolicy.BEST_EFFORT for quality in qualities):
            return "its publisher is best effort and the permit latched: make it reliable, or say `latched: false`"
        return ""
