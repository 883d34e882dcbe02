"""``ProcessPlanner``: a planner in a process of its own, which may crash, hang or run out of memory without the arm's controller.

::

    planner = ProcessPlanner(functools.partial(open_planner, "outputs/lift_flow", "rti"))
    engine = Engine(planner, dt, clock, generator)      # as with a planner of this process

The process is a fresh interpreter: it imports what the planner needs and nothing of the caller's. It takes one message per plan
and ends when its standard input closes, so it never outlives the caller, however that dies. It ignores Ctrl-C: a caller that
brakes the arm first still gets plans. Noise is drawn from the caller's generator, whose state travels there and back: plans are
those of the same planner in this process, to the bit. Images travel through memory that both share and that has no name.
Measured on two busy cores (load 5, n = 1000, median): .11 ms a plan more than in this process, .35 ms with 600 KB of images,
2.3 ms with 3.6 MB.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import pickle
import signal
import subprocess
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Mapping
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from robopolicy.deploy.chunk import Previous
from robopolicy.deploy.manifest import is_export
from robopolicy.errors import EvaluationError, RobopolicyError
from robopolicy.vector import THREAD_POOLS, anonymous_memory

if TYPE_CHECKING:
    import torch

    from robopolicy.deploy.engine import Plans
    from robopolicy.deploy.exported import ExportedPolicy
    from robopolicy.policy import Policy

_STATE = tuple[str, Any]  # of a generator of noise: whose it is, and what it says


def open_planner(
    path: str | Path, planner: Mapping[str, object] | str = "plain", steps: int | None = None, threads: int = 1
) -> Plans:
    """The planner of a checkpoint or an export: what a :class:`ProcessPlanner` is made with.

    Args:
        path: A run or checkpoint folder, or a folder of `robopolicy export`.
        planner: A name of :mod:`robopolicy.deploy.planner`, or ``{type: rti, steps: 1}``. An export knows ``plain`` only.
        steps: Of the sampler; None: the checkpoint's.
        threads: Of the network. torch has one setting for the whole process.

    Raises:
        CheckpointError, ConfigError, EvaluationError: It cannot be loaded, or has no such planner or steps.
    """
    if is_export(path):
        from robopolicy.deploy.exported import ExportedPolicy

        if steps is not None:
            raise EvaluationError(f"'{path}' is an export, its steps are fixed; export the checkpoint again with --steps {steps}")
        return planner_of(ExportedPolicy(path, threads), planner)
    import torch

    from robopolicy.distill.times import check_walk
    from robopolicy.evaluate.commands import override_steps
    from robopolicy.policy import load_policy

    torch.set_num_threads(threads)
    policy = load_policy(path)
    if steps is not None:
        override_steps(policy, steps)
        check_walk(policy, str(path))
    return planner_of(policy, planner)


def planner_of(policy: Policy | ExportedPolicy, planner: Mapping[str, object] | str) -> Plans:
    """The planner of a policy that is loaded, as :func:`open_planner` names them."""
    from robopolicy.deploy.exported import ExportedPlanner, ExportedPolicy

    if not isinstance(policy, ExportedPolicy):
        from robopolicy.deploy.planner import make_planner

        return make_planner(planner, policy)
    if planner not in ("plain", {"type": "plain"}):
        raise EvaluationError(
            f"an export has no planner '{planner}', its plans do not know of the plan before; use plain (executors pause, latest "
            "and ensemble), or its checkpoint"
        )
    return ExportedPlanner(policy)


class ProcessPlanner:
    """Plans of a planner that lives in a process of its own, for :class:`robopolicy.deploy.engine.Engine`.

    Args:
        make: Makes the planner, there. It is pickled: a function of a module, or a :func:`functools.partial` of one.
        start_limit: For the start, and for the first plan [s]: networks are loaded and warmed up in them.
        limit: For each plan after it [s]. The process is killed when it takes longer.

    Attributes:
        rows: Of its chunks.
        pid: Of the process.

    Raises:
        EvaluationError: The process died or hung while it started. What ``make`` raises for the user to mend keeps its type.
    """

    def __init__(self, make: Callable[[], Plans], *, start_limit: float = 120.0, limit: float = 5.0) -> None:
        try:
            pickle.dumps(make)
        except Exception as error:
            raise EvaluationError(
                f"inference process: {make!r} cannot be sent there ({error}); use a function of a module"
            ) from error
        self._limit, self._start_limit, self._planned = limit, start_limit, False
        self._dead: EvaluationError | None = None
        self._memory = _Memory(anonymous_memory())
        self._connection, theirs = Pipe()
        handles = theirs.fileno(), self._memory.handle
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", f"from robopolicy.deploy.process import _serve; _serve{handles}"],
                env={**os.environ, **dict.fromkeys(THREAD_POOLS, "1"), "PYTHONPATH": os.pathsep.join(sys.path)},
                pass_fds=handles,
                stdin=subprocess.PIPE,  # never written to: it closes when this process ends
                stdout=2,
                start_new_session=True,  # Ctrl-C in the terminal is the caller's to handle, from the first moment on
            )
        # Also when collected, and at exit.
        self._finalizer = weakref.finalize(self, _end, self._process, self._connection, self._memory.handle)
        try:
            self.rows: int = self._ask(make, start_limit)
        except BaseException:
            self._process.kill()
            self._finalizer()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def fault(self) -> EvaluationError | None:
        """Why there will be no more plans, if so. Waits for nothing: control may look in every period."""
        if self._dead is None and self._process.poll() is not None:
            self._dead = EvaluationError(f"the inference process, {self.pid}, {_status(self._process.returncode)}")
        return self._dead

    def plan(
        self,
        obs: Mapping[str, np.ndarray],
        previous: Previous | None,
        delay: int,
        generator: torch.Generator | np.random.Generator,
    ) -> np.ndarray:
        """The next chunks ``[B, rows, A]`` in the action's units: see :meth:`robopolicy.deploy.planner.Planner.plan`.

        Raises:
            EvaluationError: The process died or hung, now or before, or its planner failed.
        """
        told = None if previous is None else tuple(previous)
        arrays = {name: np.asarray(value, order="C") for name, value in obs.items()}
        limit = self._limit if self._planned else self._start_limit
        actions, state = self._ask(("plan", arrays, told, delay, _state(generator)), limit)
        _restore(generator, state)
        self._planned = True
        return np.asarray(actions)

    def reset(self) -> None:
        """Its planner forgets what it remembers of the episode."""
        self._ask(("reset",), self._limit)

    def close(self) -> None:
        """End the process. May be called twice."""
        self._dead = self._dead or EvaluationError("the inference process was closed; make a new planner")
        self._finalizer()

    def _ask(self, message: object, limit: float) -> Any:
        """What the process answers within ``limit`` seconds."""
        if self.fault is not None:
            raise self.fault
        try:
            self._connection.send_bytes(self._memory.pack(message))  # does not wait: what is large is in the memory
            if not self._connection.poll(limit):
                raise TimeoutError
            error, value = pickle.loads(self._connection.recv_bytes())
        except TimeoutError:
            self._dead = EvaluationError(f"the inference process, {self.pid}, gave no answer for {limit:g} s and was killed")
            self._process.kill()
            raise self._dead from None
        except (EOFError, OSError):  # it died, and its status follows; or it was closed meanwhile
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=2)
            self._process.kill()
            self._process.wait()
            assert self.fault is not None
            raise self.fault from None
        except BaseException:  # Ctrl-C: its answer would be taken for the answer to the next question
            self._process.kill()
            raise
        if error is None:
            return value
        kind, text = error
        raise kind(text) from _ChildTraceback(value)


class _ChildTraceback(Exception):
    """Carries the traceback of the process as text, for ``--debug``."""


def _status(code: int) -> str:
    """How it ended, and what to do."""
    if code == -signal.SIGKILL:
        return "was killed by SIGKILL; if memory ran out, use a smaller policy or an export"
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}; its output says why"
    return f"exited with status {code}; its output says why"


def _end(process: subprocess.Popen[bytes], connection: Connection, memory: int) -> None:
    """Politely for two seconds, and then not."""
    connection.close()
    os.close(memory)
    if process.stdin is not None:
        process.stdin.close()
    try:
        process.wait(timeout=2)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class _Memory:
    """Memory of two processes: large arrays of a message are in it, the rest is in the message."""

    def __init__(self, handle: int) -> None:
        self.handle = handle
        self._map: mmap.mmap | None = None

    def pack(self, value: object) -> bytes:
        """The message that says ``value``. The one before must have been unpacked."""
        buffers: list[pickle.PickleBuffer] = []
        message = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
        views = [buffer.raw() for buffer in buffers]
        place, end = self._mapped(sum(view.nbytes for view in views)), 0
        for view in views:
            place[end : end + view.nbytes] = view
            end += view.nbytes
        return pickle.dumps((message, [view.nbytes for view in views]))

    def unpack(self, data: bytes) -> Any:
        """What was packed, in memory of its own: a planner may keep it."""
        message, sizes = pickle.loads(data)
        place, end, buffers = self._mapped(sum(sizes)), 0, []
        for size in sizes:
            buffers.append(bytearray(place[end : end + size]))
            end += size
        return pickle.loads(message, buffers=buffers)

    def _mapped(self, size: int) -> memoryview:
        if self._map is None or len(self._map) < size:
            if os.fstat(self.handle).st_size < max(size, 1):
                os.ftruncate(self.handle, max(size, 1))
            self._map = mmap.mmap(self.handle, 0)
        return memoryview(self._map)


# ---- noise: the caller's generator, in another process -------------------------------------------------------------------------


def _state(generator: torch.Generator | np.random.Generator) -> _STATE:
    if isinstance(generator, np.random.Generator):
        return "numpy", generator.bit_generator.state
    return "torch", generator.get_state().numpy()


def _restore(generator: torch.Generator | np.random.Generator, state: _STATE) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state[1]
        return
    import torch

    generator.set_state(torch.from_numpy(state[1].copy()))


def _generator(state: _STATE) -> torch.Generator | np.random.Generator:
    made: torch.Generator | np.random.Generator
    if state[0] == "numpy":
        made = np.random.Generator(getattr(np.random, state[1]["bit_generator"])())
    else:
        import torch

        made = torch.Generator()
    _restore(made, state)
    return made


# ---- the process ---------------------------------------------------------------------------------------------------------------


def _serve(socket: int, memory: int) -> None:
    """The main function of the process: answers messages until the caller is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_the_caller, daemon=True).start()
    connection, shared = Connection(socket), _Memory(memory)
    planner: Any = None
    with contextlib.suppress(EOFError, OSError):
        while True:
            data = connection.recv_bytes()
            answer: tuple[Any, Any]
            try:
                message = shared.unpack(data)
                if planner is None:
                    planner = message()
                    answer = None, planner.rows
                else:
                    answer = None, _do(planner, *message)
            except Exception as error:
                answer = _described(error), traceback.format_exc()
            connection.send_bytes(pickle.dumps(answer, protocol=5))


def _do(planner: Plans, name: str, *arguments: Any) -> Any:
    if name == "reset":
        return planner.reset()
    obs, previous, delay, state = arguments
    generator: Any = _generator(state)
    actions = planner.plan(obs, None if previous is None else Previous(*previous), delay, generator)
    return actions, _state(generator)


def _described(error: Exception) -> tuple[type[RobopolicyError], str]:
    if isinstance(error, RobopolicyError):
        return type(error), str(error)
    return EvaluationError, "inference: " + " ".join(f"{type(error).__name__}: {error}".split())


def _die_with_the_caller() -> None:
    """At once, in the middle of a plan that hangs, too."""
    with contextlib.suppress(OSError):
        while os.read(0, 4096):
            pass
    os._exit(0)
