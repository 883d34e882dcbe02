"""Makes launch descriptions of the systems in ``configs/ros2/``, the files that ``robopolicy up`` reads, too.

`ros2 launch` runs in the Python of ROS, the nodes in the one that has this project: the launch argument ``python``. So nothing
of the project is imported here but ``hardware/ros2/system.py``, from its file, which needs PyYAML alone.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

from launch.actions import DeclareLaunchArgument, ExecuteProcess, OpaqueFunction, SetEnvironmentVariable, Shutdown
from launch.substitutions import LaunchConfiguration

from launch import LaunchContext, LaunchDescription

ROOT = Path(__file__).resolve().parents[1]  # of the checkout, or the share folder that colcon installs with the same layout


def describe(name: str) -> LaunchDescription:
    """The launch description of ``configs/ros2/NAME.yaml``."""
    module = _system_module()
    system = module.load_system(ROOT / "configs" / "ros2" / f"{name}.yaml")
    arguments = [
        DeclareLaunchArgument(key, default_value=_text(argument.default), description=argument.help)
        for key, argument in system.arguments.items()
    ]
    arguments.append(
        DeclareLaunchArgument("python", default_value=_python(), description="the Python that this project is installed in")
    )
    environment = [SetEnvironmentVariable(key, value) for key, value in system.environment.items() if key not in os.environ]

    def start(context: LaunchContext) -> list[Any]:
        given = {key: LaunchConfiguration(key).perform(context) for key in system.arguments}
        python = LaunchConfiguration("python").perform(context)
        return [_execute(process, python) for process in system.processes(given)]

    return LaunchDescription([*arguments, *environment, OpaqueFunction(function=start)])


def _execute(process: Any, python: str) -> ExecuteProcess:
    """The end of one ends all. SIGINT is given 10 s: a policy brings the arm to rest first."""
    return ExecuteProcess(
        cmd=[python, "-u", "-m", process.module, *process.arguments],
        name=process.name,
        output="screen",
        on_exit=[Shutdown(reason=f"{process.name} has ended")],
        sigterm_timeout="10",
    )


def _system_module() -> Any:
    name = "robopolicy_system"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "hardware" / "ros2" / "system.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # before it runs: dataclasses look themselves up
        spec.loader.exec_module(module)
    return sys.modules[name]


def _python() -> str:
    """That of the active virtual environment, else the one that runs this."""
    environment = os.environ.get("VIRTUAL_ENV")
    return str(Path(environment) / "bin" / "python") if environment else sys.executable


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else "" if value is None else str(value)
