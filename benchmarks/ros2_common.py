"""What the benchmarks over ROS 2 have in common: their command lines, and a policy that was never trained."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch

from robopolicy.config import parse
from robopolicy.data.normalize import Normalizer
from robopolicy.deploy.clock import SystemClock
from robopolicy.errors import RobopolicyError
from robopolicy.policy import Policy, PolicyConfig
from sim.arm.robot import SimArm

WANDERER_TASK = {"image_size": 48}
_WANDERS = ([0.42, -0.08, 0.10, -0.2, 0.03], [0.52, 0.08, 0.22, 0.2, 0.07])  # between these [m, m, m, rad, m]


def command_line(doc: str | None) -> argparse.ArgumentParser:
    """A parser with what all of them take; ``doc``: of the program."""
    parser = argparse.ArgumentParser(description=(doc or "").split("\n\n")[0])
    parser.add_argument("checkpoint", nargs="?", help="default: a policy that was never trained and moves the arm about")
    parser.add_argument(
        "--policy", action="append", default=[], type=setting, metavar="NAME=VALUE", help="parameter of the policy node"
    )
    return parser


def setting(text: str) -> tuple[str, str]:
    """NAME=VALUE of a command line."""
    name, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"'{text}' is not of the form NAME=VALUE")
    return name, value


def report(text: str, path: Path) -> int:
    """Print the result and keep it; the exit code."""
    path.write_text(text + "\n")
    print(text)
    return 0


def program(main: Callable[[], int]) -> NoReturn:
    """Run it, with errors that are meant for people as one line."""
    try:
        sys.exit(main())
    except RobopolicyError as error:
        sys.exit(f"{Path(sys.argv[0]).stem}: {error}")


def wanderer(folder: Path, image: bool) -> Path:
    """A checkpoint that moves the arm about, and has every input of the task lift; ``image``: it sees the camera, too."""
    task_args = WANDERER_TASK if image else {}
    arm, rng = SimArm("lift", SystemClock(), **task_args), np.random.default_rng(0)
    arm.reset(0)
    values = {name: value for name, value in arm.observe().values.items() if value.dtype != np.uint8}
    normalizers = {name: Normalizer.fit(value + rng.uniform(-1.0, 1.0, (500, value.size))) for name, value in values.items()}
    normalizers["action"] = Normalizer.fit(np.random.default_rng(0).uniform(*_WANDERS, (500, 5)))
    net = {"horizon": 16, "n_action_steps": 8, "net": {"type": "mlp", "width": 16, "depth": 1}}
    config = parse(PolicyConfig, {**net, "sampler": {"type": "euler", "num_steps": 1}})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        policy = Policy(config, arm.observation_features, arm.action_feature, normalizers)
    arm.close()
    policy.save(folder, {"task": {"name": "lift", "args": dict(task_args)}})
    return folder
