"""Exports: they are the checkpoint, to rounding, in every runtime; and damaged ones are refused in one line."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_compose import SUPERPOSE, A, B
from test_compose import observations as composed_observations
from test_policy import generators, observations, policy

from robopolicy import cli
from robopolicy.compose.policy import compose
from robopolicy.config import parse
from robopolicy.data.normalize import Normalizer
from robopolicy.deploy.export import export
from robopolicy.deploy.exported import ExportedPlanner, ExportedPolicy
from robopolicy.deploy.manifest import file_digest, load_manifest
from robopolicy.errors import CheckpointError, ConfigError, DataError
from robopolicy.evaluate.run import evaluate
from robopolicy.features import Feature
from robopolicy.policy import Policy, PolicyConfig, load_policy
from robopolicy.task import TaskSpec

UNET = {"type": "unet1d", "down_dims": [8, 16], "time_dim": 8, "groups": 4, "activation": "mish"}
DIT = {"type": "dit", "width": 16, "depth": 1, "heads": 2}
EPS = {"path": {"type": "vp_cosine"}, "prediction": "eps", "normalize": {"action": "minmax"}}

# Every path, network, kind of prediction and kind of sampler meets at least one other of each.
CASES: dict[str, dict[str, Any]] = {
    "one step": {"sampler": {"type": "euler", "num_steps": 1}},
    "flow, euler": {"sampler": {"type": "euler", "num_steps": 6}, "net": DIT},
    "cosine, ddim": {**EPS, "sampler": {"type": "ddim", "num_steps": 5}, "net": UNET},
    "cosine, ddpm, fresh noise": {**EPS, "sampler": {"type": "ddpm", "num_steps": 7}},
    "cosine, second order": {"path": {"type": "vp_cosine"}, "prediction": "v", "sampler": {"type": "dpm_solver", "clip": 3.0}},
    "edm, heun": {"path": {"type": "edm"}, "prediction": "v", "sampler": {"type": "heun", "num_steps": 4}, "net": UNET},
    "edm, x0": {"path": {"type": "edm"}, "prediction": "x0", "net": DIT, "sampler": {"type": "euler", "num_steps": 2}},
    "flow map": {"target_time": True, "sampler": {"type": "jump", "num_steps": 2}, "net": UNET},
    "flow map, many jumps": {"target_time": True, "sampler": {"type": "jump", "num_steps": 5}},
    "flow map, walked": {"target_time": True, "sampler": {"type": "euler", "num_steps": 5}},
    "consistency": {"sampler": {"type": "consistency", "num_steps": 2}},
    "iterated regression": {
        "sampler": {"type": "consistency", "num_steps": 2, "times": [1.0, 0.1], "noise": 0.0},
        "initial_noise": 0.0,
        "prediction": "x0",
    },
    "two networks": {"frozen_above": 0.5, "sampler": {"type": "euler", "num_steps": 5}},
    "relative, a scale per row": {
        "action": {"type": "relative", "reference": ["position"]},
        "normalize_per_step": True,
        "sampler": {"type": "euler", "num_steps": 2},
    },
}


def pose_policy() -> Policy:
    """Poses relative to the hand's own, as the arm tasks have them."""
    observed = {
        "ee_pos": Feature("ee_pos", (3,), unit="m"),
        "ee_quat": Feature("ee_quat", (4,), unit="quat_xyzw"),
        "width": Feature("width", (1,), unit="m"),
    }
    pose = {"start": 0, "rotation": "rot6d", "reference": ["ee_pos", "ee_quat"], "reference_rotation": "quat_xyzw"}
    value = {
        "horizon": 8,
        "n_action_steps": 4,
        "net": {"type": "mlp", "width": 16, "depth": 1},
        "encoder": {"type": "state", "hidden": [8]},
        "action": {"type": "relative", "poses": [pose]},
        "sampler": {"type": "euler", "num_steps": 2},
    }
    rng = np.random.default_rng(0)
    normalizers = {name: Normalizer.fit(rng.normal(size=(50, f.size))) for name, f in observed.items() if name != "ee_quat"}
    normalizers |= {"ee_quat": Normalizer(4, "identity"), "action": Normalizer.fit(rng.normal(size=(50, 10)), "meanstd")}
    made = Policy(parse(PolicyConfig, value), observed, Feature("action", (10,), rate=20.0), normalizers)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return made.eval()


