"""Record episodes of an arm to zarr; its processes and arguments are in configs/ros2/record.yaml.

ros2 launch launch/record.launch.py --show-args
ros2 launch launch/record.launch.py profile:=ur5e out:=data/mine.zarr
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # launch does not

from from_system import describe

from launch import LaunchDescription


def generate_launch_description() -> LaunchDescription:
    return describe("record")
