"""For colcon: installs launch files, their YAML, and commands for `ros2 run`. docs/virtual_arm.md, "With a ROS installation"."""

import os
from glob import glob

from setuptools import setup

PACKAGE = "robopolicy_ros"
# Paths relative to this folder, where colcon runs it; the layout below share/ is that of the checkout.
DATA = {
    "launch": [*sorted(glob("*.launch.py")), "from_system.py"],
    "configs/ros2": sorted(glob("../configs/ros2/*.yaml")),
    "hardware/ros2": ["../hardware/ros2/system.py"],
}
NODES = {"policy_node": "policy_node", "virtual_arm": "virtual_arm", "recorder": "recorder"}

setup(
    name=PACKAGE,
    version="0.1.0",
    packages=[],
    py_modules=[],
    data_files=[
        ("share/ament_index/resource_index/packages", [f"resource/{PACKAGE}"]),
        (f"share/{PACKAGE}", ["package.xml"]),
        *((os.path.join("share", PACKAGE, folder), files) for folder, files in DATA.items()),
    ],
    zip_safe=True,
    entry_points={"console_scripts": [f"{name} = hardware.ros2.{module}:main" for name, module in NODES.items()]},
)
