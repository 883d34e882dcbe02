"""The whole control path in real time, around a policy: what :class:`robopolicy.deploy.control.ControlLoop` measures."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch

from robopolicy.config import import_class
from robopolicy.deploy.clock import SystemClock
from robopolicy.deploy.control import ControlConfig, ControlLoop
from robopolicy.deploy.engine import Engine, Plans
from robopolicy.deploy.executor import make_executor
from robopolicy.deploy.exported import ExportedPolicy
from robopolicy.deploy.interpolate import InterpolationConfig
from robopolicy.deploy.limits import load_limits
from robopolicy.deploy.process import ProcessPlanner, open_planner, planner_of
from robopolicy.deploy.safety import SafetyFilter
from robopolicy.errors import EvaluationError
from robopolicy.policy import Policy
from robopolicy.task import TaskSpec

TIMES = ("lateness_ms", "jitter_ms", "work_ms", "age_ms", "inference_ms")  # of the report, as rows of the table


class Measured(NamedTuple):
    """What came of a run."""

    report: dict[str, Any]  # see ControlLoop.report
    lateness: np.ndarray  # of every period [s]


def run_loop(
    policy: Policy | ExportedPolicy,
    task: TaskSpec,
    *,
    robot: str = "sim.arm.robot:SimArm",
    limits: str = "arm",
    planner: Mapping[str, object] | str = "plain",
    executor: Mapping[str, object] | str = "latest",
    rate: float = 250.0,
    seconds: float = 20.0,
    seed: int = 0,
    process: str | None = None,
) -> Measured:
    """Run the control loop on the machine's clock.

    Args:
        policy: A checkpoint's, or an export's, which knows the planner ``plain`` only.
        task: What the robot is set in.
        robot: Class of the robot, called as ``Robot(task name, clock, **task arguments)``.
        limits: Of the safety filter: a preset or a file.
        planner: A name of :mod:`robopolicy.deploy.planner`, or ``{type: rti, steps: 1}``.
        executor: Of :mod:`robopolicy.deploy.executor`, likewise.
        rate: Of the loop [Hz].
        seconds: How long.
        seed: Of the episode, and of the policy's noise.
        process: Folder of the policy, which then infers in a process of its own; None: in a thread of this one.

    Raises:
        EvaluationError: The policy and the robot do not fit, or the safety filter refuses the start.
    """
    clock = SystemClock()
    with _robot(robot, task, clock) as arm, _planner(policy, planner, process) as plans:
        if missing := set(policy.observation_features) - set(arm.observation_features):
            raise EvaluationError(f"the policy needs observation '{min(missing)}', which the robot of task '{task.name}' has not")
        safety = SafetyFilter(load_limits(limits, rate=rate), arm.kinematics)
        period = 1 / (arm.action_feature.rate or rate)
        engine = Engine(plans, period, clock, torch.Generator().manual_seed(seed))
        config = ControlConfig(n_obs_steps=policy.n_obs_steps, replan=policy.n_action_steps, log_size=int(seconds * rate) + 1)
        between = InterpolationConfig.of_policy(arm.action_feature, policy)
        loop = ControlLoop(arm, engine, make_executor(executor), safety, clock, config, between)
        if refused := loop.reset(seed):
            engine.close()
            raise EvaluationError(f"the safety filter refuses to start: {refused[0]}")
        try:
            loop.run(seconds)
            rows, report, cause = loop.log.rows(), loop.report(), safety.cause
        finally:
            loop.close()
    if "age_ms" not in report:
        why = "give more --seconds" if cause is None else f"the safety filter stopped the arm: {cause}"
        raise EvaluationError(f"{report['ticks']} periods are too few to measure; {why}")
    return Measured(report, rows["start"] - rows["deadline"])


def rows_of(report: Mapping[str, Any]) -> list[tuple[str, dict[str, float]]]:
    """The distributions in a report, all in milliseconds, by name."""
    return [(name.removesuffix("_ms"), report[name]) for name in TIMES]


@contextmanager
def _planner(policy: Policy | ExportedPolicy, name: Mapping[str, object] | str, process: str | None) -> Iterator[Plans]:
    if process is None:
        yield planner_of(policy, name)
        return
    planner = ProcessPlanner(functools.partial(open_planner, process, name))
    try:
        yield planner
    finally:
        planner.close()


@contextmanager
def _robot(path: str, task: TaskSpec, clock: SystemClock) -> Iterator[Any]:
    arm = import_class("robot", path, {})(task.name, clock, **task.kwargs)
    try:
        yield arm
    finally:
        arm.close()
