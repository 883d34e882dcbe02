"""Typed configuration: YAML files, dotted overrides, and errors that name the nearest valid key.

Every configurable class has a ``Config`` model derived from :class:`Config`. A *component* (network, path, encoder, ...) is
chosen in YAML by its ``type``: a registered short name or a dotted path ``package.module:Class`` to a class of your own.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import yaml

from robopolicy.errors import ConfigError, nearest


class Config(pydantic.BaseModel):
    """Base of all configuration models: unknown keys are errors, types are not coerced silently, values do not change, and
    numbers are finite: NaN answers every comparison with no, so a limit of NaN is none."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


C = TypeVar("C", bound=Config)


class _Loader(yaml.SafeLoader):
    """The safe loader, which reads ``3e-4`` as a number, as YAML 1.2 and people do."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789"))


def read_yaml(text: str) -> Any:
    """The value of a YAML document. Raises yaml.YAMLError."""
    return yaml.load(text, Loader=_Loader)  # a subclass of SafeLoader


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping (safe loader only). Raises ConfigError when the file is absent, unreadable or no mapping."""
    path = Path(path)
    try:
        value = read_yaml(path.read_text())
    except FileNotFoundError as error:
        siblings = [str(p) for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        found = nearest(str(path), siblings) if siblings else f"there is no YAML file in '{path.parent}'"
        raise ConfigError(f"config '{path}' does not exist; {found}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config '{path}' cannot be read: {error}") from error
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"config '{path}' is not valid YAML: {reason}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"config '{path}' holds a {type(value).__name__}; expected a mapping of keys to values")
    return value


def apply_overrides(config: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Apply ``a.b.c=value`` overrides (values parsed as YAML) to a nested mapping and return the new mapping."""
    result = _deep_copy(config)
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"override '{override}' is not of the form key.subkey=value")
        try:
            value = read_yaml(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"override '{override}': the value is not valid YAML") from error
        node = result
        *parents, last = key.split(".")
        for parent in parents:
            child = node.setdefault(parent, {})
            if child is None:
                child = node[parent] = {}
            if not isinstance(child, dict):
                raise ConfigError(f"override '{override}': '{parent}' is a {type(child).__name__}, not a section")
            node = child
        node[last] = value
    return result


def _deep_copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _deep_copy(v) for k, v in value.items()}
    return [_deep_copy(v) for v in value] if isinstance(value, list) else value


def parse(model: type[C], value: Mapping[str, Any], where: str = "config") -> C:
    """Validate ``value`` against ``model``. Raises ConfigError: one line per call, naming key, finding and mend.

    Types are strict: neither ``true`` nor ``"100"`` is a number of steps. Validating as JSON lets lists stand for tuples.
    """
    try:
        text = json.dumps(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {error}; a config holds numbers, texts, lists and mappings only") from error
    try:
        return model.model_validate_json(text, strict=True)
    except pydantic.ValidationError as error:
        raise ConfigError(f"{where}: {_explain(model, error)}") from error


def _explain(model: type[pydantic.BaseModel], error: pydantic.ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    location = [str(part) for part in first["loc"]]
    key = ".".join(location)
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        siblings = _fields_at(model, location[:-1])
        return f"unknown key '{key}': {nearest(location[-1], siblings)}{more}"
    if first["type"] == "missing":
        return f"key '{key}' is required{more}"
    message = first["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    found = "" if first["type"] in ("value_error", "assertion_error") else f", found {first['input']!r}"
    where = f"key '{key}': " if key else ""  # keys that do not fit together: the message names them
    return f"{where}{message}{found}{more}"


def _fields_at(model: Any, location: Sequence[str]) -> list[str]:
    """Field names of the sub-model at ``location``; empty when it is not a plain nested model."""
    for part in location:
        fields = getattr(model, "model_fields", {})
        if part not in fields:
            return []
        model = fields[part].annotation
        candidates = [model, *getattr(model, "__args__", ())]
        model = next((c for c in candidates if isinstance(c, type) and issubclass(c, pydantic.BaseModel)), None)
        if model is None:
            return []
    return list(model.model_fields)


def import_class(kind: str, name: str, registry: Mapping[str, str]) -> type:
    """The class behind a registered short name or a dotted path ``package.module:Class``. Raises ConfigError."""
    path = registry.get(name, name)
    if ":" not in path:
        raise ConfigError(f"unknown {kind} '{name}': {nearest(name, registry)} Or give a dotted path, package.module:Class")
    module_name, _, attribute = path.partition(":")
    try:
        cls: type = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{kind} '{name}' cannot be imported: {error}") from error
    return cls


def component(kind: str, value: Mapping[str, Any] | str, registry: Mapping[str, str]) -> tuple[type, Config]:
    """Resolve ``{"type": name, **settings}`` to a class and its validated ``Config`` (which excludes ``type``)."""
    if isinstance(value, str):
        value = {"type": value}
    if not isinstance(value, Mapping) or not isinstance(value.get("type"), str):
        raise ConfigError(f"{kind}: expected a mapping with a 'type' (one of {', '.join(sorted(registry))}), found {value!r}")
    cls = import_class(kind, value["type"], registry)
    model = getattr(cls, "Config", None)
    if not (isinstance(model, type) and issubclass(model, Config)):
        raise ConfigError(f"{kind} '{value['type']}' has no nested Config model; derive one from robopolicy.config.Config")
    settings = {k: v for k, v in value.items() if k != "type"}
    return cls, parse(model, settings, where=f"{kind} '{value['type']}'")


def full(value: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """The component mapping with every default written out, as runs record it."""
    return {"type": value["type"], **config.model_dump(mode="json")}
