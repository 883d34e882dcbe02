"""Rotations and rigid transforms: properties, round trips, and the corners near zero and near pi. scipy is the reference."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from robopolicy.data.rotations import (
    SE3,
    SIZES,
    Representation,
    from_matrix,
    matrix_from_quat,
    matrix_from_rot6d,
    matrix_from_rotvec,
    normalize_quat,
    quat_from_matrix,
    quat_from_rotvec,
    rot6d_from_matrix,
    rotvec_from_matrix,
    rotvec_from_quat,
    to_matrix,
)
from robopolicy.errors import DataError

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
DTYPES = [torch.float32, torch.float64]
# Angles where formulas break down: zero, denormal, around the switch to series, and around pi.
ANGLES = [0.0, 1e-30, 1e-12, 1e-8, 1e-5, 9.9e-4, 1e-3, 1.1e-3, 0.1, 1.0, 2.0, 3.0, math.pi - 1e-3, math.pi - 1e-6, math.pi - 1e-9]


def rotvecs(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rotation vectors ``[300, 3]`` about random axes, and their angles: a third of them delicate, the others anything to pi."""
    rng = np.random.default_rng(seed)
    axes = rng.normal(size=(300, 3))
    axes[:20] = np.eye(3)[rng.integers(0, 3, 20)] * rng.choice([-1, 1], (20, 1))
    angle = np.where(rng.random(300) < 0.33, rng.choice(ANGLES, 300), rng.uniform(0, math.pi, 300))
    return axes / np.linalg.norm(axes, axis=1, keepdims=True) * angle[:, None], angle


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_conversions_agree_with_scipy(dtype: torch.dtype, seed: int) -> None:
    vectors, _ = rotvecs(seed)
    reference = Rotation.from_rotvec(vectors)
    tolerance = TOLERANCE[dtype]
    x = torch.from_numpy(vectors).to(dtype)
    matrix = torch.from_numpy(reference.as_matrix()).to(dtype)
    assert torch.allclose(matrix_from_rotvec(x), matrix, atol=tolerance)
    assert torch.allclose(quat_from_rotvec(x), torch.from_numpy(reference.as_quat(canonical=True)).to(dtype), atol=tolerance)
    assert torch.allclose(matrix_from_quat(quat_from_matrix(matrix)), matrix, atol=tolerance)
    assert torch.allclose(matrix_from_rotvec(rotvec_from_matrix(matrix)), matrix, atol=tolerance)
    assert torch.allclose(matrix_from_rot6d(rot6d_from_matrix(matrix)), matrix, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_rotation_vectors_round_trip(dtype: torch.dtype, seed: int) -> None:
    vectors, angle = rotvecs(seed)
    x = torch.from_numpy(vectors).to(dtype)
    back = rotvec_from_quat(quat_from_rotvec(x))
    clear = torch.from_numpy(angle < math.pi - 1e-5)  # beyond, a vector and the one 2 pi away may be taken for each other
    assert torch.allclose(back[clear], x[clear], atol=TOLERANCE[dtype])
    opposite = torch.where((back * x).sum(-1, keepdim=True) < 0, -back, back)
    assert torch.allclose(opposite[~clear], x[~clear], atol=1e-4)
    assert (back.norm(dim=-1) <= math.pi + TOLERANCE[dtype]).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (-1, 2, 3)])
def test_half_turns_are_exact(dtype: torch.dtype, axis: tuple[int, int, int]) -> None:
    reference = Rotation.from_rotvec(np.array(axis) / np.linalg.norm(axis) * math.pi)
    matrix = torch.from_numpy(reference.as_matrix()).to(dtype)
    assert torch.allclose(matrix_from_quat(quat_from_matrix(matrix)), matrix, atol=TOLERANCE[dtype])
    rotvec = rotvec_from_matrix(matrix)
    assert rotvec.norm().item() == pytest.approx(math.pi, abs=TOLERANCE[dtype])
    assert torch.allclose(matrix_from_rotvec(rotvec), matrix, atol=TOLERANCE[dtype])


