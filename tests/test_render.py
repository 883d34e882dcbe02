"""Offscreen rendering: choice of the library, messages without one, pictures that show the state."""

import os
import subprocess
import sys

import numpy as np
import pytest

from robopolicy.errors import TaskError
from sim import render
from sim.arm.lift import Lift

needs_renderer = pytest.mark.usefixtures("renderer")


@needs_renderer
def test_observed_images_are_small_pictures_of_the_state() -> None:
    task = Lift(image_size=84)
    first, _ = task.reset(seed=0)
    image = first["image"]
    assert image.shape == (84, 84, 3) == task.observation_features["image"].shape
    assert image.dtype == np.uint8
    assert image.std() > 10.0
    assert np.array_equal(task.reset(seed=0)[0]["image"], image)
    assert not np.array_equal(task.reset(seed=1)[0]["image"], image)
    for _ in range(5):
        obs, *_ = task.step(np.array([0.6, 0.2, 0.1, 0.0, 0.08]))
    assert not np.array_equal(obs["image"], image)
    task.close()
    task.close()


@needs_renderer
def test_film_frames_have_the_size_asked_for_and_show_a_red_cube() -> None:
    task = Lift(render_size=128, pretty=False)
    task.reset(seed=0)
    frame = task.render().astype(int)
    assert frame.shape == (128, 128, 3)
    red = (frame[..., 0] > 120) & (frame[..., 1] < 80) & (frame[..., 2] < 80)
    assert 5 < red.sum() < 500
    task.close()


@needs_renderer
def test_a_process_that_closes_nothing_exits_in_silence() -> None:
    use = "t = Reach(image_size=32); t.reset(seed=0);"
    code = f"from sim.arm.reach import Reach; {use} {use}"  # the first is garbage that Python collects at its end
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_images_without_a_renderer_name_the_packages_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "_BACKEND", None)
    with pytest.raises(TaskError, match=r"libegl1.*libosmesa6"):
        Lift(image_size=32).reset(seed=0)
    task = Lift()
    task.reset(seed=0)
    with pytest.raises(TaskError, match="no offscreen renderer"):
        task.render()


def backend_in_a_fresh_process(**environment: str) -> list[str]:
    code = "from sim import render; import os; print(render.renderer_available(), os.environ['MUJOCO_GL'])"
    kept = {k: v for k, v in os.environ.items() if k not in ("MUJOCO_GL", "PYOPENGL_PLATFORM")}
    done = subprocess.run([sys.executable, "-c", code], env=kept | environment, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_disabled_rendering_is_respected() -> None:
    assert backend_in_a_fresh_process(MUJOCO_GL="disabled") == ["None", "disabled"]


@needs_renderer
def test_a_library_is_found_without_being_told() -> None:
    backend, exported = backend_in_a_fresh_process()
    assert backend == exported
    assert backend in ("egl", "osmesa")


@pytest.mark.parametrize(("egl", "osmesa", "expected"), [(True, True, "egl"), (False, True, "osmesa"), (False, False, None)])
def test_egl_comes_first_then_osmesa(monkeypatch: pytest.MonkeyPatch, egl: bool, osmesa: bool, expected: str | None) -> None:
    monkeypatch.setattr(render, "_egl_works", lambda: egl)
    monkeypatch.setattr(render, "_osmesa_works", lambda: osmesa)
    monkeypatch.setattr(render.sys, "platform", "linux")
    monkeypatch.setenv("MUJOCO_GL", "")
    monkeypatch.setenv("PYOPENGL_PLATFORM", "egl")
    assert render._select_backend() == expected
    assert os.environ["MUJOCO_GL"] == (expected or "disabled")
