"""``eval --robot``: a policy through the arm's control path, on the simulated arm faster than time, and over ROS 2."""

import io
import json
import os
import pty
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from rig import HOME, PROFILE, save_policy
from ros import Sandbox

from robopolicy import cli
from robopolicy.errors import ConfigError, EvaluationError, TaskError
from robopolicy.evaluate.record import load_evaluation
from robopolicy.evaluate.robot import OnRobot, UnfinishedError, evaluate_on_robot, find_robot
from robopolicy.robot import Sample
from robopolicy.task import TaskSpec
from sim.arm.robot import SimArm

SEEDS = [200_000, 200_001]
DT = 1.0 / PROFILE.safety.rate


class Lucky(SimArm):
    """Succeeds after 0.4 s where the seed is even."""

    even = begun_at = 0.0

    def reset(self, seed: int | None = None) -> None:
        super().reset(seed)
        self.begun_at, self.even = self._clock.now(), float(seed is not None and seed % 2 == 0)

    @property
    def success(self) -> bool:
        return bool(self.even) and self._clock.now() > self.begun_at + 0.4

    @success.setter
    def success(self, value: bool) -> None:
        pass


class Blind(SimArm):
    """Nobody says what it achieves; and time is the machine's."""

    follows_clock = False

    @property
    def success(self) -> Any:
        return None

    @success.setter
    def success(self, value: bool) -> None:
        pass

    def reset(self, seed: int | None = None) -> None:
        raise AssertionError("it was moved")


class Real(SimArm):
    """An arm that is where it was left, though on a fake clock.

    Attributes:
        made: Those of this test.
        wait: How long a reset takes [s]: it waits for messages.
        begun: Where it was at resets.
        sent: Commands, with their times.
        on_command: Called with each.
    """

    resets, home, limits = False, HOME, PROFILE.safety
    wait = 0.1
    made: ClassVar[list["Real"]] = []
    on_command: ClassVar[Callable[["Real"], Any]] = lambda robot: None
    masters: ClassVar[list[str]] = []

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        super().reset(0)
        self.begun: list[np.ndarray] = []
        self.sent: list[tuple[float, np.ndarray]] = []
        self.made.append(self)

    def reset(self, seed: int | None = None) -> None:
        self._clock.sleep_until(self._clock.now() + self.wait)
        self.begun.append(self.state().positions)
        self.success = False

    def hindrances(self) -> list[str]:
        return self.masters

    def hear(self, request: Callable[..., Any]) -> None:
        self.request = request

    def command(self, positions: np.ndarray) -> None:
        self.sent.append((self._clock.now(), positions.copy()))
        super().command(positions)
        type(self).on_command(self)


class Homeless(Real):
    """Nobody knows where its episodes begin."""

    home = None  # type: ignore[assignment]


class Blocked(Real):
    """Something is in its way."""

    def command(self, positions: np.ndarray) -> None:
        self.sent.append((self._clock.now(), positions.copy()))


class Careful(Real):
    """It moves only while a deadman is held."""

    limits = PROFILE.safety.model_copy(update={"freshness": PROFILE.safety.freshness.model_copy(update={"deadman": 0.25})})


class Deaf(SimArm):
    """It says that its reset moves nothing, and not what else is needed."""

    resets = False


class Silent(SimArm):
    """It does not say what its reset does."""

    follows_clock = False

    @property
    def resets(self) -> bool:  # type: ignore[override]
        raise AttributeError("resets")


class Elsewhere(Real):
    """The cube is where no demonstration began; the guard is for arms on the machine's clock."""

    follows_clock = False

    def observe(self) -> Sample:
        sample = super().observe()
        return sample._replace(values={**sample.values, "cube_pos": sample.values["cube_pos"] + 5.0})


@pytest.fixture(autouse=True)
def real(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Real, "made", [])
    monkeypatch.setattr(Real, "masters", [])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    save_policy(folder)
    return folder


@pytest.fixture(scope="module")
def policy(checkpoint: Path) -> Any:
    from robopolicy.policy import load_policy

    return load_policy(checkpoint)


def on(policy: Any, robot: str, **options: Any) -> OnRobot:
    options = {"seconds": 0.5, "progress": False, **options}
    return evaluate_on_robot(policy, TaskSpec("lift"), SEEDS, robot=robot, **options)


