"""Permits: topics that must say true for the arm to be commanded, see :class:`hardware.ros2.profile.Permit`."""

from __future__ import annotations

from typing import Any

from hardware.ros2.profile import Permit
from hardware.ros2.runtime import RosClock

_SECOND = 1.0  # [s]: a false counts for so long, whatever follows; and so long may one be silent that is not latched


class Word:
    """What was said on a permit's topic. Written by the thread of the topics, read by any.

    A word holds while the publisher that said it is there: a latched true of a driver that has begun anew says nothing of it.

    Args:
        name: Of the permit.
        permit: Its topic, and what a person does.
        node: Knows who publishes.
        clock: Of :meth:`missing`.
    """

    def __init__(self, name: str, permit: Permit, node: Any, clock: RosClock) -> None:
        self._name, self._permit, self._node, self._clock = name, permit, node, clock
        self._said: dict[bytes | None, tuple[bool, float]] = {}  # by publisher; None: nobody says whose it is
        self._false = float("-inf")  # when it was last said

    def take(self, message: Any, origin: bytes | None = None) -> None:
        """The subscription's callback, see :func:`hardware.ros2.inputs.with_origin`."""
        now = self._clock.now()
        if not message.data:
            self._false = now
        self._said[origin] = bool(message.data), now

    def missing(self, path: str) -> str:
        """Why the arm must not be commanded, and what to do; empty: it may. ``path``: the topic's full name. 80 us."""
        there = {bytes(info.endpoint_gid) for info in self._node.get_publishers_info_by_topic(path)}
        words = [word for origin, word in self._said.copy().items() if there and (origin is None or origin in there)]
        now, mend = self._clock.now(), self._permit.mend
        if not there:
            why, mend = f"nobody publishes '{path}'", "start the driver; docs/profiles.md has more on permits"
        elif not words:
            why = f"nothing has come on '{path}'"
        elif not all(said for said, _ in words):
            why = f"'{path}' says false"
        elif now - self._false <= _SECOND:
            why, mend = f"'{path}' has just said false", "it says true again: find out why, then start"
        elif not self._permit.latched and now - min(came for _, came in words) > _SECOND:
            why, mend = f"'{path}' has been silent for more than {_SECOND:g} s", "look after the node that says it"
        else:
            return ""
        return f"permit '{self._name}': {why}; {mend}"
