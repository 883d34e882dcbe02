"""A policy on an arm whose driver runs already; its processes and arguments are in configs/ros2/policy.yaml.

ros2 launch launch/policy.launch.py --show-args
ros2 launch launch/policy.launch.py profile:=ur5e checkpoint:=outputs/mine
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # launch does not

from from_system import describe

from launch import LaunchDescription


def generate_launch_description() -> LaunchDescription:
    return describe("policy")
