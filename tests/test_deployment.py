"""What a deployment is assembled of, and what diagnostics say of it: no node, no topics."""

import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rig import save_policy

from hardware.ros2.contract import NODE_SERVICES, NODE_TOPICS
from hardware.ros2.deployment import DeployConfig, check_fit, deploy, limits_of, profile_of, task_of
from hardware.ros2.diagnostics import Level, health
from hardware.ros2.parameters import NodeConfig
from hardware.ros2.profile import load_profile
from robopolicy.deploy.clock import SystemClock
from robopolicy.deploy.export import export
from robopolicy.deploy.status import Answer, Status
from robopolicy.errors import CheckpointError, ConfigError, EvaluationError
from robopolicy.features import Feature
from sim.arm.robot import SimArm

PROFILE = load_profile("virtual")


def config(folder: Path, **changes: Any) -> DeployConfig:
    return DeployConfig(checkpoint=str(folder), inference="thread", **changes)


@pytest.fixture
def arm() -> SimArm:
    made = SimArm("lift", SystemClock())
    made.reset(0)
    return made


def test_a_checkpoint_and_its_export_both_drive_the_robot(tmp_path: Path, arm: SimArm) -> None:
    policy = save_policy(tmp_path / "policy")
    export(policy, tmp_path / "export", "torchscript", checkpoint=tmp_path / "policy")
    assert task_of(str(tmp_path / "policy")) == ("lift", {})
    for folder in (tmp_path / "policy", tmp_path / "export"):
        deployment = deploy(config(folder), arm, SystemClock())
        arbiter = deployment.activate()
        assert arbiter.request("start").wait() == (True, "policy begins")
        deployment.deactivate()
        assert deployment.arbiter is None
        assert arbiter.safety.still
        assert arbiter.log.rows()["executed"].shape[1] == len(arm.names)
        deployment.close()
    with pytest.raises(EvaluationError, match="export has no planner 'rtc'"):
        deploy(config(tmp_path / "export", planner="rtc"), arm, SystemClock())
    with pytest.raises(EvaluationError, match="steps are fixed"):
        deploy(config(tmp_path / "export", steps=4), arm, SystemClock())


def test_settings_are_names_or_yaml_and_wrong_ones_name_the_right(tmp_path: Path, arm: SimArm) -> None:
    save_policy(tmp_path)
    deploy(config(tmp_path, executor="{type: ensemble, m: 0.1}", planner="{type: rti, steps: 1}"), arm, SystemClock()).close()
    with pytest.raises(ConfigError, match="did you mean 'latest'"):
        deploy(config(tmp_path, executor="lates"), arm, SystemClock())
    with pytest.raises(ConfigError, match="did you mean 'virtual'"):
        profile_of(DeployConfig(profile="virtul"))
    with pytest.raises(ConfigError, match="checkpoint"):
        task_of("")
    with pytest.raises(CheckpointError):
        deploy(config(tmp_path / "nowhere"), arm, SystemClock())


def test_a_policy_of_another_robot_is_refused_and_says_what_differs(tmp_path: Path, arm: SimArm) -> None:
    policy = save_policy(tmp_path)
    policy.observation_features = {**policy.observation_features, "front": Feature("front", (48, 64, 3), "uint8")}
    with pytest.raises(ConfigError, match="needs observation 'front', the robot has cube_pos"):
        check_fit(policy, arm)
    turned = Feature("qpos", (7,), "float32", "rad", tuple(f"joint{i}" for i in (2, 1, 3, 4, 5, 6, 7)), 20.0)
    policy.observation_features = {"qpos": turned}
    with pytest.raises(ConfigError, match="observation 'qpos': the policy was trained with names"):
        check_fit(policy, arm)
    policy.observation_features = {"qpos": Feature("qpos", (7,), unit="deg")}
    with pytest.raises(ConfigError, match="trained with unit deg, the robot has rad"):
        check_fit(policy, arm)


