"""``robopolicy export``: a checkpoint as graphs that run without torch."""

from __future__ import annotations

import argparse
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from robopolicy.deploy.guard import trained_ranges
from robopolicy.deploy.manifest import FORMAT, Backend, Graph, Manifest, Pose, Step, file_digest, observed
from robopolicy.errors import CheckpointError, ConfigError
from robopolicy.evaluate.commands import add_sampling_arguments, count, override_sampling, sampled

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from robopolicy.deploy.exported import ExportedPolicy
    from robopolicy.deploy.graphs import Part
    from robopolicy.policy import Policy

OPSET = 18
FUSED_CALLS = 4  # walks of at most so many calls of the network become one graph
NOISE_CONVENTION = "t = 1 is noise, t = 0 the clean chunk; noise is standard normal, float32, an input of the graphs"
_REFUSED = 1e-3  # a deviation from torch, relative to the largest entry or 1, that is no rounding

EPILOG = """\
examples:
  robopolicy export outputs/pusht_flow --to onnx
  robopolicy export outputs/pusht_flow --to openvino --steps 1 --out exports/one_step
  robopolicy eval outputs/pusht_flow/export/onnx --episodes 100      # an export is evaluated like its checkpoint
  robopolicy bench latency outputs/pusht_flow/export/onnx

Needs the packages of the extra, in the checkout: uv pip install -e '.[export]' (torchscript needs none)."""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("checkpoint", metavar="CKPT", help="a run or checkpoint folder")
    parser.add_argument("--to", choices=get_args(Backend), default="onnx", help="the runtime (default onnx)")
    add_sampling_arguments(parser)
    parser.add_argument("--batch", type=count, default=1, help="rows of each graph, fixed (default 1, what one robot needs)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write (default CKPT/export/RUNTIME)")


def run(args: argparse.Namespace) -> int:
    import torch

    from robopolicy.policy import load_policy

    torch.set_num_threads(1)
    policy = load_policy(args.checkpoint)
    override_sampling(policy, args.checkpoint, args)
    folder = args.out or Path(args.checkpoint) / "export" / (args.to + sampled(args))
    manifest = export(policy, folder, args.to, batch=args.batch, checkpoint=args.checkpoint).manifest
    sizes = {name: (folder / graph.file).stat().st_size for name, graph in manifest.graphs.items()}
    for name, graph in manifest.graphs.items():
        print(
            f"{name:<12} {graph.file:<20} {sizes[name] / 1e6:6.2f} MB  ({', '.join(graph.inputs)}) -> {', '.join(graph.outputs)}"
        )
    how = "one graph from noise and observations to actions" if manifest.fused else f"{manifest.nfe} network calls per chunk"
    print(f"sampler      {how}")
    print("parity       " + ", ".join(f"{name} {value:.1e}" for name, value in manifest.parity.items()) + "  (against torch)")
    print(f"written      {folder}")
    return 0


