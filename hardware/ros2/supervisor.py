"""Processes that live and end together: started in order, each once the last is ready, ended in the reverse order.

Children have sessions of their own, so that Ctrl-C in a terminal reaches only the supervisor, which ends the policy before the
arm. Should the supervisor be killed, the system interrupts each child, and each child stops by itself.
"""

from __future__ import annotations

import ctypes
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from types import FrameType
from typing import Any

from hardware.ros2 import shm
from hardware.ros2.contract import LATCHED, message_type
from hardware.ros2.runtime import Ros, RosError
from hardware.ros2.services import CHANGE_STATE, TRIGGER, change_state, client, set_text
from hardware.ros2.system import Process
from hardware.ros2.topics import node_of

READY = 60.0  # [s] for a process to be there
LOOK = 4.0  # [s] for nodes that run already to be discovered, before anything is started: they announce themselves every 3 s
FOUND = 10.0  # [s] for a service that was typed to be found
CONFIGURE = 180.0  # [s] for a policy to be loaded and warmed up: the first import of torch takes long on small computers
ENDS = ((signal.SIGINT, 10.0), (signal.SIGTERM, 3.0), (signal.SIGKILL, 5.0))  # and how long each is given [s]
HALTS = ("stop", "estop")  # wanted whoever else there is
STARTS = ("start", "home")  # never come after a halt, or the end of a lifecycle state, that was typed later
DOWN = ("deactivate", "cleanup")
TRANSITIONS = ("configure", "activate", *DOWN)  # of a lifecycle node; none of them moves the arm
FIRST_CODE = 10  # exit code when the first process dies; the second: one more
_PR_SET_PDEATHSIG = 1


class _Over(Exception):
    """Time to end, with this exit code."""

    def __init__(self, code: int) -> None:
        self.code = code


class Child:
    """A process that runs, its output prefixed with its name."""

    def __init__(self, process: Process, environment: Mapping[str, str]) -> None:
        self.process = process
        self._segments: set[str] = set()
        self.popen = subprocess.Popen(
            [sys.executable, "-m", process.module, *process.arguments],
            env={**environment, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            preexec_fn=_interrupt_with_parent,
        )
        self._reader = threading.Thread(target=self._copy, name=f"output of {process.name}", daemon=True)
        self._reader.start()

    def _copy(self) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            say(line.rstrip("\n"), self.process.name)

    @property
    def code(self) -> int | None:
        """Exit code; negative: the signal that killed it; None: it runs."""
        return self.popen.poll()

    def end(self, hurry: Callable[[], bool]) -> None:
        """End it, politely first; at once where ``hurry()``."""
        for number, seconds in ENDS:
            if number != signal.SIGKILL and hurry():
                continue
            if self.code is None:
                if number != signal.SIGINT:
                    say(f"does not end; sending {number.name}", self.process.name)
                self._segments |= shm.segments(self.popen.pid)
                self.popen.send_signal(number)
            end = time.monotonic() + seconds
            while self.code is None and time.monotonic() < end and (number == signal.SIGKILL or not hurry()):
                time.sleep(0.02)
        with suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)  # what it has started itself
        self._reader.join(2.0)
        shm.remove(path for path in shm.leftovers(age=0.0) if shm.belongs(path, self._segments))

    def watch(self) -> None:
        """Remember the shared memory that it uses: if it is killed, that is deleted here."""
        self._segments |= shm.segments(self.popen.pid)


def _interrupt_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGINT)


_PRINTING = threading.Lock()


def say(text: str, who: str = "up") -> None:
    """A line of output."""
    with _PRINTING, suppress(BrokenPipeError):  # whoever reads it has gone: the arm is still ended in order
        print(f"[{who}] {text}", flush=True)