def pose_observations(batch: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    sizes = {"ee_pos": 3, "ee_quat": 4, "width": 1}
    return {name: rng.normal(size=(batch, 2, size)).astype(np.float32) for name, size in sizes.items()}


def assert_same(exported: ExportedPolicy, made: Policy, obs: dict[str, np.ndarray], seeds: range) -> None:
    """The same actions from the same generators, and the same calls of the generators."""
    ours, theirs = generators(*seeds), generators(*seeds)
    expected = made.act(obs, theirs)
    scale = max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(exported.act(obs, ours), expected, atol=1e-4 * scale, rtol=0)
    assert [g.get_state().tolist() for g in ours] == [g.get_state().tolist() for g in theirs]


@pytest.mark.parametrize("case", CASES)
def test_an_export_acts_as_its_checkpoint(case: str, tmp_path: Path) -> None:
    made = policy(**CASES[case])
    exported = export(made, tmp_path / "export", "onnx")
    assert_same(exported, made, observations(5), range(5))
    assert exported.manifest.fused == (exported.manifest.nfe <= 4 and exported.manifest.noise_draws == 1)
    assert all(value < 1e-5 for value in exported.manifest.parity.values())


@pytest.mark.parametrize("backend", ["openvino", "torchscript"])
@pytest.mark.parametrize("case", ["one step", "cosine, ddim", "edm, heun", "flow, euler"])
def test_other_runtimes_agree_too(case: str, backend: Any, tmp_path: Path) -> None:
    made = policy(**CASES[case])
    assert_same(export(made, tmp_path / "export", backend), made, observations(2), range(2))


@pytest.mark.parametrize(
    ("settings", "backend"),
    [
        ({"weights": [0.3, 0.7]}, "onnx"),
        ({"weights": [0.3, 0.7], "path": {"type": "flow"}, "sampler": {"type": "euler", "num_steps": 2}}, "onnx"),
        ({"rule": "product", "path": {"type": "flow"}, "sampler": {"type": "ddim", "num_steps": 6}}, "openvino"),
    ],
    ids=["diffusion leads", "flow leads", "product"],
)
def test_compositions_of_diffusion_and_flow_are_exported_whole(settings: Any, backend: Any, tmp_path: Path) -> None:
    made = compose([A, B], **settings)
    assert_same(export(made, tmp_path / "export", backend), made, composed_observations(3), range(3))


def test_compositions_with_a_walk_of_their_own_are_refused(tmp_path: Path) -> None:
    made = compose([A, B], rule="and", sampler={"type": SUPERPOSE, "mode": "and", "num_steps": 5})
    with pytest.raises(ConfigError, match=r"a composition by rule and/or .* distill --method reflow"):
        export(made, tmp_path / "export", "onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("backend", ["onnx", "openvino", "torchscript"])
def test_poses_relative_to_the_newest_observation_are_inside_the_graph(backend: Any, tmp_path: Path) -> None:
    made = pose_policy()
    exported = export(made, tmp_path / "export", backend)
    assert_same(exported, made, pose_observations(3), range(3))
    assert list(exported.manifest.graphs["decode"].inputs) == ["chunk", "obs.ee_pos", "obs.ee_quat"]


@pytest.mark.parametrize("case", ["flow, euler", "cosine, ddim", "edm, heun"])
def test_one_step_agrees_on_random_and_edge_inputs(case: str, tmp_path: Path) -> None:
    made = policy(**CASES[case])
    exported = export(made, tmp_path / "export", "onnx")
    rng = np.random.default_rng(5)
    shape = (1, made.horizon, made.action_transform.dim)
    states = [rng.standard_normal(shape, dtype=np.float32) for _ in range(26)]
    states += [np.full(shape, value, np.float32) for value in (0.0, 1.0, -1.0, 1e-6, 100.0, -100.0)]
    for index, x in enumerate(states):
        t = (1.0, 0.0, 1e-3, 0.999, float(rng.uniform()))[index % 5]
        ctx = (np.zeros if index % 7 == 0 else rng.standard_normal)((1, made.ctx_dim)).astype(np.float32)
        with torch.no_grad():
            seen = made.field(torch.from_numpy(x), torch.tensor([t]), torch.from_numpy(ctx))
        for found, expected in zip(exported.field(x, t, ctx), seen, strict=True):
            np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-5 * max(1.0, float(expected.abs().max())))


def test_observations_at_their_limits_and_constant(tmp_path: Path) -> None:
    made = policy(**CASES["one step"])
    exported = export(made, tmp_path / "export", "onnx")
    obs = observations(2)
    for value in (0.0, -1e4, 1e4):
        for camera in (0, 255):
            edge = {name: np.full_like(v, camera if name == "camera" else value) for name, v in obs.items()}
            assert_same(exported, made, edge, range(2))


def test_more_rows_than_the_batch_run_block_by_block(tmp_path: Path) -> None:
    made = policy(**CASES["cosine, ddpm, fresh noise"])
    exported = export(made, tmp_path / "export", "onnx", batch=3)
    for rows in (1, 3, 7):
        assert_same(exported, made, observations(rows), range(rows))


def test_one_generator_for_all_rows_and_numpys_own(tmp_path: Path) -> None:
    made = policy(**CASES["consistency"])
    exported = export(made, tmp_path / "export", "onnx")
    obs = observations(3)
    expected = made.act(obs, torch.Generator().manual_seed(7))
    np.testing.assert_allclose(exported.act(obs, torch.Generator().manual_seed(7)), expected, atol=1e-3)
    again = [exported.act(obs, np.random.default_rng(1)) for _ in range(2)]
    np.testing.assert_array_equal(*again)


def test_the_planner_gives_every_row_from_now_on(tmp_path: Path) -> None:
    made = policy(**CASES["one step"])
    planner = ExportedPlanner(export(made, tmp_path / "export", "onnx"))
    obs = observations(2)
    plan = planner.plan(obs, None, 0, torch.Generator().manual_seed(0))
    assert plan.shape == (2, planner.rows, 2) == (2, made.horizon - made.n_obs_steps + 1, 2)
    np.testing.assert_allclose(plan[:, :4], made.act(obs, torch.Generator().manual_seed(0)), atol=1e-3)


def test_bad_observations_are_refused_as_the_checkpoint_refuses_them(tmp_path: Path) -> None:
    exported = export(policy(**CASES["one step"]), tmp_path / "export", "onnx")
    obs, noise = observations(1), np.random.default_rng(0)
    with pytest.raises(DataError, match="'speed' is missing"):
        exported.act({name: value for name, value in obs.items() if name != "speed"}, noise)
    with pytest.raises(DataError, match="has shape"):
        exported.act({**obs, "speed": obs["speed"][:, :1]}, noise)
    with pytest.raises(DataError, match="'speed' is of a batch of 2"):
        exported.act({**obs, "speed": np.repeat(obs["speed"], 2, axis=0)}, noise)
    obs["speed"][0, 0, 0] = np.nan
    with pytest.raises(DataError, match="NaN"):
        exported.act(obs, noise)


def test_actions_that_are_no_numbers_are_refused_as_the_checkpoint_refuses_them(tmp_path: Path) -> None:
    made, obs = policy(**CASES["edm, x0"]), observations(2)
    exported = export(made, tmp_path / "export", "onnx")
    obs["speed"][1, 0, 0] = 3e38
    for actor in (made, exported):
        with pytest.raises(DataError, match=r"answers row 1 .* 3e\+38 in 'speed'"):
            actor.act(obs, torch.Generator().manual_seed(0))


def test_the_manifest_says_what_a_robot_must_know(tmp_path: Path) -> None:
    made = pose_policy()
    folder = made.save(tmp_path / "policy", {"task": {"name": "lift", "args": {"a": 1}}})
    manifest = export(made, tmp_path / "export", "onnx", checkpoint=folder).manifest
    assert (manifest.n_obs_steps, manifest.horizon, manifest.n_action_steps, manifest.rows) == (2, 8, 4, 7)
    assert manifest.dt == pytest.approx(0.05)
    assert manifest.observation_features == made.observation_features
    assert manifest.action_feature == made.action_feature
    assert manifest.path["type"] == "flow"
    assert manifest.sampler == made.config.sampler
    assert [(step.t, step.to) for step in manifest.steps] == [(1.0, 0.5), (0.5, 0.0)]
    assert "t = 1 is noise" in manifest.noise_convention
    assert manifest.checkpoint["provenance"]["task"]["name"] == "lift"
    assert len(manifest.checkpoint["sha256"]) == 64
    assert manifest.provenance["versions"]["torch"]
    assert manifest.provenance["runtime"]["onnxruntime"]
    assert manifest.opset == 18
    written = {file.name for file in (tmp_path / "export").iterdir()} - {"manifest.json"}
    assert set(manifest.files) == written  # weights beside a graph included


def damage(folder: Path, how: str) -> None:
    graph, manifest = folder / "chunk.onnx", folder / "manifest.json"
    document = json.loads(manifest.read_text())
    if how == "cut off":
        graph.write_bytes(graph.read_bytes()[:-10])
    elif how == "absent":
        graph.unlink()
    elif how == "one bit":
        data = bytearray(graph.read_bytes())
        data[len(data) // 2] ^= 1
        graph.write_bytes(bytes(data))
    elif how == "newer":
        manifest.write_text(json.dumps({**document, "format": 99}))
    elif how == "another unit":
        document["action"]["unit"] = "deg"
        manifest.write_text(json.dumps(document))
    elif how == "before poses":
        manifest.write_text(json.dumps({**{k: v for k, v in document.items() if k != "poses"}, "format": 1}))
    elif how == "half a manifest":
        manifest.write_text(manifest.read_text()[:200])
    elif how == "no mapping":
        manifest.write_text("[]")
    else:
        manifest.unlink()


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(policy(**CASES["one step"]), tmp_path_factory.mktemp("good") / "export", "onnx").folder


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("cut off", "chunk.onnx differs from its digest"),
        ("one bit", "chunk.onnx differs from its digest"),
        ("absent", "has no chunk.onnx"),
        ("newer", "has format 99"),
        ("before poses", "has format 1; this version reads 2. Update robopolicy, or export the checkpoint again"),
        ("another unit", "it was altered"),
        ("half a manifest", "is damaged"),
        ("no mapping", "has format 'list'"),
        ("no manifest", "is no export"),
    ],
)
def test_a_damaged_export_is_refused_in_one_line(how: str, expected: str, good: Path, tmp_path: Path) -> None:
    for file in good.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    damage(tmp_path, how)
    with pytest.raises(CheckpointError, match=expected) as error:
        ExportedPolicy(tmp_path)
    assert "\n" not in str(error.value)