def export(
    policy: Policy, folder: str | Path, backend: Backend, *, batch: int = 1, checkpoint: str | Path | None = None
) -> ExportedPolicy:
    """Write graphs and manifest, and hold them to torch on random inputs before they are called an export.

    Args:
        policy: What to export, with the sampler that it shall have.
        folder: Where to; an earlier export there is replaced.
        backend: ``onnx``, ``openvino`` or ``torchscript``.
        batch: Rows of each graph.
        checkpoint: Where the policy was loaded from, for the manifest.

    Raises:
        CheckpointError: The folder holds something else, the runtime's packages are missing, or a graph deviates from torch.
        ConfigError: The policy has parts that cannot be exported.
    """
    from robopolicy.deploy import graphs
    from robopolicy.deploy.exported import ExportedPolicy
    from robopolicy.deploy.runtime import check_installed
    from robopolicy.provenance import provenance

    check_installed(backend)
    final, copied = Path(folder), graphs.exportable(policy, backend)
    if final.exists() and any(final.iterdir()) and not (final / "manifest.json").exists():
        raise CheckpointError(f"'{final}' holds other files than an export; give an empty or new folder with --out")
    steps = walk(copied)
    draws = 1 + sum(step.std > 0 for step in steps)
    parts: dict[str, Part] = {"encode": graphs.Encode(copied)}
    parts |= {name: graphs.See(copied, field) for name, field in graphs.fields(copied).items()}
    parts["decode"] = graphs.Decode(copied)
    if draws == 1 and copied.sampler.nfe(copied.path) <= FUSED_CALLS:
        parts["chunk"] = graphs.Whole(copied)
    partial = final.with_name(f".partial_{final.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        known = _examples(copied, batch)
        written = {name: _write(part, partial / name, backend, known) for name, part in parts.items()}
        document = copied.document()
        manifest = Manifest(
            format=FORMAT,
            backend=backend,
            batch=batch,
            observations=document["observations"],
            action=document["action"],
            poses=tuple(Pose(start=pose.start, rotation=pose.rotation) for pose in copied.config.action.poses),
            n_obs_steps=copied.n_obs_steps,
            horizon=copied.horizon,
            n_action_steps=copied.n_action_steps,
            rows=copied.horizon - copied.n_obs_steps + 1,
            dt=1 / copied.action_feature.rate if copied.action_feature.rate else None,
            chunk_dim=copied.action_transform.dim,
            noise_convention=NOISE_CONVENTION,
            noise_draws=draws,
            noise_scale=float(copied.path.prior(known["noise"].new_full((), copied.config.initial_noise))),
            path=copied.config.path,
            prediction=copied.config.prediction,
            sampler=copied.config.sampler,
            initial_noise=copied.config.initial_noise,
            jumps=graphs.jumps(copied),
            frozen_above=copied.config.frozen_above,
            clip=copied.sampler.clip,
            nfe=copied.nfe,
            steps=steps,
            graphs=written,
            opset=None if backend == "torchscript" else OPSET,
            trained=dict(trained_ranges(copied)),
            parity={},
            checkpoint=_origin(checkpoint),
            provenance=provenance() | {"runtime": _versions(backend)},
            files={file.name: file_digest(file) for file in sorted(partial.iterdir())},
        )
        manifest.save(partial)
        deviations = parity(policy, ExportedPolicy(partial))
        if worst := [name for name, value in deviations.items() if not value <= _REFUSED]:
            raise ConfigError(
                f"graph '{worst[0]}' deviates from torch by {deviations[worst[0]]:.1e}; "
                f"{backend} cannot express a part of this policy, try another with --to"
            )
        manifest.model_copy(update={"parity": deviations}).save(partial)
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return ExportedPolicy(final)


def walk(policy: Policy) -> tuple[Step, ...]:
    """The sampler's steps as numbers. Raises ConfigError for a sampler with a walk of its own."""
    import itertools

    import torch

    from robopolicy.generative import sampler as samplers
    from robopolicy.generative.path import Pred

    sampler, path = policy.sampler, policy.path
    if sampler.own_walk:
        if getattr(sampler, "superposes", False):
            raise ConfigError(
                "a composition by rule and/or is walked in a way that graphs cannot express; "
                "compose with rule convex or product, or export a student of it (robopolicy distill --method reflow)"
            )
        raise ConfigError(
            f"sampler '{policy.config.sampler['type']}' walks in a way of its own, which is not in the graphs; "
            "choose another sampler, or distil the policy and export the student"
        )
    zero, one = torch.zeros(1, 1, 1, dtype=torch.float64), torch.ones(1, 1, 1, dtype=torch.float64)
    times = sampler.times(path)
    steps = []
    for index, (t, to) in enumerate(itertools.pairwise(times)):
        towards_x0 = sampler.step(path, Pred(one, zero), zero, t, to)
        alpha, sigma = path.coefficients(torch.tensor(t, dtype=torch.float64))
        extrapolate = 0.0
        if isinstance(sampler, samplers.DPMSolver) and index:
            extrapolate = samplers._shared_extrapolation(path, times[index - 1], t, to)
        steps.append(
            Step(
                t=t,
                to=to,
                alpha=float(alpha),
                sigma=float(sigma),
                to_x0=float(towards_x0.mean),
                to_eps=float(sampler.step(path, Pred(zero, one), zero, t, to).mean),
                std=float(towards_x0.std),
                extrapolate=extrapolate,
                heun=isinstance(sampler, samplers.Heun) and to > 0,
            )
        )
    return tuple(steps)


def parity(policy: Policy, exported: ExportedPolicy, rounds: int = 4) -> dict[str, float]:
    """Largest deviation of each graph from torch on random inputs at every time of the walk, relative to the largest entry."""
    import numpy as np
    import torch

    manifest = exported.manifest
    deviations = dict.fromkeys(["encode", "field", "decode", "chunk"], 0.0)

    def compare(name: str, found: np.ndarray, expected: Tensor) -> None:
        wanted = expected.cpu().numpy()
        error = np.abs(found - wanted).max() / max(1.0, float(np.abs(wanted).max()))
        deviations[name] = float(np.maximum(deviations[name], error))  # which keeps NaN, as max does not

    rng = np.random.default_rng(0)
    with torch.no_grad():
        for _ in range(rounds):
            obs = {name: value.numpy() for name, value in _observations(policy, manifest.batch, rng).items()}
            inputs, tensors = exported.observe(obs), policy.observe(obs)
            ctx = policy.encode(tensors)
            context = ctx.cpu().numpy()
            compare("encode", exported.encode(inputs), ctx)
            x = rng.standard_normal((manifest.batch, manifest.horizon, manifest.chunk_dim), dtype=np.float32)
            for step in manifest.steps:
                state = torch.from_numpy(x).to(ctx)
                times = (torch.full((len(x),), time).to(ctx) for time in (step.t, step.to))
                t, to = times
                seen = policy.field(state, t, ctx, to) if manifest.jumps else policy.field(state, t, ctx)
                for found, expected in zip(exported.field(x, step.t, context, step.to), seen, strict=True):
                    compare("field", found, expected)
            compare("decode", exported.decode(x, inputs), policy.actions(state, tensors)[:, manifest.n_obs_steps - 1 :])
            noise = exported.noise(manifest.batch, torch.Generator().manual_seed(0))
            chunk = policy.sample(ctx, torch.Generator().manual_seed(0))
            compare("chunk", exported.chunk(inputs, noise), policy.actions(chunk, tensors)[:, manifest.n_obs_steps - 1 :])
    return deviations


def _examples(policy: Policy, batch: int) -> dict[str, Tensor]:
    """An example of every input that a graph may have."""
    import numpy as np
    import torch

    obs = _observations(policy, batch, np.random.default_rng(0))
    x = torch.zeros(batch, policy.horizon, policy.action_transform.dim)
    t = torch.full((batch,), 0.5)
    with torch.no_grad():
        return {
            **{observed(name): value for name, value in obs.items()},
            "x": x,
            "chunk": x,
            "noise": x,
            "t": t,
            "to": t,
            "ctx": policy.encode(obs),
        }


def _observations(policy: Policy, batch: int, rng: np.random.Generator) -> dict[str, Tensor]:
    """Random observations as policies see them: about the range of the data, images of all values."""
    import numpy as np
    import torch

    obs = {}
    for name, feature in policy.observation_features.items():
        shape = (batch, policy.n_obs_steps, *feature.shape)
        if feature.is_image:
            obs[name] = torch.from_numpy(rng.integers(0, 256, shape, dtype=np.uint8))
        else:
            value = torch.from_numpy(rng.uniform(-1.2, 1.2, shape).astype(np.float32))
            obs[name] = policy.normalizer(name).unnormalize(value.to(policy.device)).cpu()
    return obs


def _write(part: Part, stem: Path, backend: Backend, known: Mapping[str, Tensor]) -> Graph:
    """Trace one part and write its graph. Returns its entry in the manifest."""
    import torch

    examples = tuple(known[name] for name in part.inputs)
    part.eval()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # tracing says of every shape that it becomes a constant: here it shall
        found = part(*examples)
        if backend == "torchscript":
            file = stem.with_suffix(".pt")
            torch.jit.freeze(torch.jit.trace(part, examples, check_trace=False).eval()).save(str(file))
        else:
            file = stem.with_suffix(".onnx")
            _to_onnx(part, examples, file)
            if backend == "openvino":
                file = _to_openvino(file)
    outputs = found if isinstance(found, tuple) else (found,)
    return Graph(
        file=file.name,
        inputs={name: tuple(value.shape) for name, value in zip(part.inputs, examples, strict=True)},
        outputs={name: tuple(value.shape) for name, value in zip(part.outputs, outputs, strict=True)},
    )


def _to_onnx(part: Part, examples: tuple[Tensor, ...], file: Path) -> None:
    import torch

    try:
        # The exporter that works from a trace: a second for a graph, where the newer one takes ten for the same operators.
        torch.onnx.export(
            part,
            examples,
            str(file),
            input_names=list(part.inputs),
            output_names=list(part.outputs),
            opset_version=OPSET,
            dynamo=False,
        )
    except (RuntimeError, torch.onnx.errors.OnnxExporterError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"a part of this policy has no ONNX operator ({reason}); try --to torchscript") from error


def _to_openvino(file: Path) -> Path:
    import openvino

    model = openvino.Core().read_model(str(file))  # convert_model would do too, but it also reports to its makers
    openvino.save_model(model, str(file.with_suffix(".xml")), compress_to_fp16=False)
    file.unlink()
    return file.with_suffix(".xml")


def _origin(checkpoint: str | Path | None) -> dict[str, Any]:
    """Path, digest of the weights and provenance of the checkpoint."""
    if checkpoint is None:
        return {}
    from robopolicy.policy import read_provenance
    from robopolicy.train.checkpoint import find_policy, read_document

    folder = find_policy(checkpoint)
    digest = read_document(folder / "policy").get("sha256")
    return {"path": str(folder), "sha256": digest, "provenance": read_provenance(folder)}


def _versions(backend: Backend) -> dict[str, str]:
    from importlib.metadata import version

    from robopolicy.deploy.runtime import NEEDS

    return {name: version(name) for name in NEEDS[backend]}
