"""A policy on a robot over ROS 2, assembled: what the node, the benchmarks and ``eval --robot ros2`` share. No rclpy, no lifecycle."""

from __future__ import annotations

from typing import Literal

import pydantic

from robopolicy.config import Config


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
