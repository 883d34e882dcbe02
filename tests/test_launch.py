"""Launch files start what `robopolicy up` starts, and the package for colcon installs what they need.

`launch` is in no package of the Python index. So the launch files run here against a stand-in of the few classes they use, which
takes the keyword arguments of launch 1.0 (Humble) and 3.8 (Kilted) alone; `ros2 launch` itself is not run.
"""

import ast
import importlib.util
import os
import re
import subprocess
import sys
import types
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from hardware.ros2 import up
from hardware.ros2.system import load_system

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "launch"
NAMES = ("virtual", "policy", "record")


class Context(dict[str, str]):
    """A launch context: the values of launch arguments."""


class DeclareLaunchArgument:
    def __init__(self, name: str, *, default_value: str, description: str) -> None:
        assert isinstance(default_value, str)  # launch takes texts and substitutions only
        self.name, self.default_value, self.description = name, default_value, description


class SetEnvironmentVariable:
    def __init__(self, name: str, value: str) -> None:
        self.name, self.value = name, value


class Shutdown:
    def __init__(self, *, reason: str) -> None:
        self.reason = reason


class ExecuteProcess:
    def __init__(self, *, cmd: list[str], name: str, output: str, on_exit: list[Shutdown], sigterm_timeout: str) -> None:
        assert all(isinstance(word, str) for word in cmd)
        self.cmd, self.name, self.output, self.on_exit, self.sigterm_timeout = cmd, name, output, on_exit, sigterm_timeout


class OpaqueFunction:
    def __init__(self, *, function: Any) -> None:
        self.function = function


class LaunchConfiguration:
    def __init__(self, name: str) -> None:
        self.name = name

    def perform(self, context: Context) -> str:
        return context[self.name]


class LaunchDescription:
    def __init__(self, entities: list[Any]) -> None:
        self.entities = entities


