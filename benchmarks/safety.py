"""A million mad ticks through the safety filter: does any output break a limit?

The inputs and the judge are those of tests/torture.py: commands, states, stamps and clocks with everything wrong that we could
think of, people who start and stop at any time, and finite differences of the outputs at the control rate. Prints the worst of
each, as a share of the limit (position and box: distance beyond it). Exit code 1 when anything is broken.

    python benchmarks/safety.py
    python benchmarks/safety.py --ticks 1000000 --seed 0 --json outputs/safety.json
"""

# ruff: noqa: E402  (the path is mended before the imports)

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

# Run as a script, its folder would come first on the path; what is measured is the installed package.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]
sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

from torture import SETUPS, torture  # type: ignore[import-not-found]  # of tests/

from robopolicy.deploy.safety import Mode


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--ticks", type=int, default=1_000_000, help="per setup")
    parser.add_argument("--setups", nargs="+", default=list(SETUPS), choices=list(SETUPS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    found: dict[str, object] = {"ticks": args.ticks, "seed": args.seed}
    failed = False
    for name in args.setups:
        limits, kinematics, where = SETUPS[name]()
        begin = time.process_time()
        safety, judge, modes = torture(limits, kinematics, where, args.ticks, args.seed)
        seconds = time.process_time() - begin
        failed |= bool(judge.broken)
        found[name] = {
            "worst": judge.worst,
            "broken": judge.broken,
            "modes": modes,
            "events": safety.events,
            "ticks": safety.counters,
        }
        print(f"{name}: {args.ticks} ticks, {1e6 * seconds / args.ticks:.0f} us of CPU each (with the adversary and the judge)")
        print("  worst  " + "  ".join(f"{key} {value:.9g}" for key, value in judge.worst.items()))
        print("  modes  " + "  ".join(f"{mode} {modes[mode] / args.ticks:.3f}" for mode in Mode))
        print("  ticks  " + "  ".join(f"{key} {value}" for key, value in sorted(safety.counters.items())))
        print("  BROKEN\n    " + "\n    ".join(judge.broken) if judge.broken else "  no limit broken")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(found, indent=2))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
