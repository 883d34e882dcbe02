"""Runtimes of exported graphs behind one call: ``graph({"x": array, ...}) -> [array, ...]``.

Each is imported only when a graph of its kind is opened. One thread unless more are asked for, and none that spins while it
waits: a robot's computer has a control loop to serve beside the network.
"""

from __future__ import annotations

import ctypes
import importlib
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from robopolicy.deploy.manifest import Backend
from robopolicy.errors import CheckpointError, install

NEEDS: Mapping[Backend, tuple[str, ...]] = {
    "onnx": ("torch", "onnx", "onnxruntime"),
    "openvino": ("torch", "onnx", "openvino"),
    "torchscript": ("torch",),
}  # to make a graph, and to hold it to torch

Run = Callable[[Mapping[str, np.ndarray]], list[np.ndarray]]


def check_installed(backend: Backend) -> None:
    """Raises CheckpointError unless all is there to make a graph, and to hold it to torch."""
    for name in NEEDS[backend]:
        _import(name)


def open_graph(path: Path, backend: Backend, threads: int = 1) -> Run:
    """Load a graph, ready to run.

    Raises:
        CheckpointError: Its runtime is not installed, or refuses the file.
    """
    try:
        return _OPENERS[backend](path, threads)
    except CheckpointError:
        raise
    except Exception as error:  # runtimes have exceptions of many kinds, most of them bare RuntimeError
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{backend} cannot load '{path}' ({reason}); export again with these versions, or --to another"
        ) from error


def _open_onnx(path: Path, threads: int) -> Run:
    ort = _import("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        outputs: list[np.ndarray] = session.run(None, inputs)
        return outputs

    return run


def _open_openvino(path: Path, threads: int) -> Run:
    ov = _import("openvino")
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "f32",  # the default is bf16 where the processor has it: a silent loss of parity
    }
    request = ov.Core().compile_model(str(path), "CPU", settings).create_infer_request()
    _use_the_ordinary_stack_for_signals()

    def run(inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        outputs = request.infer(dict(inputs), share_inputs=True)
        return [np.array(outputs[port]) for port in range(len(outputs))]  # copies: the request reuses its buffers

    return run


class _SignalStack(ctypes.Structure):
    """``stack_t`` of <signal.h>."""

    _fields_ = [("pointer", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]


def _use_the_ordinary_stack_for_signals() -> None:
    """Where the processor has AMX, OpenVINO gives this thread a signal stack of the least size, on which Python's own handler
    overflows: Ctrl-C was a segmentation fault (2026.4.1, Python 3.11, seen in three of four runs)."""
    if sys.platform == "linux":
        disabled = _SignalStack(flags=2)  # SS_DISABLE
        ctypes.CDLL(None).sigaltstack(ctypes.byref(disabled), None)


def _open_torchscript(path: Path, threads: int) -> Run:
    torch = _import("torch")
    torch.set_num_threads(threads)  # torch has one setting for the whole process
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # TorchScript is: there is no successor that other languages load
        module = torch.jit.load(str(path)).eval()

    def run(inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        with torch.inference_mode():
            outputs = module(*(torch.from_numpy(value) for value in inputs.values()))
        return [value.numpy() for value in (outputs if isinstance(outputs, tuple) else (outputs,))]

    return run


_OPENERS: dict[Backend, Callable[[Path, int], Run]] = {
    "onnx": _open_onnx,
    "openvino": _open_openvino,
    "torchscript": _open_torchscript,
}


def _import(name: str) -> ModuleType | Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise CheckpointError(f"{name} is not installed; {install('export')}") from error