@settings(max_examples=25, deadline=None)
@given(
    speed_scale=st.floats(0.01, 1.0),
    rate=st.one_of(st.just(0.0), st.floats(21.0, 1000.0)),
    deadman=st.booleans(),
    mode=st.sampled_from(["live", "shadow"]),
    replan=st.integers(0, 1000),
    fifo=st.integers(0, 99),
)
def test_no_parameter_widens_a_limit_or_switches_a_watchdog_off(**values: Any) -> None:
    wanted = DeployConfig(**values)
    limits, rated = limits_of(wanted, profile_of(wanted)), PROFILE.safety
    assert limits.coordinates == rated.coordinates
    assert limits.workspace == rated.workspace
    assert limits.scale.velocity <= rated.scale.velocity
    assert (limits.scale.acceleration, limits.scale.jerk) == (rated.scale.acceleration, rated.scale.jerk)
    assert limits.freshness.model_copy(update={"deadman": None}) == rated.freshness
    assert (limits.freshness.deadman is not None) == values["deadman"]


def test_limits_with_a_deadman_ask_for_it_whatever_the_parameter_says() -> None:
    fresh = PROFILE.safety.freshness.model_copy(update={"deadman": 0.1})
    profile = PROFILE.model_copy(update={"limits": PROFILE.safety.model_copy(update={"freshness": fresh})})
    assert limits_of(DeployConfig(deadman=False), profile).freshness.deadman == 0.1
    assert limits_of(DeployConfig(deadman=True), profile).freshness.deadman == 0.1


def test_a_robot_that_does_not_get_its_inference_process_leaves_none_behind(
    tmp_path: Path, arm: SimArm, monkeypatch: pytest.MonkeyPatch
) -> None:
    import hardware.ros2.deployment as module

    made: list[Any] = []

    class Process(module.ProcessPlanner):
        def __init__(self, make: Any) -> None:
            super().__init__(make)
            made.append(self)

    monkeypatch.setattr(module, "ProcessPlanner", Process)
    monkeypatch.setattr(arm, "observe", lambda: 1 / 0)
    save_policy(tmp_path)
    with pytest.raises(ZeroDivisionError):
        deploy(DeployConfig(checkpoint=str(tmp_path)), arm, SystemClock())
    assert not Path(f"/proc/{made[0].pid}").exists()


def test_control_that_does_not_begin_is_said_and_leaves_no_second_thread(
    tmp_path: Path, arm: SimArm, monkeypatch: pytest.MonkeyPatch
) -> None:
    import hardware.ros2.deployment as module

    save_policy(tmp_path)
    deployment = deploy(DeployConfig(checkpoint=str(tmp_path), inference="thread"), arm, SystemClock())
    with monkeypatch.context() as broken:
        broken.setattr(module, "_END", 0.1)
        broken.setattr(module.Arbiter, "run", lambda self, until: until.wait())
        with pytest.raises(EvaluationError, match="control has not begun"):
            deployment.activate()
    deployment.activate()
    assert [thread.name for thread in threading.enumerate()].count("control") == 1
    deployment.close()


# ---- diagnostics ---------------------------------------------------------------------------------------------------------------


def status(**changes: Any) -> Status:
    numbers = {"p50": 1.0, "p99": 2.0}
    values: dict[str, Any] = {
        "time": 10.0, "mode": "running", "source": "policy", "shadow": False, "cause": "", "muted": "", "reasons": (),
        "request": Answer("start", True, "policy begins"), "fault": "", "deadman": None, "names": ("a", "b"),
        "measured": (0.0, 0.0), "set_point": (0.0, 0.0), "ages": {"state": 0.01, "front": 0.1, "command": 0.3}, "rate": 100.0,
        "lateness_ms": numbers, "work_ms": numbers, "periods": 1000, "skipped": 0, "missed": 0, "counters": {}, "events": {},
        "reports": {"policy": {"inference_ms": numbers, "chunks": 3, "starved": 0}}, "notes": (),
    }  # fmt: skip
    return Status(**{**values, **changes})