@settings(max_examples=20, deadline=None)
@given(values=st.lists(st.floats(-10, 10), min_size=6, max_size=6))
def test_any_six_numbers_in_general_position_become_a_rotation(values: list[float]) -> None:
    x = torch.tensor(values, dtype=torch.float64)
    if torch.linalg.cross(x[:3], x[3:]).norm() < 1e-3:
        return
    matrix = matrix_from_rot6d(x)
    assert torch.allclose(matrix @ matrix.T, torch.eye(3, dtype=torch.float64), atol=1e-9)
    assert torch.linalg.det(matrix).item() == pytest.approx(1.0, abs=1e-9)


def test_rot6d_is_the_first_two_columns() -> None:
    matrix = torch.arange(9.0).reshape(3, 3)
    assert rot6d_from_matrix(matrix).tolist() == [0, 3, 6, 1, 4, 7]


def test_batches_are_elementwise() -> None:
    generator = torch.Generator().manual_seed(0)
    quat = normalize_quat(torch.randn(4, 5, 4, dtype=torch.float64, generator=generator))
    matrix = matrix_from_quat(quat)
    assert matrix.shape == (4, 5, 3, 3)
    for representation in SIZES:
        whole = from_matrix(matrix, representation)  # type: ignore[arg-type]
        assert whole.shape == (4, 5, SIZES[representation])
        assert torch.allclose(whole[2, 3], from_matrix(matrix[2, 3], representation))  # type: ignore[arg-type]


@pytest.mark.parametrize("representation", ["rot6d", "quat_xyzw", "rotvec"])
@pytest.mark.parametrize("angle", [0.0, 1e-12, 1e-6, 1e-3, 0.5, 3.1])
def test_gradients_are_finite_everywhere(representation: Representation, angle: float) -> None:
    rotvec = torch.tensor([0.6, 0.0, 0.8], dtype=torch.float64) * angle
    rotation = from_matrix(matrix_from_rotvec(rotvec), representation).detach().requires_grad_()
    matrix = to_matrix(rotation, representation)
    (matrix * torch.arange(9.0, dtype=torch.float64).reshape(3, 3)).sum().backward()
    assert rotation.grad is not None
    assert torch.isfinite(rotation.grad).all()
    leaf = rotvec.clone().requires_grad_()
    rotvec_from_quat(quat_from_rotvec(leaf)).sum().backward()
    assert leaf.grad is not None
    assert torch.allclose(leaf.grad, torch.ones(3, dtype=torch.float64), atol=1e-6)  # the round trip is the identity


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_rigid_transforms_form_a_group(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def pose() -> SE3:
        quat = torch.randn(7, 4, dtype=torch.float64, generator=generator)
        return SE3(torch.randn(7, 3, dtype=torch.float64, generator=generator), matrix_from_quat(quat))

    a, b, c = pose(), pose(), pose()
    left, right = a.compose(b).compose(c), a.compose(b.compose(c))
    assert torch.allclose(left.position, right.position, atol=1e-12)
    assert torch.allclose(left.rotation, right.rotation, atol=1e-12)
    unit_pose = a.inverse().compose(a)
    assert torch.allclose(unit_pose.position, torch.zeros(7, 3, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(unit_pose.rotation, torch.eye(3, dtype=torch.float64).expand(7, 3, 3), atol=1e-12)
    point = torch.randn(7, 3, dtype=torch.float64, generator=generator)
    moved = (a.rotation @ point[..., None]).squeeze(-1) + a.position
    assert torch.allclose(a.inverse().compose(SE3(moved, a.rotation)).position, point, atol=1e-12)


def test_an_unknown_representation_names_the_valid_ones() -> None:
    with pytest.raises(DataError, match="did you mean 'rot6d'"):
        to_matrix(torch.zeros(6), "rot6")  # type: ignore[arg-type]
