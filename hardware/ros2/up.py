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
    from hardware.ros2.system import Process

EPILOG = """\
examples:
  robopolicy up virtual                                     # a simulated arm and the quickstart policy, moving
  robopolicy up virtual checkpoint=outputs/lift_flow start=false
  robopolicy up virtual checkpoint= cameras=false           # the arm alone
  robopolicy up policy profile=ur5e checkpoint=outputs/mine # on an arm whose driver runs; then type: start
  robopolicy up record profile=ur5e out=data/mine.zarr
  robopolicy up virtual --show-args

While it runs, type start, stop, home, estop or reset and Enter: the policy's services; or, say, `arm reset`;
or `arm set seed 5`: a parameter. Where a node of the name runs already, nothing is started.
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
    """Say who else is in the domain; refuse now what the policy node would, seconds later and with the arm running.

    Raises:
        ConfigError: A parameter of it is unknown or out of range, or there is no such domain.
    """
    from hardware.ros2.doctor import domain
    from hardware.ros2.parameters import NodeConfig
    from hardware.ros2.supervisor import say
    from robopolicy.config import parse

    for finding in domain(environment):
        text = f"{finding.name}: {finding.found}; {finding.mend}"
        if finding.level == "wrong":
            raise ConfigError(text)
        if finding.level == "note":
            say(text)
    for process in processes:
        if process.module == "hardware.ros2.policy_node":
            values = {name: value for name, value in process.parameters.items() if name != "use_sim_time"}  # every node has it
            parse(NodeConfig, values, where=process.name)
