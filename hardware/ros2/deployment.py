"""A policy on a robot over ROS 2, assembled: what the node and the benchmarks share. No rclpy, no lifecycle.

::

    checkpoint or export -> planner (here, or in a process) -> engine -+
    profile -> limits, home -------------------------------------------+-> sources -> arbiter -> safety filter -> robot
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import pydantic

from hardware.ros2.profile import RosProfile, load_profile
from robopolicy.config import Config, read_yaml
from robopolicy.deploy.arbiter import Arbiter
from robopolicy.deploy.clock import Clock
from robopolicy.deploy.engine import Engine, EngineConfig
from robopolicy.deploy.executor import make_executor
from robopolicy.deploy.guard import StartGuard
from robopolicy.deploy.home import HomeSource
from robopolicy.deploy.interpolate import InterpolationConfig
from robopolicy.deploy.limits import SafetyLimits
from robopolicy.deploy.manifest import is_export
from robopolicy.deploy.process import ProcessPlanner, open_planner
from robopolicy.deploy.safety import SafetyFilter
from robopolicy.deploy.sources import ControlConfig, PolicySource, Source
from robopolicy.deploy.status import Period
from robopolicy.errors import ConfigError, EvaluationError
from robopolicy.features import Feature
from robopolicy.robot import Robot

if TYPE_CHECKING:
    from robopolicy.deploy.exported import ExportedPolicy
    from robopolicy.policy import Policy

_DEADMAN = 0.25  # [s]: where the limits do not say
_LOG = 60.0  # [s] of periods that are kept
_END = 10.0  # [s] for the arm to come to rest


class DeployConfig(Config):
    """Which policy drives which robot, and how. 0 and empty: as the profile or the checkpoint says.

    Nothing here switches the safety filter off or raises a limit of the profile.
    """

    checkpoint: str = pydantic.Field(
        default="", description="The policy: a run, a checkpoint or an export (onnx, openvino, torchscript). Required."
    )
    profile: str = pydantic.Field(default="virtual", description="The robot: the name of a profile, or a YAML file.")
    planner: str = pydantic.Field(
        default="plain", description="How chunks are made: plain, rtc, rti, ..., or settings, '{type: rti, t_start: 0.8}'."
    )
    executor: str = pydantic.Field(
        default="latest", description="How chunks are carried out: latest, ensemble, receding, or settings with a type."
    )
    rate: float = pydantic.Field(default=0.0, ge=0.0, le=1000.0, description="Of control [Hz]; 0: the profile's.")
    replan: int = pydantic.Field(
        default=0,
        ge=0,
        le=1000,
        description="Rows of a chunk that are carried out before the next is asked for; 0: the policy's.",
    )
    steps: int = pydantic.Field(default=0, ge=0, le=1000, description="Of the sampler; 0: the checkpoint's. Exports have theirs.")
    speed_scale: float = pydantic.Field(
        default=1.0, ge=0.01, le=1.0, description="Of the velocities that the limits allow. Braking keeps its strength."
    )
    mode: Literal["live", "shadow"] = pydantic.Field(
        default="live", description="shadow: everything runs and nothing is sent; ~/shadow shows what would have been."
    )
    inference: Literal["process", "thread"] = pydantic.Field(
        default="process",
        description="Where the network runs: in a process of its own, whose death stops the arm, or in a thread.",
    )
    deadman: bool = pydantic.Field(
        default=False, description="Move only while the topic 'deadman' says true. Limits with a deadman ask for it anyway."
    )
    fifo: int = pydantic.Field(
        default=0, ge=0, le=99, description="Real-time priority of control, inference one below; 0: none. Noted if not permitted."
    )
    seed: int = pydantic.Field(default=0, ge=0, description="Of the policy's noise.")


class Deployment:
    """A policy, loaded and warmed up, that may command a robot while it is active. Made by :func:`deploy`.

    Every activation has an arbiter and a safety filter of its own: the arm begins from where it is measured, because others may
    have moved it meanwhile.

    Attributes:
        config, profile, limits: What it was made of.
        arbiter: The only one that commands the robot; None while inactive.
    """

    def __init__(
        self,
        config: DeployConfig,
        profile: RosProfile,
        limits: SafetyLimits,
        robot: Robot,
        clock: Clock,
        policy: PolicySource,
        planner: Any,
        home: Source | None,
        control: ControlConfig,
    ) -> None:
        self.config, self.profile, self.limits, self.robot, self.clock = config, profile, limits, robot, clock
        self.arbiter: Arbiter | None = None
        self._policy, self._planner, self._home, self._control = policy, planner, home, control
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def fault(self) -> BaseException | None:
        """Why there will be no more plans, if so: the inference process is gone."""
        fault: BaseException | None = getattr(self._planner, "fault", None)
        return fault

    def activate(self, estopped: str = "", watch: Callable[[Period], None] | None = None) -> Arbiter:
        """Begin control, and wait until it runs. Nothing is sent before somebody asks the arbiter to start.

        Args:
            estopped: Why the emergency stop is latched; empty: it is not.
            watch: Sees every period, on the control thread.

        Raises:
            EvaluationError: Control does not begin, or that of before hangs.
        """
        self.deactivate()  # one that did not begin
        safety = SafetyFilter(self.limits, self.robot.kinematics)
        if estopped:
            safety.estop(estopped)
        sources = [self._policy] if self._home is None else [self._policy, self._home]
        shadow = self.config.mode == "shadow"
        self.arbiter = Arbiter(self.robot, safety, self.clock, sources, self._control, shadow=shadow, watch=watch)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self.arbiter.run, args=(self._stop,), name="control", daemon=True)
        self._thread.start()
        end = time.monotonic() + _END
        while not self.arbiter.log.count and time.monotonic() < end:  # what exists is put out of reach of garbage collection
            time.sleep(0.01)
        if not self.arbiter.log.count:
            self._stop.set()
            raise EvaluationError(f"control has not begun within {_END:g} s; is the computer overloaded? Activate again")
        return self.arbiter

    def deactivate(self) -> None:
        """End control: the policy first, then the arm comes to rest, then nothing is sent any more. May be called twice.

        Raises:
            EvaluationError: Control hangs. It is a thread of this process: end the process.
        """
        if self._thread is None:
            return
        self._stop.set()
        self._thread.join(_END)
        if self._thread.is_alive():
            raise EvaluationError(f"control has not ended within {_END:g} s: it hangs; end this process, the controller holds")
        self._thread, self.arbiter = None, None

    def close(self) -> None:
        """Deactivate, and end inference; the robot stays."""
        try:
            self.deactivate()
        finally:
            self._policy.engine.close()
            if isinstance(self._planner, ProcessPlanner):
                self._planner.close()


def deploy(config: DeployConfig, robot: Robot, clock: Clock, profile: RosProfile | None = None) -> Deployment:
    """Load a policy, warm it up on what the robot sees now, and assemble everything up to the robot. Takes seconds.

    Args:
        config: What to deploy.
        robot: Whose inputs are there.
        clock: The one that the robot has, too.
        profile: What :func:`profile_of` gave; None: that.

    Raises:
        RobopolicyError: The policy cannot be loaded or does not fit the robot, or a setting is wrong; it says how to mend it.
    """
    profile = profile or profile_of(config)
    limits = limits_of(config, profile)
    home = None if profile.home_positions is None else HomeSource(profile.home_positions, limits)
    executor = make_executor(_setting(config.executor))
    planner, policy = _load(config)
    try:
        check_fit(policy, robot)
        fifo = config.fifo or None
        control = ControlConfig(
            n_obs_steps=policy.n_obs_steps,
            replan=config.replan or policy.n_action_steps,
            fifo=fifo,
            log_size=int(_LOG * limits.rate),
        )
        import torch

        engine = Engine(
            planner,
            1.0 / (robot.action_feature.rate or limits.rate),
            clock,
            torch.Generator().manual_seed(config.seed),
            EngineConfig(fifo=None if fifo is None else max(1, fifo - 1)),
        )
        between = InterpolationConfig.of_policy(robot.action_feature, policy)
        guard = StartGuard.of(policy)
        source = PolicySource(robot, engine, executor, limits, control, between, guard)
        source.prepare()
    except BaseException:
        if isinstance(planner, ProcessPlanner):
            planner.close()
        raise
    return Deployment(config, profile, limits, robot, clock, source, planner, home, control)


def profile_of(config: DeployConfig) -> RosProfile:
    """The profile at the rate that is asked for. Raises ConfigError."""
    return load_profile(config.profile, **({"rate": config.rate} if config.rate else {}))


def limits_of(config: DeployConfig, profile: RosProfile) -> SafetyLimits:
    """Those of the profile, made narrower. Only speed is scaled: an arm that brakes less would come to rest later."""
    limits = profile.safety
    fresh, scale = limits.freshness, limits.scale
    if config.deadman and fresh.deadman is None:
        fresh = fresh.model_copy(update={"deadman": _DEADMAN})
    scale = scale.model_copy(update={"velocity": scale.velocity * config.speed_scale})
    return limits.model_copy(update={"freshness": fresh, "scale": scale})


def task_of(checkpoint: str) -> tuple[str | None, Mapping[str, Any]]:
    """Name and arguments of the task that a policy was trained for; None where it does not say. Raises CheckpointError."""
    if not checkpoint:
        raise ConfigError("parameters: key 'checkpoint' is required: a run, a checkpoint or an export")
    if is_export(checkpoint):
        from robopolicy.deploy.manifest import load_manifest

        provenance = load_manifest(checkpoint).checkpoint.get("provenance") or {}
    else:
        from robopolicy.policy import read_provenance

        provenance = read_provenance(checkpoint)
    task = provenance.get("task") or {}
    return task.get("name"), task.get("args") or {}


class Featured(Protocol):
    """What a policy, a robot and its model have: what is seen, and what an action is."""

    @property
    def observation_features(self) -> Mapping[str, Feature]: ...
    @property
    def action_feature(self) -> Feature: ...


class Features(NamedTuple):
    """Those of a policy that is not loaded."""

    observation_features: Mapping[str, Feature]
    action_feature: Feature


def features_of(checkpoint: str) -> Features | None:
    """What the files of a policy say that it sees and does; None where that takes loading it. Raises CheckpointError."""
    if is_export(checkpoint):
        from robopolicy.deploy.manifest import load_manifest

        manifest = load_manifest(checkpoint)
        return Features(manifest.observation_features, manifest.action_feature)
    from robopolicy.train.checkpoint import find_policy, read_document

    document = read_document(find_policy(checkpoint) / "policy")
    if not {"observations", "action"} <= set(document):
        return None
    seen = {name: Feature.from_json(name, value) for name, value in document["observations"].items()}
    action = dict(document["action"])
    return Features(seen, Feature.from_json(action.pop("name", "action"), action))


def check_fit(policy: Featured, robot: Featured) -> None:
    """Raises ConfigError where the robot lacks a feature of the policy, or declares another shape, unit, order or rate."""
    for name, feature in policy.observation_features.items():
        if name not in robot.observation_features:
            raise ConfigError(
                f"the policy needs observation '{name}', the robot has {', '.join(sorted(robot.observation_features))}; "
                "mend the profile's model and inputs, or deploy a policy that was trained for this robot"
            )
        _same(feature, robot.observation_features[name], f"observation '{name}'")
    _same(policy.action_feature, robot.action_feature, "the action")


def _same(wanted: Feature, found: Feature, what: str) -> None:
    for aspect in ("shape", "unit", "names", "rate"):
        ours, theirs = getattr(wanted, aspect), getattr(found, aspect)
        if ours != theirs and (aspect == "shape" or (ours and theirs)):  # what is empty is unknown
            raise ConfigError(
                f"{what}: the policy was trained with {aspect} {ours}, the robot has {theirs}; mend the profile, or deploy a "
                "policy that was trained for this robot"
            )


def _load(config: DeployConfig) -> tuple[Any, Policy | ExportedPolicy]:
    """The planner, in its process or here, and what there is to know of its policy here."""
    setting, steps = _setting(config.planner), config.steps or None
    task_of(config.checkpoint)  # there is one
    if config.inference == "thread":
        planner: Any = open_planner(config.checkpoint, setting, steps)
        return planner, planner.policy
    policy: Policy | ExportedPolicy
    if is_export(config.checkpoint):
        from robopolicy.deploy.exported import ExportedPolicy

        policy = ExportedPolicy(config.checkpoint)
    else:
        from robopolicy.policy import load_policy

        policy = load_policy(config.checkpoint)
    return ProcessPlanner(functools.partial(open_planner, config.checkpoint, setting, steps)), policy


def _setting(text: str) -> Mapping[str, object] | str:
    """A name, or settings with a type, as YAML."""
    value = read_yaml(text) if text.lstrip().startswith("{") else text
    return value if isinstance(value, dict) else text