def test_the_simulated_arm_gives_the_same_figures_each_time(policy: Any) -> None:
    first, again = on(policy, "arm"), on(policy, "arm")
    assert [e.seed for e in first.evaluation.episodes] == SEEDS
    assert [e.length for e in first.evaluation.episodes] == [10, 10]
    assert first.report["jerk_rms"] == again.report["jerk_rms"]
    assert first.report["lateness_ms"]["max"] == 0.0  # a fake clock
    assert max(first.report["jerk_rms"].values()) > 0.0  # it moved
    assert first.report["jerk_rms"] != on(policy, "arm", delay=0.1).report["jerk_rms"]
    assert first.stops == {}


def test_episodes_end_with_success(policy: Any) -> None:
    done = on(policy, "test_evaluate_robot:Lucky")
    assert [e.success for e in done.evaluation.episodes] == [True, False]
    assert [e.max_reward for e in done.evaluation.episodes] == [1.0, 0.0]
    first, second = (e.length for e in done.evaluation.episodes)
    assert first <= 9 < second == 10
    assert done.lines()[0].startswith("success          1/2")


def test_an_arm_that_does_not_reset_itself_goes_home_before_each_episode(policy: Any) -> None:
    done = on(policy, "test_evaluate_robot:Real", seconds=1.0)
    assert [e.length for e in done.evaluation.episodes] == [20, 20]
    (robot,) = Real.made
    assert len(robot.begun) == 2
    for at in robot.begun:
        assert np.abs(at - Real.home)[:7].max() < 0.02
    assert max(np.abs(positions - Real.home)[:7].max() for _, positions in robot.sent) > 0.03, "the episodes have moved it"
    assert done.report["ticks"] == 200, "ways home are no part of the figures"


def test_a_real_arm_comes_to_rest_before_anything_is_waited_for(policy: Any) -> None:
    """Between commands it stands, and nowhere does it change its speed faster than the limits allow."""
    on(policy, "test_evaluate_robot:Real", seconds=0.7)
    (robot,) = Real.made
    most = np.array([c.acceleration for c in Real.limits.coordinates]) * Real.limits.scale.acceleration
    times, positions = np.array([t for t, _ in robot.sent]), np.array([p for _, p in robot.sent])
    breaks = np.flatnonzero(np.diff(times) > 1.5 * DT) + 1
    assert len(breaks) == 2, "it is reset where each episode begins"
    for part in np.split(positions, breaks):
        path = np.concatenate([part[:1], part[:1], part, part[-1:], part[-1:]])  # a controller holds what came last
        assert (np.abs(np.diff(path, 2, axis=0)).max(axis=0) <= 1.01 * most * DT**2).all()


