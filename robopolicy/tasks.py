"""``robopolicy tasks``: what can be trained and evaluated on."""

from __future__ import annotations

import argparse

EPILOG = """\
examples:
  robopolicy tasks
  robopolicy tasks lift          # its features, units, rate and arguments"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("task", nargs="?", help="show this task's features, units, rate and arguments")


def run(args: argparse.Namespace) -> int:
    from robopolicy.task import find_task, task_names

    if args.task is None:
        for name in task_names():
            print(name)
        return 0
    import inspect

    from robopolicy.task import TaskSpec

    task = TaskSpec(args.task).make()
    print(f"{args.task}: {inspect.cleandoc(find_task(args.task).__doc__ or '').splitlines()[0]}")
    print(f"  {task.rate:g} Hz, at most {task.max_episode_steps} steps")
    for feature in [*task.observation_features.values(), task.action_feature]:
        role = "action" if feature is task.action_feature else "observation"
        names = f" ({', '.join(feature.names)})" if feature.names else ""
        print(f"  {role:<12}{feature.name:<18}{feature.dtype} {feature.shape} [{feature.unit}]{names}")
    for name, parameter in inspect.signature(type(task)).parameters.items():
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        print(f"  argument    {name}{default}")
    task.close()
    return 0
