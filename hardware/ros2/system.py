"""Which processes make a system: the YAML files of ``configs/ros2/``, read by ``robopolicy up`` and by the launch files alike.

::

    description: One line.
    arguments:                      # KEY=VALUE for `robopolicy up`, KEY:=VALUE for `ros2 launch`
      rate: {default: 100.0, help: "..."}
    environment: {NAME: value}      # unless set already
    processes:                      # started in this order, ended in the reverse
      policy:
        module: hardware.ros2.policy_node
        node: robopolicy_policy     # the node of this very process: commands go to it
        parameters: {rate: $rate}   # $NAME: the argument's value; empty ones are left out: the node has its own default
        when: $policy               # only where this is true
        ready: [joint_states]       # topics that must have a publisher before the next process starts
        lifecycle: $start           # configured and activated once it runs; true: by its autostart, so that it moves
        services: [start, stop]     # Trigger services that can be typed while `robopolicy up` runs

Standard library and PyYAML alone: `ros2 launch` runs in the system's Python, where this project need not be installed.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml


class SystemFileError(ValueError):
    """A system's file, or the value of an argument, is wrong."""


@dataclass(frozen=True)
class Argument:
    """What may be said on the command line. Values take the type of the default."""

    default: Any
    help: str


@dataclass(frozen=True)
class Process:
    """One node in a process of its own, ready to be started.

    Attributes:
        name: For people: what its output is prefixed with.
        module: Run as ``python -m module``.
        node: Full name in ROS, with its namespace; empty: it has no services that are needed here.
        arguments: After the module's name.
        parameters: Of the node; those that are empty are left out.
        ready: Full names of topics.
        lifecycle: None: it has none. False: configured and activated by `up`. True: configured, activated and started by its
            own parameter ``autostart``, and ``~/state`` says how that goes.
        services: Those that may be called by hand, without the node's name.
    """

    name: str
    module: str
    node: str
    arguments: tuple[str, ...]
    parameters: Mapping[str, Any]
    ready: tuple[str, ...]
    lifecycle: bool | None
    services: tuple[str, ...] = ()


@dataclass(frozen=True)
class System:
    """A file of ``configs/ros2/``. Made by :func:`load_system`."""

    description: str
    arguments: Mapping[str, Argument]
    environment: Mapping[str, str]
    _processes: Mapping[str, Mapping[str, Any]] = field(repr=False)

    def values(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Every argument's value: those given, as text or as values, and the defaults of the others."""
        for name in given:
            if name not in self.arguments:
                raise SystemFileError(f"unknown argument '{name}': {_nearest(name, self.arguments)}")
        return {name: _typed(name, given.get(name, a.default), a.default) for name, a in self.arguments.items()}

    def processes(self, given: Mapping[str, Any]) -> list[Process]:
        """What to start, in order."""
        values = self.values(given)
        namespace = str(values.get("namespace", "")).strip("/")
        found: list[Process] = []
        for name, entry in self._processes.items():
            if "when" in entry and not _value(entry["when"], values):
                continue
            words = ["-r", f"__ns:=/{namespace}"] if namespace else []
            parameters = {key: _value(value, values) for key, value in entry.get("parameters", {}).items()}
            parameters = {key: value for key, value in parameters.items() if value is not None and value != ""}
            lifecycle = bool(_value(entry["lifecycle"], values)) if "lifecycle" in entry else None
            if lifecycle:  # the node goes all the way itself, so that whatever anybody asks of it meanwhile ends that
                parameters["autostart"] = True
            words += [word for key, value in parameters.items() for word in ("-p", f"{key}:={_text(value)}")]
            node = entry.get("node", "")
            ready = tuple(_full(topic, namespace) for topic in entry.get("ready", []))
            arguments, services = ("--ros-args", *words) if words else (), tuple(entry.get("services", ()))
            full = _full(node, namespace) if node else ""
            found.append(Process(name, entry["module"], full, arguments, parameters, ready, lifecycle, services))
        return found

    def environ(self) -> dict[str, str]:
        """The environment for processes: this one's, and what the file adds to it."""
        return {**self.environment, **os.environ}


def load_system(path: str | Path) -> System:
    """Read a system. Raises SystemFileError that names the file and the key."""
    try:
        document = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise SystemFileError(f"'{path}' cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise SystemFileError(f"'{path}' is not valid YAML: {' '.join(str(error).split())}") from error
    _check(document, ("description", "arguments", "environment", "processes"), str(path))
    arguments = document.get("arguments", {})
    processes = document.get("processes", {})
    for name, entry in arguments.items():
        _check(entry, ("default", "help"), f"{path}: arguments.{name}")
    for name, entry in processes.items():
        _check(entry, ("module", "node", "parameters", "when", "ready", "lifecycle", "services"), f"{path}: processes.{name}")
        if "module" not in entry:
            raise SystemFileError(f"{path}: processes.{name} has no 'module'; say what `python -m` runs")
        for value in (*entry.get("parameters", {}).values(), entry.get("when"), entry.get("lifecycle")):
            if isinstance(value, str) and value.startswith("$") and value[1:] not in arguments:
                raise SystemFileError(f"{path}: processes.{name} uses {value}: {_nearest(value[1:], arguments)}")
    return System(
        document.get("description", ""),
        {name: Argument(entry.get("default"), entry.get("help", "")) for name, entry in arguments.items()},
        {name: str(value) for name, value in document.get("environment", {}).items()},
        processes,
    )


def _check(value: Any, keys: tuple[str, ...], where: str) -> None:
    if not isinstance(value, dict):
        raise SystemFileError(f"{where} is a {type(value).__name__}; expected a mapping with the keys {', '.join(keys)}")
    for key in value:
        if key not in keys:
            raise SystemFileError(f"{where}: unknown key '{key}': {_nearest(key, keys)}")


def _typed(name: str, value: Any, default: Any) -> Any:
    """``value`` as the type of ``default``."""
    if isinstance(default, str):
        return str(value) if value is not None else ""
    if isinstance(value, str):
        value = yaml.safe_load(value)
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if default is not None and value is not None and type(value) is not type(default):
        kind = {"bool": "true or false", "int": "a whole number", "float": "a number"}.get(type(default).__name__, "a list")
        raise SystemFileError(f"argument '{name}' is {value!r}; expected {kind}")
    return value


def _value(value: Any, values: Mapping[str, Any]) -> Any:
    return values[value[1:]] if isinstance(value, str) and value.startswith("$") else value


def _text(value: Any) -> str:
    """As ROS reads it after ``:=``: YAML, where a text that looks like a number needs quotes."""
    try:
        return value if isinstance(value, str) and isinstance(yaml.safe_load(value), str) else json.dumps(value)
    except yaml.YAMLError:
        return json.dumps(value)


def _full(name: str, namespace: str) -> str:
    return name if name.startswith("/") else "/" + "/".join(part for part in (namespace, name) if part)


def _nearest(name: str, valid: Any) -> str:
    close = difflib.get_close_matches(str(name), list(valid), n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"valid: {', '.join(sorted(valid)) or 'none'}"
