"""The T block of Push-T: its shape, in its own frame, which sits at the centre of mass with the bar towards +y. Metres."""

from __future__ import annotations

import numpy as np

# The proportions of planar Push-T.
WIDTH = 0.16  # of the bar
THICK = 0.04  # of the bar and of the stem
STEM = 0.12  # length of the stem below the bar
HEIGHT = 0.04  # above the table

BAR_Y = STEM * (STEM + THICK) / 2 / (WIDTH + STEM)  # centre of the bar
STEM_Y = BAR_Y - (STEM + THICK) / 2  # centre of the stem
FOOT_Y = STEM_Y - STEM / 2

_CENTRES = np.array([[0.0, BAR_Y], [0.0, STEM_Y]])
_HALVES = np.array([[WIDTH / 2, THICK / 2], [THICK / 2, STEM / 2]])

KEYPOINTS = np.array([[-WIDTH / 2, BAR_Y], [WIDTH / 2, BAR_Y], [0.0, FOOT_Y], [0.0, BAR_Y]])
KEYPOINT_NAMES = ("left", "right", "foot", "neck")


def inside(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Which points lie within the T."""
    in_bar = (np.abs(x) <= WIDTH / 2) & (np.abs(y - BAR_Y) <= THICK / 2)
    return in_bar | ((np.abs(x) <= THICK / 2) & (np.abs(y - STEM_Y) <= STEM / 2))


def distance(points: np.ndarray) -> np.ndarray:
    """Distance ``[N]`` from points ``[N, 2]`` to the T; negative inside."""
    gap = np.abs(points[:, None] - _CENTRES) - _HALVES  # [N, 2 boxes, 2]
    outside = np.linalg.norm(np.maximum(gap, 0.0), axis=-1)
    return np.min(outside + np.minimum(np.max(gap, axis=-1), 0.0), axis=-1)


def sample_points(spacing: float = 0.004) -> np.ndarray:
    """Regular grid of points ``[N, 2]`` over the T, at cell centres so that none lies on an edge."""
    ticks = np.arange(-0.16 + spacing / 2, 0.16, spacing)
    x, y = np.meshgrid(ticks, ticks + BAR_Y)
    keep = inside(x, y)
    return np.stack([x[keep], y[keep]], axis=1)


def faces(margin: float, spacing: float = 0.008) -> tuple[np.ndarray, np.ndarray]:
    """Places where a stick can push: points ``[N, 2]`` of the outline and inward normals ``[N, 2]``.

    Args:
        margin: To keep from corners, inner and outer.
        spacing: Between neighbouring points, at most.
    """
    top, under, side, stem = BAR_Y + THICK / 2, BAR_Y - THICK / 2, WIDTH / 2, THICK / 2
    # Start, end, inward normal.
    edges = [
        ((-side, top), (side, top), (0, -1)),
        ((side, top), (side, under), (-1, 0)),
        ((side, under), (stem, under), (0, 1)),
        ((stem, under), (stem, FOOT_Y), (-1, 0)),
        ((stem, FOOT_Y), (-stem, FOOT_Y), (0, 1)),
        ((-stem, FOOT_Y), (-stem, under), (1, 0)),
        ((-stem, under), (-side, under), (0, 1)),
        ((-side, under), (-side, top), (1, 0)),
    ]
    points, normals = [], []
    for start, end, normal in edges:
        a, b = np.array(start), np.array(end)
        length = float(np.linalg.norm(b - a))
        count = max(2, int((length - 2 * margin) / spacing) + 1)
        for s in np.linspace(margin, length - margin, count):
            points.append(a + (b - a) * s / length)
            normals.append(normal)
    return np.array(points), np.array(normals, float)