def test_a_graph_that_the_runtime_refuses_is_one_line(good: Path, tmp_path: Path) -> None:
    for file in good.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "chunk.onnx").write_bytes(b"no graph")
    manifest = load_manifest(good)
    digests = {**manifest.files, "chunk.onnx": file_digest(tmp_path / "chunk.onnx")}
    manifest.model_copy(update={"files": digests}).save(tmp_path)
    with pytest.raises(CheckpointError, match="onnx cannot load") as error:
        ExportedPolicy(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("backend", "package"), [("onnx", "onnx"), ("onnx", "onnxruntime"), ("openvino", "onnx"), ("openvino", "openvino")]
)
def test_a_missing_package_is_named_before_any_work_and_no_policy_is_blamed(
    backend: Any, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(CheckpointError) as error:
        export(A, tmp_path / "export", backend)
    assert str(error.value) == f"{package} is not installed; in the checkout of robopolicy, run: uv pip install -e '.[export]'"
    assert not list(tmp_path.iterdir())


def test_torch_is_not_needed(good: Path) -> None:
    code = (
        "import sys, numpy as np\n"
        "from robopolicy.deploy.exported import ExportedPolicy\n"
        f"policy = ExportedPolicy({str(good)!r})\n"
        "obs = {n: np.zeros((1, 2, *f.shape), f.dtype) for n, f in policy.observation_features.items()}\n"
        "assert policy.act(obs, np.random.default_rng(0)).shape == (1, 4, 2)\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_an_earlier_export_is_replaced_and_other_files_are_not(tmp_path: Path) -> None:
    export(policy(**CASES["one step"]), tmp_path / "export", "onnx")
    export(policy(**CASES["flow, euler"]), tmp_path / "export", "onnx")
    assert not (tmp_path / "export" / "chunk.onnx").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="holds other files"):
        export(policy(**CASES["one step"]), tmp_path / "mine", "onnx")
    assert (tmp_path / "mine" / "thesis.txt").exists()
    assert not list(tmp_path.glob(".partial*"))


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_a_graph_that_deviates_from_torch_is_no_export(factor: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Normalizer.unnormalize
    made = policy(**CASES["one step"])

    def wrong(self: Normalizer, x: torch.Tensor) -> torch.Tensor:
        return right(self, x) * (factor if torch.jit.is_tracing() else 1.0)

    monkeypatch.setattr(Normalizer, "unnormalize", wrong)
    with pytest.raises(ConfigError, match="deviates from torch"):
        export(made, tmp_path / "export", "onnx")
    assert not list(tmp_path.iterdir())


def dot_policy(folder: Path) -> Path:
    """A policy for the toy task ``Dot`` that nearly always goes towards the middle, though noise moves it."""
    from toys import Dot

    features = {"x": Dot.observation_features["x"]}
    value = {"n_obs_steps": 1, "horizon": 4, "n_action_steps": 2, "net": {"type": "mlp", "width": 16, "depth": 1}}
    config = parse(PolicyConfig, {**value, "sampler": {"type": "euler", "num_steps": 6}, "encoder": {"type": "state"}})
    normalizers = {"x": Normalizer(2, "identity"), "action": Normalizer(2, "identity")}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        made = Policy(config, features, Dot.action_feature, normalizers).eval()
    optimizer, generator = torch.optim.Adam(made.parameters(), 1e-2), torch.Generator().manual_seed(0)
    for _ in range(60):
        x = 2 * torch.rand(64, 1, 2, generator=generator) - 1
        batch = {"obs": {"x": x}, "action": (-3 * x).clamp(-1, 1).expand(-1, 4, -1), "action_is_pad": torch.zeros(64, 4).bool()}
        optimizer.zero_grad()
        made.loss(batch, generator).backward()
        optimizer.step()
    return made.eval().save(folder, {"task": {"name": "toys:Dot", "args": {"max_episode_steps": 3}}})


def test_same_success_on_the_same_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = dot_policy(tmp_path / "policy")
    out = tmp_path / "export"
    assert cli.main(["export", str(checkpoint), "--to", "onnx", "--out", str(out), "--batch", "4"]) == 0
    printed = capsys.readouterr().out
    assert "6 network calls per chunk" in printed
    assert "parity" in printed
    arguments = ["compare", str(checkpoint), str(out), "--episodes", "40", "--num-envs", "20", "--out", str(tmp_path / "cmp")]
    assert cli.main(arguments) == 0
    assert "only A 0, only B 0" in capsys.readouterr().out
    results = [
        evaluate(actor, TaskSpec("toys:Dot", {"max_episode_steps": 3}), range(200, 220), num_envs=4, progress=False)
        for actor in (load_policy(checkpoint), ExportedPolicy(out))
    ]
    assert (results[0].successes == results[1].successes).all()
    assert 0 < results[0].successes.sum() < 20  # neither always nor never: a difference would show
    np.testing.assert_allclose(results[0].max_rewards, results[1].max_rewards, atol=1e-4)


def test_an_export_keeps_the_scale_of_the_noise_that_it_was_made_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for case in ("one step", "cosine, ddim"):  # inside the fused graph, and in front of the walk
        checkpoint = str(policy(**CASES[case]).save(tmp_path / case))
        assert cli.main(["export", checkpoint, "--noise", ".5"]) == 0
        exported = ExportedPolicy(Path(checkpoint) / "export" / "onnx_noise0.5")
        assert exported.manifest.initial_noise == 0.5
        assert_same(exported, load_policy(checkpoint).varied(initial_noise=0.5), observations(3), range(3))
    capsys.readouterr()
    assert cli.main(["eval", str(exported.folder), "--noise", "1", "--task", "toys:Dot"]) == 2
    assert "its noise is fixed; export the checkpoint again with --noise 1" in capsys.readouterr().err


def test_the_verbs_say_what_is_wrong(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, expected in (
        (["export", "no/such/run"], "does not exist"),
        (["eval", str(good), "--steps", "3", "--task", "toys:Dot"], "its steps are fixed"),
        (["eval", str(good)], "does not say which task"),
        (["eval", str(good), "--task", "toys:Dot"], "needs observation"),
    ):
        assert cli.main(arguments) == 2
        error = capsys.readouterr().err
        assert expected in error.splitlines()[-1]  # before it, a bar
