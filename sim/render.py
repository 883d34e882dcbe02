"""Offscreen pictures of a MuJoCo scene, without a display and without a GPU.

MuJoCo decides which OpenGL library to load when ``mujoco`` is first imported, and that import fails when the library is missing.
So this module first probes what the machine has and sets ``MUJOCO_GL`` (EGL, else OSMesa, else ``disabled``: simulation without
pictures; a value that the user exported is respected if it works), and only then imports mujoco. Everybody else in ``sim`` gets
it from here: ``from sim.render import mujoco``.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import sys
import weakref
from typing import Any

import numpy as np

from robopolicy.errors import TaskError

_OFF = ("disable", "disabled", "off", "false", "0")
_INSTALL = "install one with 'apt-get install libegl1' (EGL) or 'apt-get install libosmesa6' (OSMesa); simulation works without"

# EGL constants, from the Khronos registry.
_EGL_PLATFORM_DEVICE_EXT = 0x313F
_MAX_EGL_DEVICES = 16


def _egl_works() -> bool:
    """True when libEGL loads and at least one of its devices initialises; a library without a driver is of no use."""
    try:
        egl = ctypes.CDLL("libEGL.so.1")
        ctypes.CDLL("libGL.so.1")  # what PyOpenGL calls for everything that is not EGL itself
    except OSError:
        return False
    address = egl.eglGetProcAddress
    address.restype, address.argtypes = ctypes.c_void_p, [ctypes.c_char_p]
    query, display_of = address(b"eglQueryDevicesEXT"), address(b"eglGetPlatformDisplayEXT")
    if not query or not display_of:
        return False
    devices = (ctypes.c_void_p * _MAX_EGL_DEVICES)()
    count = ctypes.c_int32(0)
    query_devices = ctypes.CFUNCTYPE(ctypes.c_uint, ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p)(query)
    platform_display = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p)(display_of)
    if not query_devices(_MAX_EGL_DEVICES, ctypes.byref(devices), ctypes.byref(count)):
        return False
    egl.eglInitialize.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    for device in devices[: count.value]:
        display = platform_display(_EGL_PLATFORM_DEVICE_EXT, device, None)
        if display and egl.eglInitialize(display, None, None):
            return True
    return False


def _osmesa_works() -> bool:
    for name in ("libOSMesa.so.8", "libOSMesa.so"):
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        return True
    return False


def _select_backend() -> str | None:
    """Probe, export ``MUJOCO_GL`` accordingly, and return ``egl``, ``osmesa``, another platform's library, or None."""
    wanted = os.environ.get("MUJOCO_GL", "").lower().strip()
    if not sys.platform.startswith("linux"):
        return None if wanted in _OFF else (wanted or "native")
    works = {"egl": _egl_works, "osmesa": _osmesa_works}
    candidates = [] if wanted in _OFF else [wanted] if wanted in works else list(works)
    chosen = next((name for name in candidates if works[name]()), None)
    os.environ["MUJOCO_GL"] = chosen or "disabled"
    if chosen:
        os.environ["PYOPENGL_PLATFORM"] = chosen
    return chosen


_BACKEND = _select_backend()
import mujoco  # noqa: E402  see the top of this file


def renderer_available() -> str | None:
    """The offscreen renderer in use (``egl``, ``osmesa``, ``native``), or None when the machine has none."""
    return _BACKEND


class Renderer:
    """Draws one model's state from one camera into ``uint8`` arrays of a fixed size.

    Args:
        model: ``mujoco.MjModel``. Its ``vis.quality`` (shadow map, multisampling) is read here, once, unless ``pretty``.
        height: Pixels.
        width: Pixels.
        camera: Name of a camera of the model.
        pretty: Shadows and multisampling: for films. Ten times slower without a GPU.

    Raises:
        TaskError: When the machine has no offscreen renderer; names the packages to install.
    """

    def __init__(self, model: Any, height: int, width: int, camera: str, pretty: bool = False) -> None:
        if _BACKEND is None:
            asked = os.environ.get("MUJOCO_GL", "")
            raise TaskError(f"no offscreen renderer found (MUJOCO_GL={asked}), so no images; {_INSTALL}")
        self._context = _gl_context(width, height)
        self._context.make_current()
        quality, glob = model.vis.quality, model.vis.global_
        before = (quality.shadowsize, quality.offsamples, glob.offwidth, glob.offheight)
        # The context copies these settings when it is made; the model is left as it was found.
        glob.offwidth, glob.offheight = width, height
        if pretty:
            quality.shadowsize, quality.offsamples = 2048, 4
        try:
            self._mjr = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100.value)
        finally:
            quality.shadowsize, quality.offsamples, glob.offwidth, glob.offheight = before
        _close_at_exit(self)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value, self._mjr)
        self._model = model
        self._scene = mujoco.MjvScene(model, maxgeom=200)
        self._scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = pretty
        self._scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False
        self._option = mujoco.MjvOption()
        self._option.geomgroup[3:] = 0  # collision-only shapes
        self._option.sitegroup[1:] = 0  # frames without a visible mark
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._camera.fixedcamid = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, camera)
        if self._camera.fixedcamid < 0:
            raise TaskError(f"camera '{camera}' is not in the model")
        self._rect = mujoco.MjrRect(0, 0, width, height)
        self._pixels = np.empty((height, width, 3), np.uint8)

    def __call__(self, data: Any) -> np.ndarray:
        """The picture ``[height, width, 3]`` uint8 RGB of ``data``, whose kinematics must be up to date."""
        self._context.make_current()
        everything = mujoco.mjtCatBit.mjCAT_ALL.value
        mujoco.mjv_updateScene(self._model, data, self._option, None, self._camera, everything, self._scene)
        mujoco.mjr_render(self._rect, self._scene, self._mjr)
        mujoco.mjr_readPixels(self._pixels, None, self._rect, self._mjr)
        return self._pixels[::-1].copy()  # OpenGL's first row is the lowest

    def close(self) -> None:
        """Free the OpenGL context. Safe to call twice."""
        if self._context is not None:
            self._context.make_current()
            self._mjr.free()
            self._context.free()
            self._context = None


_OPEN: weakref.WeakSet[Renderer] = weakref.WeakSet()


def _close_open() -> None:
    for renderer in list(_OPEN):
        renderer.close()


def _close_at_exit(renderer: Renderer) -> None:
    """Close what its owner left open before mujoco shuts EGL down, or every context complains on stderr as it is collected.

    Exit handlers run last in, first out, and mujoco registers its own with the first context: so register anew after each.
    """
    _OPEN.add(renderer)
    atexit.unregister(_close_open)
    atexit.register(_close_open)


def _gl_context(width: int, height: int) -> Any:
    """An OpenGL context of the chosen backend, even when something else imported mujoco under another one."""
    if _BACKEND == "egl":
        from mujoco.egl import GLContext
    elif _BACKEND == "osmesa":
        from mujoco.osmesa import GLContext
    else:
        from mujoco.gl_context import GLContext
    return GLContext(width, height)