def test_the_emergency_stop_ends_the_evaluation_and_what_was_done_is_kept(
    policy: Any, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def press(robot: Real) -> None:
        if len(robot.begun) == 2:  # in the second episode
            robot.request("estop", why="topic estop")

    monkeypatch.setattr(Real, "on_command", press)
    with pytest.raises(UnfinishedError, match="2 of 3 episodes were run, then: estop topic estop; release it") as raised:
        evaluate_on_robot(
            policy, TaskSpec("lift"), [*SEEDS, 200_002], robot="test_evaluate_robot:Real", seconds=0.5, progress=False
        )
    done = raised.value.done
    assert [e.success for e in done.evaluation.episodes] == [False, False], "who is stopped by a person has failed"
    assert done.evaluation.episodes[1].length < 10
    assert done.stops == {"estop topic estop": 1}
    assert "episodes         2 of 3" in done.lines()
    arguments = ["--robot", "test_evaluate_robot:Real", "--episodes", "3", "--seconds", "0.5", "--out", str(tmp_path)]
    assert cli.main(["eval", str(checkpoint), *arguments]) == 2
    assert "2 of 3 episodes were run" in capsys.readouterr().err
    assert [e.seed for e in load_evaluation(tmp_path / "eval.json").episodes] == SEEDS


def test_a_second_master_stops_the_arm_on_its_way_home(policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Real, "masters", ["2 nodes publish"])
    with pytest.raises(EvaluationError, match="2 nodes publish"):
        on(policy, "test_evaluate_robot:Real")
    assert Real.made[0].sent == [], "it never began"
    monkeypatch.setattr(Real, "masters", [])

    def come(robot: Real) -> None:
        if len(robot.sent) == 20:
            robot.request("stop", why="rival: 2 nodes publish")

    monkeypatch.setattr(Real, "on_command", come)
    with pytest.raises(EvaluationError, match="did not get home: rival: 2 nodes publish"):
        on(policy, "test_evaluate_robot:Real")
    assert len(Real.made[1].sent) < 200


@pytest.mark.parametrize(
    ("name", "why", "kind"),
    [
        ("stop", "rival: 2 nodes publish", "rival"),
        ("mute", "permit 'program': '/runs' says false; press play", "permit 'program'"),
    ],
)
def test_what_ends_the_leave_to_move_is_no_failure_of_the_policy(
    policy: Any, monkeypatch: pytest.MonkeyPatch, name: str, why: str, kind: str
) -> None:
    def end(robot: Real) -> None:
        if len(robot.begun) == 2:
            robot.request(name, why=why)

    monkeypatch.setattr(Real, "on_command", end)
    with pytest.raises(UnfinishedError, match=rf"1 of 2 .* seed 200001 was stopped and does not count, {kind}: ") as raised:
        on(policy, "test_evaluate_robot:Real")
    assert [episode.seed for episode in raised.value.done.evaluation.episodes] == SEEDS[:1]
    assert raised.value.done.stops == {kind: 1}


def test_limits_with_a_deadman_ask_for_one(policy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EvaluationError, match=r"deadman: inf, limit 0.25; nothing moves unless the deadman is held"):
        on(policy, "test_evaluate_robot:Careful")
    assert Real.made[0].sent == []
    limits = tmp_path / "limits.yaml"
    limits.write_text(Careful.limits.model_dump_json())
    with pytest.raises(EvaluationError, match=r"deadman, which robot 'arm' does not hear.*--limits without freshness.deadman"):
        on(policy, "arm", limits=str(limits))
    wait = Careful.hindrances  # asked before each way home

    def hold(robot: Real) -> list[str]:
        robot.request("deadman", pressed=True)
        return wait(robot)  # type: ignore[arg-type]

    def let_go(robot: Real) -> None:
        robot.request("deadman", pressed=len(robot.sent) < 50)

    monkeypatch.setattr(Careful, "hindrances", hold)
    monkeypatch.setattr(Real, "on_command", let_go)
    with pytest.raises(EvaluationError, match="did not get home: deadman released"):
        on(policy, "test_evaluate_robot:Careful")
    assert 50 <= len(Real.made[-1].sent) < 200


def test_a_robot_says_what_its_reset_does(policy: Any) -> None:
    with pytest.raises(EvaluationError, match=r"'test_evaluate_robot:Silent' does not say whether its reset .* 'resets = True'"):
        on(policy, "test_evaluate_robot:Silent")
    with pytest.raises(EvaluationError, match="no home and no limits and no hindrances and no hear; RealRobot in"):
        on(policy, "test_evaluate_robot:Deaf")


class Terminal:
    """What a person sees, who presses a key once she has read so much."""

    def __init__(self, keyboard: int, stdin: Any) -> None:
        self.keyboard, self.stdin, self.seen, self.answers = keyboard, stdin, io.StringIO(), list[tuple[str, bytes]]()

    def write(self, text: str) -> int:
        if self.answers and self.answers[0][0] in text:
            os.write(self.keyboard, self.answers.pop(0)[1])
        return self.seen.write(text)

    def flush(self) -> None:
        pass

    def on(self, policy: Any) -> OnRobot:
        with pytest.MonkeyPatch.context() as patch:  # pytest gives each phase of a test streams of its own
            patch.setattr(sys, "stdin", self.stdin)
            patch.setattr(sys, "stderr", self)
            return on(policy, "test_evaluate_robot:Real")


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    keyboard, computer = pty.openpty()
    with os.fdopen(computer, "r") as stdin:
        yield Terminal(keyboard, stdin)
    os.close(keyboard)


def test_no_enter_typed_ahead_moves_the_arm_and_control_d_is_one_line(policy: Any, terminal: Terminal) -> None:
    os.write(terminal.keyboard, b"\n\n\n")
    terminal.answers = [("The arm goes home, and its gripper, too", b"\x04")]
    with pytest.raises(EvaluationError, match=r"the terminal was closed \(Ctrl-D\)"):
        terminal.on(policy)
    assert Real.made[0].sent == []


def test_a_person_at_a_terminal_is_asked_and_asked_again(
    policy: Any, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Real, "masters", ["2 nodes publish"])
    terminal.answers = [
        ("The arm goes home", b"\n"),  # and finds a second master
        ("The arm goes home", b"\n"),
        ("objects of seed 200000", b"\n"),
        ("objects of seed 200001", b"\n"),  # without being asked whether it may go home
    ]
    seen = terminal.write

    def write(text: str) -> int:
        if "2 nodes publish" in text:
            monkeypatch.setattr(Real, "masters", [])
        return seen(text)

    monkeypatch.setattr(terminal, "write", write)
    done = terminal.on(policy)
    assert [e.seed for e in done.evaluation.episodes] == SEEDS
    assert terminal.answers == []
    assert terminal.seen.getvalue().count("press Enter") == 4


def test_an_emergency_stop_is_heard_while_a_person_is_waited_for(policy: Any, terminal: Terminal) -> None:
    pressed = threading.Event()
    terminal.answers = [("The arm goes home", b"")]
    seen = terminal.write

    def write(text: str) -> int:
        if "The arm goes home" in text and not pressed.is_set():
            pressed.set()
            Real.made[0].request("estop", why="topic estop")
        return seen(text)

    terminal.write = write  # type: ignore[method-assign]
    with pytest.raises(EvaluationError, match="estop topic estop; release it"):
        terminal.on(policy)
    assert Real.made[0].sent == []


def test_where_no_episode_may_begin_nothing_moves_and_the_reason_is_one_line(policy: Any) -> None:
    with pytest.raises(EvaluationError, match=r"Homeless' does not begin episodes by itself.*give its profile"):
        on(policy, "test_evaluate_robot:Homeless")
    with pytest.raises(EvaluationError, match=r"seed 200000 cannot begin, the arm did not get home: (home_lag|tracking)"):
        on(policy, "test_evaluate_robot:Blocked")
    with pytest.raises(EvaluationError, match=r"never trained from here: start_unfamiliar cube_pos.*; no demonstration"):
        on(policy, "test_evaluate_robot:Elsewhere")
    assert np.abs(Real.made[-1].sent[-1][1] - HOME)[:7].max() < 0.02, "it stays at home"


def test_what_does_not_fit_is_said_before_anything_moves(policy: Any) -> None:
    with pytest.raises(ConfigError, match="did you mean 'ros2'"):
        find_robot("ros")
    with pytest.raises(TaskError, match="takes no argument 'speed'"):
        on(policy, "arm", robot_args={"speed": 3})
    with pytest.raises(EvaluationError, match="cannot say when an episode succeeded"):
        on(policy, "test_evaluate_robot:Blind")
    with pytest.raises(EvaluationError, match="leave --delay out"):
        on(policy, "test_evaluate_robot:Blind", delay=0.1)
    with pytest.raises(TaskError, match=r"the robot has .*; check --robot-arg"):
        on(policy, "arm", robot_args={"obs": ["ee_pos"]})
    with pytest.raises(ConfigError, match="no preset of safety limits 'none'"):
        on(policy, "arm", limits="none")


def test_the_verb_refuses_what_belongs_to_robots_without_one(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", str(checkpoint), "--seconds", "3"]) == 2
    assert "name one with --robot" in capsys.readouterr().err
    assert cli.main(["eval", str(checkpoint), str(checkpoint), "--robot", "arm"]) == 2
    assert "takes one checkpoint" in capsys.readouterr().err


def test_over_ros_in_processes_of_their_own(checkpoint: Path, ros: Sandbox, tmp_path: Path) -> None:
    arm = ros.start("hardware.ros2.virtual_arm", profile="virtual", cameras=False)
    arguments = ["--robot", "ros2", "--robot-arg", "profile=virtual", "--episodes", "2", "--seconds", "1", "--out", str(tmp_path)]
    assert cli.main(["eval", str(checkpoint), *arguments]) == 0, arm.output()
    done = load_evaluation(tmp_path / "eval.json")
    assert [e.seed for e in done.episodes] == SEEDS
    assert all(e.length >= 20 for e in done.episodes)
    from std_srvs.srv import Trigger

    record = json.loads(ros.call(Trigger, "virtual_arm/record").message)  # of the simulator, not of the robot's own account
    assert record["moved_at"] is not None
    assert record["reflex"] in ("", None, False)
