"""Action representations: exact round trips, and invariance that shows relative poses are done as rigid transforms."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robopolicy.config import parse
from robopolicy.data.actions import ActionConfig, ActionTransform, PoseConfig
from robopolicy.data.rotations import SE3, SIZES, Representation, from_matrix, matrix_from_quat, to_matrix
from robopolicy.errors import ConfigError
from robopolicy.features import Feature

OBSERVATIONS = {
    "position": Feature("position", (3,), unit="m"),
    "quat": Feature("quat", (4,), unit="quat_xyzw"),
    "joints": Feature("joints", (5,), unit="rad"),
    "pixels": Feature("pixels", (5,), unit="px"),
}
ROTATIONS: list[Representation] = ["rot6d", "quat_xyzw", "rotvec"]
TYPES = ["absolute", "relative", "delta"]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def random_rotation(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> torch.Tensor:
    return matrix_from_quat(torch.randn(*shape, 4, generator=generator, dtype=torch.float64)).to(dtype)


def make_pose_problem(
    kind: str, rotation: Representation, seed: int, dtype: torch.dtype
) -> tuple[ActionTransform, torch.Tensor, dict[str, torch.Tensor]]:
    """Two entries before a pose and a gripper after it."""
    generator = torch.Generator().manual_seed(seed)
    size = 3 + SIZES[rotation]
    pose = PoseConfig(start=2, rotation=rotation, reference=("position", "quat"), reference_rotation="quat_xyzw")
    config = ActionConfig(type=kind, poses=(pose,))  # type: ignore[arg-type]
    transform = ActionTransform(config, Feature("action", (2 + size + 1,)), OBSERVATIONS)
    batch, horizon = 3, 6
    action = torch.cat(
        [
            torch.randn(batch, horizon, 5, generator=generator, dtype=torch.float64).to(dtype),
            from_matrix(random_rotation((batch, horizon), generator, dtype), rotation),
            torch.rand(batch, horizon, 1, generator=generator, dtype=torch.float64).to(dtype),
        ],
        dim=-1,
    )
    reference = {
        "position": torch.randn(batch, 3, generator=generator, dtype=torch.float64).to(dtype),
        "quat": from_matrix(random_rotation((batch,), generator, dtype), "quat_xyzw"),
    }
    return transform, action, reference


def assert_same_action(a: torch.Tensor, b: torch.Tensor, rotation: Representation, tolerance: float) -> None:
    """Equal up to the two names that quaternions and half turns have for one rotation."""
    assert torch.allclose(a[..., :5], b[..., :5], atol=tolerance)
    assert torch.allclose(a[..., -1], b[..., -1], atol=tolerance)
    assert torch.allclose(to_matrix(a[..., 5:-1], rotation), to_matrix(b[..., 5:-1], rotation), atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("kind", TYPES)
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_poses_round_trip(dtype: torch.dtype, rotation: Representation, kind: str, seed: int) -> None:
    transform, action, reference = make_pose_problem(kind, rotation, seed, dtype)
    encoded = transform.encode(action, reference)
    assert encoded.shape == (3, 6, 2 + 9 + 1)
    assert transform.dim == 12
    assert encoded.dtype == dtype
    assert torch.equal(encoded[..., :2], action[..., :2])
    assert torch.equal(encoded[..., -1], action[..., -1])
    assert_same_action(transform.decode(encoded, reference), action, rotation, TOLERANCE[dtype])


@pytest.mark.parametrize("kind", ["relative", "delta"])
@pytest.mark.parametrize("rotation", ROTATIONS)
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_relative_poses_do_not_depend_on_where_the_world_frame_is(kind: str, rotation: Representation, seed: int) -> None:
    """Moving the whole scene moves actions and reference alike and leaves the encoding as it is; differences do not."""
    transform, action, reference = make_pose_problem(kind, rotation, seed, torch.float64)
    generator = torch.Generator().manual_seed(seed + 1)
    world = SE3(torch.randn(3, generator=generator, dtype=torch.float64), random_rotation((), generator, torch.float64))

    def move(values: torch.Tensor, representation: Representation) -> torch.Tensor:
        pose = world.compose(SE3(values[..., :3], to_matrix(values[..., 3:], representation)))
        return torch.cat([pose.position, from_matrix(pose.rotation, representation)], dim=-1)

    moved_action = torch.cat([action[..., :2], move(action[..., 2:-1], rotation), action[..., -1:]], dim=-1)
    moved = move(torch.cat([reference["position"], reference["quat"]], dim=-1), "quat_xyzw")
    moved_reference = {"position": moved[:, :3], "quat": moved[:, 3:]}
    a, b = transform.encode(action, reference), transform.encode(moved_action, moved_reference)
    assert torch.allclose(a, b, atol=1e-9)


def test_an_action_at_the_reference_is_the_identity() -> None:
    transform, action, reference = make_pose_problem("relative", "quat_xyzw", 0, torch.float64)
    pose = torch.cat([reference["position"], reference["quat"]], dim=-1)[:, None].expand(-1, 6, -1)
    action = torch.cat([action[..., :2], pose, action[..., -1:]], dim=-1)
    encoded = transform.encode(action, reference)
    identity = torch.tensor([0, 0, 0, 1, 0, 0, 0, 1, 0], dtype=torch.float64)
    assert torch.allclose(encoded[..., 2:11], identity.expand(3, 6, 9), atol=1e-12)


def vector(kind: str, **settings: Any) -> ActionTransform:
    config = ActionConfig(type=kind, reference=("joints",), **settings)  # type: ignore[arg-type]
    return ActionTransform(config, Feature("action", (5,), unit="rad"), OBSERVATIONS)


def test_vectors_are_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    action = torch.randn(4, 6, 5, generator=generator)
    reference = {"joints": torch.randn(4, 5, generator=generator)}
    relative = vector("relative").encode(action, reference)
    assert torch.equal(relative, action - reference["joints"][:, None])
    delta = vector("delta").encode(action, reference)
    assert torch.equal(delta[:, 1:], action.diff(dim=1))
    assert torch.equal(delta[:, 0], action[:, 0] - reference["joints"])
    for kind in ("relative", "delta"):
        transform = vector(kind)
        assert torch.allclose(transform.decode(transform.encode(action, reference), reference), action, atol=1e-5)


def test_entries_outside_the_columns_pass_through() -> None:
    config = ActionConfig(type="relative", reference=("position",), columns=(1, 4))
    transform = ActionTransform(config, Feature("action", (5,)), OBSERVATIONS)
    action, reference = torch.ones(2, 3, 5), {"position": torch.full((2, 3), 0.25)}
    encoded = transform.encode(action, reference)
    assert encoded[0, 0].tolist() == [1, 0.75, 0.75, 0.75, 1]
    assert torch.equal(transform.decode(encoded, reference), action)


def test_two_arms_have_two_poses() -> None:
    poses = tuple(
        PoseConfig(start=s, rotation="rotvec", reference=("position", "quat"), reference_rotation="quat_xyzw") for s in (7, 0)
    )
    transform = ActionTransform(ActionConfig(type="relative", poses=poses), Feature("action", (14,)), OBSERVATIONS)
    assert transform.dim == 20
    _, _, reference = make_pose_problem("relative", "rotvec", 0, torch.float64)
    action = torch.randn(3, 6, 14, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.5
    assert torch.allclose(transform.decode(transform.encode(action, reference), reference), action, atol=1e-10)


def test_absolute_without_poses_is_the_identity() -> None:
    transform = ActionTransform(ActionConfig(), Feature("action", (5,)), {})
    action = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(transform.encode(action, {}), action)
    assert torch.equal(transform.decode(action, {}), action)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"type": "relativ"}, "absolute"),
        ({"type": "relative"}, "needs 'reference'"),
        ({"type": "absolute", "reference": ["joints"]}, "takes no reference"),
        ({"type": "delta", "poses": [{"rotation": "rotvec"}]}, "needs a 'reference' for every pose"),
        ({"type": "relative", "reference": ["joints"], "poses": [{"rotation": "rotvec", "reference": ["position"]}]}, "exclude"),
        ({"poses": [{"rotation": "euler"}]}, "rot6d"),
        ({"poses": [{"rotation": "rotvec"}, {"rotation": "rotvec", "start": 4}]}, "overlap"),
    ],
)
def test_inconsistent_configs_are_refused(value: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(ActionConfig, value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ActionConfig(type="relative", reference=("joint",)), "did you mean 'joints'"),
        (ActionConfig(type="relative", reference=("position",)), "has 3 entries; expected 5"),
        (ActionConfig(type="relative", reference=("pixels",)), "means nothing"),
        (ActionConfig(type="relative", reference=("joints",), columns=(0, 6)), "leave the action"),
        (ActionConfig(poses=(PoseConfig(rotation="rotvec"),)), "leave the action"),
        (ActionConfig(type="relative", poses=(PoseConfig(rotation="rotvec", start=0, reference=("quat",)),)), "leave the action"),
    ],
)
def test_configs_that_do_not_fit_the_features_are_refused(config: ActionConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ActionTransform(config, Feature("action", (5,), unit="rad"), OBSERVATIONS)


def test_a_pose_reference_of_the_wrong_size_is_refused() -> None:
    config = ActionConfig(type="relative", poses=(PoseConfig(rotation="rotvec", reference=("quat",)),))
    with pytest.raises(ConfigError, match=r"has 4 entries; expected 6 \(position and rotvec\)"):
        ActionTransform(config, Feature("action", (7,)), OBSERVATIONS)