class Supervisor:
    """Runs processes until one ends, or it is told to.

    Args:
        processes: In the order of their start.
        environment: Theirs.
    """

    def __init__(self, processes: Sequence[Process], environment: Mapping[str, str]) -> None:
        self._processes, self._environment = processes, environment
        self._children: list[Child] = []
        self._first: Child | None = None  # that ended by itself, and was told of
        self._signals: list[int] = []
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._asked: list[tuple[Process, str, Any, float]] = []  # services to be called once they are found, until when
        self._answer: tuple[Any, float] | None = None  # the last call that is waited for, until when
        self._changing: list[threading.Thread] = []  # parameters and transitions that were typed
        # What a lifecycle node is still to go through without anybody's typing it: by its autostart as soon as it runs where
        # that ends with a start, else one by one from here.
        self._steps = {
            process.name: ["configure", "activate", *["start"] * process.lifecycle]
            for process in processes
            if process.lifecycle is not None
        }

    def run(self) -> int:
        """The exit code."""
        os.environ.update(self._environment)  # the supervisor's own node must speak as theirs do
        with self._handling(), Ros(signals=False) as ros:
            self._node = ros.node(f"robopolicy_up_{os.getpid()}")
            ros.spin_in_thread()
            threading.Thread(target=self._listen, name="commands", daemon=True).start()
            try:
                self._refuse_rivals()
                for process in self._processes:
                    self._start(process)
                self._came(lambda: False, None)
            except _Over as over:
                return over.code
            except RosError as error:
                say(str(error))
                return 2
            finally:
                self._end()
        raise AssertionError("unreachable: waiting for nothing ends by an exception")

    # ---- starting ------------------------------------------------------------------------------------------------------------

    def _refuse_rivals(self) -> None:
        """Nothing is started where somebody else's node has the name: transitions and `start` would reach that one."""
        self._came(lambda: False, LOOK)
        for process in self._processes:
            if process.node and self._nodes(process.node):
                raise RosError(f"a node {process.node} runs already {self._mend()}")
            for topic in process.ready:
                if others := self._node.get_publishers_info_by_topic(topic):
                    raise RosError(f"{node_of(others[0])} publishes {topic} already, as {process.name} would {self._mend()}")

    def _nodes(self, name: str) -> int:
        """How many nodes have this full name."""
        found = self._node.get_node_names_and_namespaces()
        return sum(f"{namespace.rstrip('/')}/{node}" == name for node, namespace in found)

    def _there(self, child: Child) -> bool:
        """Whether the child's node is there: on a busy computer somebody else's of its name may be found late, and before it."""
        from rclpy import get_rmw_implementation_identifier

        name, pid = child.process.node, child.popen.pid & 0xFFFF
        if get_rmw_implementation_identifier() != "rmw_fastrtps_cpp":
            return self._nodes(name) > 0
        # Bytes 4 and 5 of Fast DDS's identifiers are the process's; every node publishes its log.
        found = [info for info in self._node.get_publishers_info_by_topic("/rosout") if node_of(info) == name]
        return any(int.from_bytes(bytes(info.endpoint_gid)[4:6], "little") == pid for info in found)

    @staticmethod
    def _mend() -> str:
        domain = os.environ.get("ROS_DOMAIN_ID", "0")
        return (
            f"in ROS_DOMAIN_ID {domain}: end it, or take another domain or namespace=NAME "
            "(what was killed is forgotten after 20 s)"
        )

    def _alone(self, process: Process) -> None:
        """What is sent to the node's name reaches our process and no other."""
        if self._nodes(process.node) > 1:
            raise RosError(f"two nodes are called {process.node} {self._mend()}")

    def _start(self, process: Process) -> None:
        for service in process.services:  # found by the time somebody types them: a stop must overtake autostart
            client(self._node, f"{process.node}/{service}", TRIGGER)
        self._hear()
        steps = self._steps.get(process.name, [])
        words, by_itself = process.arguments, "start" in steps
        if by_itself:
            steps.clear()
        elif process.lifecycle:  # it was taken back
            words = tuple("autostart:=false" if word == "autostart:=true" else word for word in words)
        say(f"starting {process.name}: python -m {' '.join((process.module, *words))}")
        self._children.append(child := Child(replace(process, arguments=words), self._environment))
        for topic in process.ready:
            self._until(partial(self._node.count_publishers, topic), READY, f"topic {topic} of {process.name}")
        if process.node:
            self._until(partial(self._there, child), READY, f"node {process.node} of {process.name}")
            self._alone(process)
        if by_itself:
            self._follow(process)
        while steps:
            self._step(process, steps)
        typed = [*process.services, *(TRANSITIONS if process.lifecycle is not None else ())]
        say(f"{process.name} runs{'; type ' + ', '.join(typed) if typed else ''}")

    def _follow(self, process: Process) -> None:
        """Until a node has started by itself, or will not any more."""
        told = ["waits"]

        def hear(message: Any) -> None:
            told.append(json.loads(message.data)["autostart"])

        kind = message_type("std_msgs/msg/String")
        heard = self._node.create_subscription(kind, f"{process.node}/state", hear, LATCHED.to_ros())
        self._came(lambda: told[-1] != "waits", None)
        self._node.destroy_subscription(heard)
        if failed := re.match(r"autostart is off: (configure|activate) (refused|failed): ", told[-1]):
            raise RosError(f"{process.name} could not {failed[1]}; its lines above say why")
        say(f"start: refused: {told[-1]}" if told[-1] else "start: done")

    def _step(self, process: Process, steps: list[str]) -> None:
        """The first of them, unless what is typed before it is asked for takes it away."""
        step = steps[0]
        asked = client(self._node, f"{process.node}/change_state", CHANGE_STATE)
        self._until(lambda: asked.service_is_ready() or step not in steps, READY, f"service change_state of {process.name}")
        self._alone(process)
        self._hear()
        if step not in steps:
            return
        steps.remove(step)
        say(f"{step} {process.name}")
        if not change_state(self._node, process.node, step, CONFIGURE, partial(self._alone_until, process)):
            raise RosError(f"{process.name} could not {step}; its lines above say why")

    def _alone_until(self, process: Process, condition: Callable[[], bool], seconds: float) -> bool:
        came = self._came(condition, seconds)
        self._alone(process)
        return came

    # ---- running -------------------------------------------------------------------------------------------------------------

    def _until(self, condition: Callable[[], Any], seconds: float, what: str) -> None:
        """Wait for something that must come."""
        if not self._came(condition, seconds):
            raise RosError(f"{what} did not come within {seconds:g} s")

    def _came(self, condition: Callable[[], Any], seconds: float | None) -> bool:
        """Wait for it while everything runs: whether it came. Raises :class:`_Over` when a process ends or we are told to."""
        end = None if seconds is None else time.monotonic() + seconds
        looked = 0.0
        while not condition():
            if self._signals:
                say("ending")
                raise _Over(130 if self._signals[0] == signal.SIGINT else 143)
            for index, child in enumerate(self._children):
                if (code := child.code) is not None:
                    self._first = child
                    say(f"{child.process.name} {_ended(code)}; ending the others")
                    raise _Over(0 if code == 0 else FIRST_CODE + index)
            if end is not None and time.monotonic() > end:
                return False
            if time.monotonic() > looked + 1.0:
                looked = time.monotonic()
                for child in self._children:
                    child.watch()
            self._hear()
            self._ask()
            time.sleep(0.02)
        return True

    def _listen(self) -> None:
        """Lines that are typed; several commands in one are parted by semicolons."""
        with suppress(OSError, ValueError):  # nobody there
            if sys.stdin.isatty() and os.tcgetpgrp(sys.stdin.fileno()) != os.getpgrp():
                return  # in the background, where reading would suspend us, and the arm with us
            for line in sys.stdin:
                for command in line.split(";"):
                    self._lines.put(command.strip())

    def _hear(self) -> None:
        while not self._lines.empty():
            self._typed(self._lines.get())

    def _typed(self, line: str) -> None:
        """``SERVICE``: of the last process that has it, the policy; ``PROCESS SERVICE``: of that one; ``PROCESS set NAME VALUE``.
        A lifecycle node's transitions are typed as services are.

        Nothing waits for the answer: an `estop` must not stand in line behind a `start` that takes its time. Starts that wait
        do not come after it, either.
        """
        match line.split(maxsplit=3):
            case [name, "set", parameter, value] if process := next(
                (p for p in self._processes if p.node and p.name == name), None
            ):
                self._change(process, "set", partial(self._set, process, parameter, value))
                return
        *names, service = line.split() or [""]
        for process in reversed(self._processes):
            if service in process.services and names in ([], [process.name]):
                self._drop(process, service)
                asked = client(self._node, f"{process.node}/{service}", TRIGGER)
                wait = READY if service in HALTS else FOUND  # it may be on its way up
                self._asked.append((process, service, asked, time.monotonic() + wait))
                return
            if process.lifecycle is not None and service in TRANSITIONS and names in ([], [process.name]):
                self._drop(process, service)
                self._change(process, service, partial(self._pass, process, service))
                return
        if line:
            offered = [f"{p.name} {service}" for p in self._processes for service in p.services]
            offered += [f"{p.name} {name}" for p in self._processes if p.lifecycle is not None for name in TRANSITIONS]
            offered += [f"{p.name} set PARAMETER VALUE" for p in self._processes if p.node]
            say(f"'{line}' is none of: {', '.join(offered) or 'nothing can be typed here'}")

    def _drop(self, process: Process, typed: str) -> None:
        """A halt takes back the starts that wait; what leaves a lifecycle state, the way up at the beginning, too."""
        if typed not in (*HALTS, *DOWN):
            return
        steps = self._steps.get(process.name, [])
        dropped = [step for step in steps if typed in DOWN or step in STARTS]
        steps[:] = [step for step in steps if step not in dropped]
        starts = [call for call in self._asked if call[0] is process and call[1] in STARTS]
        self._asked = [call for call in self._asked if call not in starts]
        if dropped := [*dropped, *(call[1] for call in starts)]:
            needed = {*dropped, *{"deactivate": ("activate",), "cleanup": ("configure", "activate")}.get(typed, ())}
            on = " and ".join([*(step for step in ("configure", "activate") if step in needed), "start"])
            say(f"{process.name}: {', '.join(dropped)} dropped, for {typed} was typed; nothing starts before you type {on}")

    def _change(self, process: Process, what: str, work: Callable[[], None]) -> None:
        """A parameter or a transition; in a thread, because it waits for answers. What was typed before is done before."""
        before = [*self._changing]

        def change() -> None:
            for thread in before:
                thread.join()
            try:
                self._alone(process)
                work()
            except RosError as error:
                say(f"{process.name} {what}: refused: {error}")

        self._changing.append(threading.Thread(target=change, daemon=True))
        self._changing[-1].start()

    def _set(self, process: Process, name: str, text: str) -> None:
        say(f"{process.name}: {name} is {set_text(self._node, process.node, name, text)} now")

    def _pass(self, process: Process, transition: str) -> None:
        if not change_state(self._node, process.node, transition, CONFIGURE):
            raise RosError("its lines above say why")
        say(f"{process.name} {transition}: done")

    def _ask(self) -> None:
        """Call what was typed, as soon as it is found."""
        from std_srvs.srv import Trigger

        waiting: list[tuple[Process, str, Any, float]] = []
        self._changing = [thread for thread in self._changing if thread.is_alive()]
        for process, service, asked, end in self._asked:
            # In their order: `arm set seed 5`, then `arm reset`, then `reset` where the arm is then.
            answered = self._answer is None or self._answer[0].done() or time.monotonic() > self._answer[1]
            if service not in HALTS and (waiting or self._changing or not answered):
                waiting.append((process, service, asked, max(end, time.monotonic() + FOUND)))
            elif asked.service_is_ready() and service not in HALTS and self._nodes(process.node) > 1:
                say(f"{service}: refused: two nodes are called {process.node} {self._mend()}")
            elif asked.service_is_ready():
                name = f"{process.name} {service}"
                future = asked.call_async(Trigger.Request())
                future.add_done_callback(lambda answer, n=name: _answered(n, answer.result()))
                if service not in HALTS:
                    self._answer = future, time.monotonic() + FOUND
            elif time.monotonic() > end:
                say(f"{service}: {process.name} does not offer it; is it there yet?")
            else:
                waiting.append((process, service, asked, end))
        self._asked = waiting

    # ---- ending --------------------------------------------------------------------------------------------------------------

    def _end(self) -> None:
        """All, the last started first: a policy stands before its arm goes. A second Ctrl-C kills."""
        for child in reversed(self._children):
            child.end(lambda: len(self._signals) > 1)
            if child is not self._first:
                say(f"{child.process.name} {_ended(child.code or 0)}")

    @contextmanager
    def _handling(self) -> Iterator[None]:
        def told(number: int, frame: FrameType | None) -> None:
            self._signals.append(number)

        before = {number: signal.signal(number, told) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _answered(name: str, answer: Any) -> None:
    say(f"{name}: {'done' if answer.success else 'refused'}{': ' + answer.message if answer.message else ''}")


def _ended(code: int) -> str:
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}" if code else "has ended"