NONE_YET = {"policy": {"inference_ms": {"p50": float("nan"), "p99": float("nan")}}}


@pytest.mark.parametrize(
    ("changes", "entry", "level", "says"),
    [
        ({}, "control", Level.OK, "running: policy"),
        ({"mode": "holding", "cause": "stale state: 0.2, limit 0.15"}, "control", Level.WARN, "stale state"),
        ({"mode": "stopped", "cause": "asked"}, "control", Level.OK, "asked"),
        ({"mode": "stopped", "cause": "home reached"}, "control", Level.OK, "home reached"),
        ({"mode": "stopped", "cause": "tracking joint3: 0.3, limit 0.2"}, "control", Level.ERROR, "joint3"),
        ({"mode": "estopped", "cause": "estop asked"}, "control", Level.ERROR, "estop asked"),
        ({"ages": {"state": 0.2}}, "inputs", Level.ERROR, "state is 0.20 s old, limit 0.15"),
        ({"ages": {"front": 0.2}}, "inputs", Level.OK, "fresh"),
        ({"ages": {"front": float("nan")}}, "inputs", Level.ERROR, "front"),
        ({"missed": 30}, "timing", Level.WARN, "3.00% of periods missed"),
        ({"rate": 70.0}, "timing", Level.WARN, "70.0 of 100 Hz"),
        ({}, "inference", Level.OK, "p50 1.0 ms, p99 2.0 ms"),
        ({"mode": "stopped", "cause": "inference the process was killed"}, "inference", Level.ERROR, "killed"),
        ({"reports": {}}, "inference", Level.OK, "nothing planned yet"),
        ({"reports": NONE_YET}, "inference", Level.OK, "nothing planned yet"),
        ({"mode": "stopped", "cause": "asked", "muted": "2 nodes"}, "control", Level.ERROR, "asked; nothing is sent until"),
        ({"time": 8.0}, "control", Level.ERROR, "no control period for 2.1 s: control hangs"),
    ],
)
def test_diagnostics_say_what_is_wrong_and_how_bad_it_is(changes: dict[str, Any], entry: str, level: Level, says: str) -> None:
    found = {one.name: one for one in health(status(**changes), 10.1, PROFILE.safety, {"front: nan": 3})}
    assert found[entry].level == level
    assert says in found[entry].message
    assert all(isinstance(value, str) for one in found.values() for value in one.values.values())


def test_a_dead_inference_process_is_an_error_whatever_was_asked_for_since() -> None:
    found = health(status(mode="stopped", cause="asked", reports=NONE_YET), 10.1, PROFILE.safety, {}, "it was killed by SIGKILL")
    assert next((one.level, one.message) for one in found if one.name == "inference") == (Level.ERROR, "it was killed by SIGKILL")


def test_before_the_first_period_nothing_hangs() -> None:
    before = status(time=float("nan"), periods=0, rate=0.0, lateness_ms={}, work_ms={}, ages={}, set_point=None)
    assert {one.level for one in health(before, 10.0, PROFILE.safety, {})} == {Level.OK}
    assert np.isnan(before.time)


# ---- docs/ros2.md --------------------------------------------------------------------------------------------------------------


def test_the_page_has_every_parameter_with_its_default_and_every_topic_and_service() -> None:
    page = (Path(__file__).resolve().parents[1] / "docs" / "ros2.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| (\S*) ?\|", page, flags=re.MULTILINE))
    for name, field in NodeConfig.model_fields.items():
        shown = rows[name].strip("`")
        wanted = field.default
        assert shown == (
            str(wanted).lower() if isinstance(wanted, bool) else wanted if isinstance(wanted, str) else f"{wanted:g}"
        )
    for entry in (*NODE_TOPICS, *NODE_SERVICES):
        assert f"`{entry.name}`" in page
