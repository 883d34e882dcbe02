"""``eval --robot``: a policy through the arm's control path, on the simulated arm faster than time, and over ROS 2."""

import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from rig import HOME, save_policy
from ros import Sandbox

from robopolicy import cli
from robopolicy.errors import ConfigError, EvaluationError, TaskError
from robopolicy.evaluate.record import load_evaluation
from robopolicy.evaluate.robot import OnRobot, evaluate_on_robot, find_robot
from robopolicy.robot import Sample
from robopolicy.task import TaskSpec
from sim.arm.robot import SimArm

SEEDS = [200_000, 200_001]


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
    """

    resets, home = False, HOME
    made: ClassVar[list["Real"]] = []

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        super().reset(0)
        self.begun: list[np.ndarray] = []  # where episodes began
        self.sent: list[np.ndarray] = []
        self.made.append(self)

    def reset(self, seed: int | None = None) -> None:
        self.begun.append(self.state().positions)

    def command(self, positions: np.ndarray) -> None:
        self.sent.append(positions.copy())
        super().command(positions)


class Homeless(Real):
    """Nobody knows where its episodes begin."""

    home = None  # type: ignore[assignment]


class Blocked(Real):
    """Something is in its way."""

    def command(self, positions: np.ndarray) -> None:
        self.sent.append(positions.copy())


class Elsewhere(Real):
    """The cube is where no demonstration began; the guard is for arms on the machine's clock."""

    follows_clock = False

    def observe(self) -> Sample:
        sample = super().observe()
        return sample._replace(values={**sample.values, "cube_pos": sample.values["cube_pos"] + 5.0})


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
    Real.made.clear()
    done = on(policy, "test_evaluate_robot:Real", seconds=1.0)
    assert [e.length for e in done.evaluation.episodes] == [20, 20]
    (robot,) = Real.made
    looked, first, left, second = robot.begun  # before it goes home, and there
    assert np.abs(looked - left).max() > 0.03, "the first episode has moved it"
    for at in (first, second):
        assert np.abs(at - Real.home)[:7].max() < 0.02
    assert np.abs(np.diff(robot.sent, axis=0)).max() * 250 < 3.0, "no jump"


def test_where_no_episode_may_begin_nothing_moves_and_the_reason_is_one_line(policy: Any) -> None:
    with pytest.raises(EvaluationError, match=r"Homeless' does not begin episodes by itself.*give its profile"):
        on(policy, "test_evaluate_robot:Homeless")
    with pytest.raises(EvaluationError, match=r"seed 200000 cannot begin, the arm did not get home: (home_lag|tracking)"):
        on(policy, "test_evaluate_robot:Blocked")
    Real.made.clear()
    with pytest.raises(EvaluationError, match=r"never trained from here: start_unfamiliar cube_pos.*; no demonstration"):
        on(policy, "test_evaluate_robot:Elsewhere")
    assert np.abs(Real.made[0].sent[-1] - HOME)[:7].max() < 0.02, "it stays at home"


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
