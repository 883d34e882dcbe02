"""``SafetyLimits``: what the safety filter lets through, as a typed config.

The filter works in the *coordinates* that the robot takes as position targets: joint angles and a gripper width, or a position, a
rotation vector and a width. Each has limits of its own; the workspace is a box in metres.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pydantic

from robopolicy.config import Config, load_yaml, parse
from robopolicy.errors import ConfigError, nearest

PRESETS = Path(__file__).parent / "presets"

Positive = pydantic.Field(gt=0)


class Coordinate(Config):
    """One position target and its limits, in ``unit``, ``unit/s``, ``unit/s^2``, ``unit/s^3``, as the robot's maker rates them.

    Attributes:
        margin: Kept away from ``lower`` and ``upper``.
        max_step: How far ahead of the set point a target may be; farther ones are drawn near, on the straight line.
        start: A first target farther than this from the set point starts a slow ramp, or is refused.
        tracking: The arm may lag behind its set point by so much; beyond, something blocks it. None: not watched, right for
            grippers, which objects do block.
    """

    name: str
    unit: str = "rad"
    lower: float
    upper: float
    velocity: float = Positive
    acceleration: float = Positive
    jerk: float = Positive
    margin: float = pydantic.Field(default=0.05, ge=0)
    max_step: float = pydantic.Field(default=0.25, gt=0)
    start: float = pydantic.Field(default=0.15, gt=0)
    tracking: float | None = pydantic.Field(default=0.2, gt=0)

    @pydantic.model_validator(mode="after")
    def _has_room(self) -> Self:
        if not self.upper - self.lower > 2 * self.margin:
            raise ValueError(f"'{self.name}': nothing is left between lower and upper after margins; make 'margin' smaller")
        return self


class WorkspaceConfig(Config):
    """Where the tool may be, and the plane that nothing may go through; base frame, [m].

    Attributes:
        lower: Corner of the box for the first point of the kinematics, the tool.
        upper: The opposite corner.
        table: Height that every point stays above; None: no table.
        margin: Commands are projected to the box made smaller by this; motion between them then has room.
        start: Refuse to start from farther outside than this.
    """

    lower: tuple[float, float, float]
    upper: tuple[float, float, float]
    table: float | None = None
    margin: float = pydantic.Field(default=0.005, ge=0)
    start: float = pydantic.Field(default=0.02, ge=0)

    @pydantic.model_validator(mode="after")
    def _has_room(self) -> Self:
        if not all(high - low > 2 * self.margin for low, high in zip(self.lower, self.upper, strict=True)):
            raise ValueError("the box is empty after margins; check 'lower', 'upper' and 'margin'")
        return self


class Freshness(Config):
    """How old inputs may become [s]; ages are the larger of time since arrival and time since the source's stamp.

    Attributes:
        state: Measured positions.
        inputs: Other inputs by name, cameras for example; those not named use ``default``.
        default: 0.3 s, or three frames of a slow camera.
        command: Of the observation behind a command; None: not watched. A chunk of 8 actions at 20 Hz is 0.4 s long.
        deadman: Since the deadman was last seen pressed; None: no deadman.
        gap: Between two calls; the robot stood still meanwhile, so motion restarts from rest.
        skew: Stamps this far in the future, or always this far in the past, are reported: clocks disagree.
    """

    state: float = pydantic.Field(default=0.15, gt=0)
    inputs: dict[str, Annotated[float, Positive]] = {}
    default: float = pydantic.Field(default=0.3, gt=0)
    command: float | None = pydantic.Field(default=1.0, gt=0)
    deadman: float | None = pydantic.Field(default=None, gt=0)
    gap: float = pydantic.Field(default=0.05, gt=0)
    skew: float = pydantic.Field(default=0.05, gt=0)


class Scale(Config):
    """Shares of the rated limits that are used, for motion and for stops alike."""

    velocity: float = pydantic.Field(default=0.5, gt=0, le=1)
    acceleration: float = pydantic.Field(default=0.5, gt=0, le=1)
    jerk: float = pydantic.Field(default=0.5, gt=0, le=1)


class SafetyLimits(Config):
    """Everything the safety filter is told.

    Attributes:
        rate: Calls per second [Hz]; each call moves the set point by one period.
        coordinates: In the order of the robot's commands.
        workspace: None: no box (the filter then needs no kinematics).
        on_far_start: ``ramp``: go to a far first target at ``ramp`` times the speed; ``refuse``: stop and say which coordinate.
        auto_resume: A hold that lasted longer [s] ends in a stop, which only ``start`` ends. Blocked arms stop at once.
    """

    rate: float = pydantic.Field(default=250.0, gt=0)
    coordinates: tuple[Coordinate, ...] = pydantic.Field(min_length=1)
    scale: Scale = Scale()
    workspace: WorkspaceConfig | None = None
    freshness: Freshness = Freshness()
    on_far_start: Literal["ramp", "refuse"] = "ramp"
    ramp: float = pydantic.Field(default=0.2, gt=0, le=1)
    auto_resume: float = pydantic.Field(default=1.0, ge=0)

    @pydantic.model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [c.name for c in self.coordinates]
        if len(set(names)) < len(names):
            raise ValueError(f"two coordinates have the same name; found {', '.join(names)}")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(c.name for c in self.coordinates)


def load_limits(source: str | Path, **changes: Any) -> SafetyLimits:
    """The limits in a YAML file, or those of a preset by name; ``changes`` replace top-level keys. Raises ConfigError."""
    path = PRESETS / f"{source}.yaml" if "/" not in str(source) and not str(source).endswith(".yaml") else Path(source)
    if path.parent == PRESETS and not path.is_file():
        raise ConfigError(
            f"no preset of safety limits '{source}': {nearest(str(source), (p.stem for p in PRESETS.glob('*.yaml')))}"
        )
    return parse(SafetyLimits, {**load_yaml(path), **changes}, where=f"safety limits '{source}'")
