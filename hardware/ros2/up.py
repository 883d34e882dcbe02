"""``robopolicy up``: the processes of a system, started in order, watched, ended together; for machines without `ros2 launch`.

It reads the same files as the launch files do (``configs/ros2/``, explained in :mod:`hardware.ros2.system`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from robopolicy.errors import ConfigError, nearest

if TYPE_CHECKING:
    from hardware.ros2.parameters import NodeConfig
    from hardware.ros2.system import Process
    from robopolicy.config import Config

EPILOG = """\
examples:
  robopolicy up virtual                                     # a simulated arm and the quickstart policy, moving
  robopolicy up virtual checkpoint=outputs/lift_flow start=false
  robopolicy up virtual checkpoint= cameras=false           # the arm alone
  robopolicy up policy profile=ur5e checkpoint=outputs/mine # on an arm whose driver runs; then type: start
  robopolicy up record profile=ur5e out=data/mine.zarr
  robopolicy up virtual --show-args

While it runs, type start, stop, home, estop or reset and Enter: the policy's services; or, say, `arm reset`;
or `arm set seed 5`: a parameter; or deactivate, cleanup, configure, activate: the policy's lifecycle, in which the
arm stands until you type start. Several go in one line: recorder start; start.
Where a node of the name runs already, nothing is started.
Exit code: 0 a process has done its work, 130 Ctrl-C, 143 terminated, 2 it could not be started,
10, 11, ... the first, second, ... process of the file died; the others were ended in order."""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("system", help="virtual, policy or record: a file of configs/ros2; or one of your own, ./mine.yaml")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="arguments of the system")
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML mapping of arguments; KEY=VALUE go before it")
    parser.add_argument("--show-args", action="store_true", help="list the system's arguments and end")


def folder() -> Path:
    """Where the systems are: in the checkout, or where packages put them."""
    here = Path(__file__).resolve().parents[2] / "configs" / "ros2"
    return here if here.is_dir() else Path(sys.prefix) / "share" / "robopolicy" / "configs" / "ros2"


def find(name: str) -> Path:
    """The file of a system. Raises ConfigError when there is none."""
    if "/" in name or name.endswith((".yaml", ".yml")):
        return Path(name)
    path = folder() / f"{name}.yaml"
    if not path.is_file():
        known = sorted(file.stem for file in folder().glob("*.yaml"))
        raise ConfigError(f"no system '{name}': {nearest(name, known)} Or give a file, ./mine.yaml")
    return path


def run(args: argparse.Namespace) -> int:
    from hardware.ros2.system import SystemFileError, load_system
    from robopolicy.config import load_yaml

    try:
        system = load_system(find(args.system))
        if args.show_args:
            for name, argument in system.arguments.items():
                print(f"{f'{name}={argument.default}':<34} {argument.help}")
            return 0
        given = {} if args.config is None else load_yaml(args.config)
        for override in args.overrides:
            key, separator, text = override.partition("=")
            if not separator:
                raise ConfigError(f"'{override}' is not of the form KEY=VALUE")
            given[key] = text
        processes = system.processes(given)
    except SystemFileError as error:
        raise ConfigError(str(error)) from error
    if not processes:
        raise ConfigError(f"with these arguments '{args.system}' starts nothing")
    from hardware.ros2.runtime import require
    from hardware.ros2.supervisor import Supervisor

    require()
    environment = system.environ()
    check(processes, environment)
    return Supervisor(processes, environment).run()


def check(processes: Iterable[Process], environment: Mapping[str, str]) -> None:
    """Say who else is in the domain; refuse now what our nodes would, seconds later and with the arm running.

    Raises:
        ConfigError, CheckpointError: A parameter is unknown or out of range, what it names is not there, is damaged, or does
            not fit; or there is no such domain.
    """
    from hardware.ros2.doctor import domain
    from hardware.ros2.parameters import NodeConfig
    from hardware.ros2.profile import load_profile
    from hardware.ros2.recorder import RecorderConfig
    from hardware.ros2.supervisor import say
    from hardware.ros2.virtual_arm import VirtualArmConfig
    from robopolicy.config import parse

    for finding in domain(environment):
        text = f"{finding.name}: {finding.found}; {finding.mend}"
        if finding.level == "wrong":
            raise ConfigError(text)
        if finding.level == "note":
            say(text)
    kinds: dict[str, type[Config]] = {
        "hardware.ros2.virtual_arm": VirtualArmConfig,
        "hardware.ros2.recorder": RecorderConfig,
        "hardware.ros2.policy_node": NodeConfig,
    }
    stands = None  # what the simulated arm stands in front of
    for process in processes:
        if (kind := kinds.get(process.module)) is None:
            continue
        ours = {name: value for name, value in process.parameters.items() if name != "use_sim_time"}  # every node has it
        if kind is VirtualArmConfig:
            ours = {name: value for name, value in ours.items() if not name.startswith("faults.")}
        config = parse(kind, ours, where=process.name)
        if not isinstance(config, NodeConfig):
            profile = load_profile(config.profile)  # type: ignore[attr-defined]  # all have one
            if isinstance(config, VirtualArmConfig):
                stands = config.task or profile.model.args.get("task")
        elif process.lifecycle is not None:  # it is configured at once
            _check_policy(config, stands)


def _check_policy(config: NodeConfig, stands: str | None) -> None:
    """What the node would refuse to be configured with: by its own code, and without an arm.

    ``stands``: the task of the arm that is started, too; None: unknown.
    """
    from hardware.ros2.deployment import check_fit, features_of, limits_of, profile_of, task_of
    from hardware.ros2.joints import make_model
    from robopolicy.config import apply_overrides
    from robopolicy.deploy.executor import make_executor
    from robopolicy.deploy.process import open_planner

    profile = profile_of(config)
    limits_of(config, profile)
    task, args = task_of(config.checkpoint)
    if None not in (task, stands) and "task" in profile.model.args and task != stands:
        raise ConfigError(
            f"the policy was trained for task '{task}', and the arm stands in front of '{stands}' (profile '{config.profile}'); "
            f"deploy another policy, or give task={task}, or a profile with that task"
        )
    model = make_model(profile, task, args)
    if (features := features_of(config.checkpoint)) is not None:
        check_fit(features, model)
    setting = apply_overrides({}, [f"executor={config.executor}", f"planner={config.planner}"])
    make_executor(setting["executor"])
    open_planner(config.checkpoint, setting["planner"], config.steps or None)
