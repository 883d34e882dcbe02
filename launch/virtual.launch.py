"""A simulated arm and a policy that moves it; its processes and arguments are in configs/ros2/virtual.yaml.

ros2 launch launch/virtual.launch.py --show-args
ros2 launch launch/virtual.launch.py checkpoint:=outputs/quickstart record:=data/mine.zarr
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # launch does not

from from_system import describe

from launch import LaunchDescription


def generate_launch_description() -> LaunchDescription:
    return describe("virtual")
