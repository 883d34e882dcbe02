"""Does reinforcement give more than imitating one's own successes? And do its roll-outs make good demonstrations?

From a base and its fine-tuned successor, with the commands a user would type:

    filtered      the base's recipe, trained on N successful roll-outs of the base itself (filtered behaviour cloning)
    student       the same recipe, trained on N successful roll-outs of the fine-tuned policy (Beyond Human Demonstrations)
    few students  the same, on as many roll-outs as the base had demonstrations

All are tested on the same 400 episodes, beside the base and the fine-tuned policy. Only the data differ, not the recipe.

    python -m benchmarks.students outputs/reach_base outputs/reach_dppo --episodes 1000 --out outputs/students
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

from robopolicy.config import load_yaml
from robopolicy.data.episodes import Episodes
from robopolicy.evaluate.record import Evaluation, load_evaluation
from robopolicy.evaluate.stats import mcnemar


def robopolicy(*arguments: str | Path) -> None:
    """Run one command; its output goes to stderr."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    line = [sys.executable, "-m", "robopolicy.cli", *map(str, arguments)]
    subprocess.run(line, check=True, stdout=sys.stderr, env=environment)


def tested(policy: Path, out: Path, episodes: int) -> Evaluation:
    if not (out / "eval.json").exists():
        robopolicy("eval", policy, "--episodes", str(episodes), "--out", out)
    return load_evaluation(out / "eval.json")


def trained(config: dict[str, object], data: Path, name: str, out: Path) -> Path:
    """The base's recipe on other data."""
    if not (out / "checkpoints").exists():
        section = {**config["data"], "path": str(data), "max_episodes": None}  # type: ignore[dict-item]
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "config.yaml"
            source.write_text(yaml.safe_dump({**config, "name": name, "data": section}))
            robopolicy("train", source, "--out", out)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, help="run folder of `robopolicy train`")
    parser.add_argument("tuned", type=Path, help="run folder of `robopolicy finetune` on it")
    parser.add_argument("--episodes", type=int, default=1000, help="successful roll-outs of each (default 1000)")
    parser.add_argument("--test-episodes", type=int, default=400)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    config = load_yaml(args.base / "config.yaml")
    original = Episodes.open(config["data"]["path"])
    few = min(config["data"]["max_episodes"] or len(original), len(original))
    rows = {"base": tested(args.base, args.out / "test_base", args.test_episodes)}
    rows["fine-tuned"] = tested(args.tuned, args.out / "test_tuned", args.test_episodes)
    for name, teacher, count in (
        ("filtered", args.base, args.episodes),
        ("student", args.tuned, args.episodes),
        ("few_student", args.tuned, few),
    ):
        data = args.out / f"{name}.zarr"
        if not data.exists():
            robopolicy("data", "rollout", teacher, "--success-only", "--episodes", str(count), "--out", data)
        run = trained(config, data, name, args.out / name)
        rows[f"{name} ({count})"] = tested(run, args.out / f"test_{name}", args.test_episodes)
    print(f"{'policy':24} {'success':28} {'against the base, McNemar':>26}")
    for label, evaluation in rows.items():
        against = "" if label == "base" else f"p = {mcnemar(rows['base'].successes, evaluation.successes).p_value:.2g}"
        print(f"{label:24} {evaluation.success!s:28} {against:>26}")


if __name__ == "__main__":
    main()
