"""Requests of other threads to the control thread, and what came of them."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any, NamedTuple

_MENDS = {  # of refused starts, by what they say
    "start_moved": "if somebody moved the arm on purpose: reset first, then start",
    "start_unfamiliar": "no demonstration began like this: put the arm or the object back, or go home",
    "deadman": "nothing moves unless the deadman is held, and says so more often than that: hold it, then ask again",
    "clock_ahead": "the sender's clock is ahead by so many seconds, so nobody sees how old its messages are: run chrony on both",
    "stuck": "the same to the bit for so many seconds: restart that sensor; if it has no noise, `stuck: null` in the profile",
}
REQUESTS = ("idle", "start", "stop", "mute", "home", "estop", "reset", "deadman")
_PASSING = ("start", "home", "reset")  # done while somebody waits for it, or never; a stop is done however late


def mend(refusal: str) -> str:
    """What to do about a refused start, to be put behind it; empty where the refusal says so itself."""
    return next((f"; {what}" for kind, what in _MENDS.items() if kind in refusal), "")


class Answer(NamedTuple):
    """What came of a request."""

    name: str
    ok: bool
    message: str


class Ticket:
    """A request on its way to the control thread.

    Attributes:
        name, arguments, asked: What was asked for, and when [s].
        answer: What came of it; None: nothing yet.
    """

    def __init__(self, name: str, arguments: Mapping[str, Any], asked: float) -> None:
        self.name, self.arguments, self.asked = name, arguments, asked
        self.answer: Answer | None = None
        self._done, self._first = threading.Event(), threading.Lock()

    def wait(self, timeout: float = 1.0) -> tuple[bool, str]:
        """Whether it was done, and what there is to say. Takes a period; longer only when control hangs.

        Nobody waits for it then any more: a start, or what prepares one, is taken back, so that it is not granted later.
        """
        self._done.wait(timeout)
        answer, late = self.answer, f"control has not answered within {timeout:g} s; it hangs or does not run"
        if answer is None and self.name in _PASSING:
            answer = self.settle(False, late)
        return (False, late) if answer is None else (answer.ok, answer.message)

    def settle(self, ok: bool, message: str) -> Answer:
        """What came of it, unless that is known already: the first word counts, and is the answer."""
        with self._first:
            if self.answer is None:
                self.answer = Answer(self.name, ok, message)
                self._done.set()
            return self.answer