def evaluate(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch, **given: str) -> tuple[list[Any], list[ExecuteProcess]]:
    """What a launch file describes, and the processes that it would start."""
    launch, actions, substitutions = (types.ModuleType(n) for n in ("launch", "launch.actions", "launch.substitutions"))
    launch.LaunchContext, launch.LaunchDescription = Context, LaunchDescription  # type: ignore[attr-defined]
    for cls in (DeclareLaunchArgument, ExecuteProcess, OpaqueFunction, SetEnvironmentVariable, Shutdown):
        setattr(actions, cls.__name__, cls)
    substitutions.LaunchConfiguration = LaunchConfiguration  # type: ignore[attr-defined]
    for module in (launch, actions, substitutions):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for module_name in ("from_system", "robopolicy_system"):
        monkeypatch.delitem(sys.modules, module_name, raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("launched", folder / f"{name}.launch.py")
    assert spec is not None
    assert spec.loader is not None
    launched = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(launched)
    entities = launched.generate_launch_description().entities
    for module_name in ("from_system", "robopolicy_system"):
        sys.modules.pop(module_name, None)
    context = Context({e.name: e.default_value for e in entities if isinstance(e, DeclareLaunchArgument)})
    assert set(given) <= set(context)
    context |= given
    (function,) = [e.function for e in entities if isinstance(e, OpaqueFunction)]
    return entities, function(context)


@pytest.mark.parametrize("name", NAMES)
def test_launch_files_start_what_up_starts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIRTUAL_ENV", "/venv")
    entities, started = evaluate(FOLDER, name, monkeypatch)
    system = load_system(up.find(name))
    expected = system.processes({})
    assert [process.name for process in started] == [process.name for process in expected]
    for ours, theirs in zip(expected, started, strict=True):
        assert theirs.cmd[:4] == ["/venv/bin/python", "-u", "-m", ours.module]
        assert tuple(theirs.cmd[4 : 4 + len(ours.arguments)]) == ours.arguments
        assert theirs.on_exit[0].reason == f"{ours.name} has ended"  # one dies: all are ended
    arguments = {e.name: e for e in entities if isinstance(e, DeclareLaunchArgument)}
    assert set(arguments) == {*system.arguments, "python"}
    assert all(argument.description for argument in arguments.values())  # `ros2 launch FILE --show-args` shows them


@pytest.mark.parametrize("start", ["true", "false"])
def test_the_policy_starts_by_itself_only_where_it_was_asked_to(start: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, started = evaluate(FOLDER, "policy", monkeypatch, start=start, profile="ur5e", namespace="left")
    assert ("autostart:=true" in started[0].cmd) == (start == "true")
    assert {"profile:=ur5e", "__ns:=/left"} <= set(started[0].cmd)


def test_a_recorder_and_no_policy_by_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    _, started = evaluate(FOLDER, "virtual", monkeypatch, checkpoint="", record="x.zarr")
    assert [process.name for process in started] == ["arm", "recorder"]


def test_large_messages_are_not_lost_and_the_users_setting_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTDDS_BUILTIN_TRANSPORTS", raising=False)
    entities, _ = evaluate(FOLDER, "virtual", monkeypatch)
    assert ("FASTDDS_BUILTIN_TRANSPORTS", "LARGE_DATA") in {
        (e.name, e.value) for e in entities if isinstance(e, SetEnvironmentVariable)
    }
    monkeypatch.setenv("FASTDDS_BUILTIN_TRANSPORTS", "UDPv4")
    entities, _ = evaluate(FOLDER, "virtual", monkeypatch)
    assert "FASTDDS_BUILTIN_TRANSPORTS" not in {e.name for e in entities if isinstance(e, SetEnvironmentVariable)}


def test_the_package_installs_launch_files_that_work_where_they_land(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`setup.py install` as colcon calls it, without colcon."""
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "egg_info",
        "--egg-base",
        str(tmp_path),
        "build",
        "--build-base",
        str(tmp_path / "b"),
    ]
    command += ["install_data", "--install-dir", str(tmp_path / "install")]
    done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    share = tmp_path / "install" / "share"
    assert (share / "ament_index" / "resource_index" / "packages" / "robopolicy_ros").is_file()
    assert (share / "robopolicy_ros" / "package.xml").is_file()
    for name in NAMES:
        _, started = evaluate(share / "robopolicy_ros" / "launch", name, monkeypatch)
        assert started
    entries = (tmp_path / "robopolicy_ros.egg-info" / "entry_points.txt").read_text()
    for module in re.findall(r"= (hardware\.ros2\.\w+):main", entries):
        assert "def main(" in (ROOT / (module.replace(".", "/") + ".py")).read_text()
    assert not list(FOLDER.rglob("*.egg-info"))


def test_the_package_names_the_message_packages_of_the_contract() -> None:
    from hardware.ros2.contract import NODE_SERVICES, NODE_TOPICS, robot_topics
    from hardware.ros2.profile import load_profile, profile_names

    root = ElementTree.parse(FOLDER / "package.xml").getroot()
    depends = {element.text for element in root.iter("exec_depend")}
    topics = [topic.type for name in profile_names() for topic in robot_topics(load_profile(name))]
    needed = {entry.split("/")[0] for entry in (*topics, *(e.type for e in (*NODE_TOPICS, *NODE_SERVICES)))}
    assert needed <= depends
    assert root.findtext("export/build_type") == "ament_python"
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert re.search(r'^version = "(.*)"', pyproject, re.M)[1] == root.findtext("version")  # type: ignore[index]


def test_launch_files_are_python_3_10() -> None:
    """Humble's, in which `ros2 launch` reads them there."""
    for path in (*FOLDER.glob("*.py"), ROOT / "hardware" / "ros2" / "system.py"):
        tree = ast.parse(path.read_text(), feature_version=(3, 10))
        names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom | ast.Import) for alias in node.names}
        assert not names & {"Self", "StrEnum", "tomllib", "assert_never", "override"}, path


def test_system_files_are_read_without_this_project() -> None:
    """As `ros2 launch` does in the system's Python, where only PyYAML is."""
    code = (
        "import sys, importlib.abc\n"
        "class No(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('robopolicy', 'pydantic', 'numpy', 'rclpy'): raise ImportError(name)\n"
        "sys.meta_path.insert(0, No())\n"
        "import runpy; print(runpy.run_path('hardware/ros2/system.py')['load_system']('configs/ros2/virtual.yaml').description)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ""}
    )
    assert "virtual" in done.stdout or "simulated" in done.stdout, done.stderr
