"""The arm, the table and the objects, as MJCF text made of primitives.

Seven revolute joints alternate between roll (about the link, z) and pitch (across it, y): a spherical shoulder, an elbow and a
spherical wrist. A parallel gripper with two coupled fingers follows. Proportions, limits and gains are those of the class of
7-joint collaborative arms that carry 3 kg to 0.85 m; no product is copied.

World frame: x forward from the base, y to its left, z up, origin at the foot of the arm on the table top. SI units, radians.
The ``ee`` frame sits between the pads, 12 mm above the finger tips; z is the approach direction and the fingers move along y.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

# Lengths along the straight arm [m].
SHOULDER_HEIGHT = 0.34
UPPER_ARM = 0.38
FOREARM = 0.36
WRIST_TO_FLANGE = 0.11
FLANGE_TO_EE = 0.13

GRIPPER_MAX_WIDTH = 0.08  # between the pads [m]
GRIPPER_FORCE = 30.0  # on each finger [N]

TIMESTEP = 0.0025  # physics step [s]


@dataclass(frozen=True)
class Joint:
    """One revolute joint and its servo. Angles in rad, ``velocity`` rad/s, ``effort`` Nm, ``kp`` Nm/rad, ``kv`` Nms/rad."""

    name: str
    axis: str
    lower: float
    upper: float
    velocity: float
    effort: float
    kp: float
    kv: float
    armature: float


JOINTS = (
    Joint("joint1", "0 0 1", -2.90, 2.90, 2.2, 90.0, 4000.0, 240.0, 0.30),
    Joint("joint2", "0 1 0", -1.90, 1.90, 2.2, 90.0, 4000.0, 260.0, 0.30),
    Joint("joint3", "0 0 1", -2.90, 2.90, 2.2, 90.0, 3000.0, 140.0, 0.20),
    Joint("joint4", "0 1 0", 0.05, 2.80, 2.2, 90.0, 3000.0, 140.0, 0.20),
    Joint("joint5", "0 0 1", -2.90, 2.90, 2.6, 15.0, 800.0, 30.0, 0.10),
    Joint("joint6", "0 1 0", -0.20, 2.40, 2.6, 15.0, 800.0, 30.0, 0.10),
    Joint("joint7", "0 0 1", -2.90, 2.90, 2.6, 15.0, 500.0, 20.0, 0.10),
)
JOINT_NAMES = tuple(joint.name for joint in JOINTS)
LOWER = np.array([joint.lower for joint in JOINTS])
UPPER = np.array([joint.upper for joint in JOINTS])
VELOCITY_LIMIT = np.array([joint.velocity for joint in JOINTS])
EFFORT_LIMIT = np.array([joint.effort for joint in JOINTS])


def home(x: float = 0.45, z: float = 0.20) -> np.ndarray:
    """Joint angles ``[7]`` that hold the ``ee`` frame at ``(x, 0, z)``, pointing down, elbow up: two-link planar geometry."""
    height = z + WRIST_TO_FLANGE + FLANGE_TO_EE - SHOULDER_HEIGHT
    reach = math.hypot(x, height)
    elbow = math.acos((UPPER_ARM**2 + FOREARM**2 - reach**2) / (2 * UPPER_ARM * FOREARM))
    lift = math.acos((UPPER_ARM**2 + reach**2 - FOREARM**2) / (2 * UPPER_ARM * reach))
    shoulder = math.atan2(x, height) - lift
    bend = math.pi - elbow
    return np.array([0.0, shoulder, 0.0, bend, 0.0, math.pi - shoulder - bend, 0.0])


# Collision: an arm shape meets the world and the objects, never the arm; objects meet everything.
_ARM = 'contype="1" conaffinity="0"'
_OBJECT = 'contype="2" conaffinity="3"'
_GHOST = 'contype="0" conaffinity="0"'


def _joint(index: int) -> str:
    j = JOINTS[index]
    return (
        f'<joint name="{j.name}" axis="{j.axis}" range="{j.lower} {j.upper}" armature="{j.armature}" damping="1" '
        f'actuatorfrcrange="{-j.effort} {j.effort}" actuatorgravcomp="true"/>'
    )


def _finger(side: str, sign: int) -> str:
    """One finger; its slide is 0 when closed and half the width when open."""
    return f"""
    <body name="{side}_finger" pos="0 0 0.06" gravcomp="1">
      <joint name="{side}_finger" type="slide" axis="0 {sign} 0" range="0 {GRIPPER_MAX_WIDTH / 2}" armature="0.2" damping="5"/>
      <geom type="box" size="0.011 0.006 0.026" pos="0 {sign * 0.012} 0.024" material="dark" mass="0.06" {_GHOST}/>
      <geom name="{side}_pad" type="box" size="0.010 0.005 0.018" pos="0 {sign * 0.005} 0.064" mass="0.03" material="rubber"
            friction="1.5 0.02 0.0001" condim="4" priority="1"
            solref="0.008 1" solimp="0.98 0.995 0.001" {_ARM}/>
    </body>"""


def _arm(tool: str) -> str:
    """The kinematic chain, with MJCF of a tool in the hand.

    Collision shapes are few: forearm, wrist, hand and pads; the rest cannot reach the table.
    """
    flange = SHOULDER_HEIGHT - 0.16
    return f"""
    <body name="base">
      <geom type="cylinder" size="0.095 0.02" pos="0 0 0.02" material="dark" mass="0" {_GHOST}/>
      <geom type="cylinder" size="0.075 0.07" pos="0 0 0.10" material="shell" mass="0" {_GHOST}/>
      <body name="link1" pos="0 0 {flange}" gravcomp="1">
        {_joint(0)}
        <geom type="cylinder" size="0.072 0.035" pos="0 0 0.03" material="shell" mass="1.6" {_GHOST}/>
        <geom type="capsule" size="0.062" fromto="0 0 0.07 0 0 0.16" material="shell" mass="1.8" {_GHOST}/>
        <body name="link2" pos="0 0 0.16" gravcomp="1">
          {_joint(1)}
          <geom type="cylinder" size="0.064 0.082" zaxis="0 1 0" material="accent" mass="1.2" {_GHOST}/>
          <geom type="capsule" size="0.054" fromto="0 0 0.05 0 0 0.19" material="shell" mass="1.8" {_GHOST}/>
          <body name="link3" pos="0 0 0.20" gravcomp="1">
            {_joint(2)}
            <geom type="cylinder" size="0.056 0.012" material="dark" mass="0.6" {_GHOST}/>
            <geom type="capsule" size="0.052" fromto="0 0 0.03 0 0 {UPPER_ARM - 0.20}" material="shell" mass="1.8"
                  {_GHOST}/>
            <body name="link4" pos="0 0 {UPPER_ARM - 0.20}" gravcomp="1">
              {_joint(3)}
              <geom type="cylinder" size="0.055 0.070" zaxis="0 1 0" material="accent" mass="1.0" {_GHOST}/>
              <geom type="capsule" size="0.046" fromto="0 0 0.04 0 0 0.18" material="shell" mass="1.4" {_GHOST}/>
              <body name="link5" pos="0 0 0.19" gravcomp="1">
                {_joint(4)}
                <geom type="cylinder" size="0.047 0.010" material="dark" mass="0.4" {_GHOST}/>
                <geom name="forearm" type="capsule" size="0.042" fromto="0 0 0.02 0 0 {FOREARM - 0.19}" material="shell"
                      mass="1.1" {_ARM}/>
                <body name="link6" pos="0 0 {FOREARM - 0.19}" gravcomp="1">
                  {_joint(5)}
                  <geom name="wrist" type="cylinder" size="0.044 0.056" zaxis="0 1 0" material="accent" mass="0.8" {_ARM}/>
                  <geom type="cylinder" size="0.038 0.035" pos="0 0 0.055" material="shell" mass="0.5" {_GHOST}/>
                  <body name="link7" pos="0 0 {WRIST_TO_FLANGE - 0.02}" gravcomp="1">
                    {_joint(6)}
                    <geom type="cylinder" size="0.036 0.010" pos="0 0 0.010" material="dark" mass="0.3" {_GHOST}/>
                    <body name="hand" pos="0 0 0.02" quat="0 0 0 1" gravcomp="1">
                      <geom name="hand" type="box" size="0.030 0.068 0.028" pos="0 0 0.030" material="shell" mass="0.6" {_ARM}/>
                      <geom type="box" size="0.024 0.062 0.004" pos="0 0 0.060" material="dark" mass="0" {_GHOST}/>
                      <site name="ee" pos="0 0 {FLANGE_TO_EE}" group="3" size="0.004"/>
                      <camera name="wrist" pos="0.075 0 0.02" xyaxes="0 1 0 1 0 0" fovy="75"/>
                      {tool}
                      {_finger("left", 1)}
                      {_finger("right", -1)}
                    </body>
                  </body>
                </body>
              </body>
            </body>
          </body>
        </body>
      </body>
    </body>"""


def _actuators() -> str:
    """Servos. A command is a velocity of the set point, integrated inside MuJoCo: a 20 Hz target becomes a straight line in time.

    Set-point speed and range are the joint's limits, so no command can exceed them; torque saturates at the joint's effort.
    """
    servos = "".join(
        f'<intvelocity name="{j.name}" joint="{j.name}" kp="{j.kp}" kv="{j.kv}" actrange="{j.lower} {j.upper}" '
        f'ctrlrange="{-j.velocity} {j.velocity}" forcerange="{-j.effort} {j.effort}"/>'
        for j in JOINTS
    )
    return f"""{servos}
    <position name="gripper" tendon="width" kp="1500" kv="150" ctrlrange="0 {GRIPPER_MAX_WIDTH}"
              forcerange="{-GRIPPER_FORCE} {GRIPPER_FORCE}"/>"""


def cube(name: str, half: float, material: str, mass: float = 0.08) -> str:
    """A free cube of edge ``2 * half`` [m]; its joint has the cube's name."""
    return f"""
    <body name="{name}"><freejoint name="{name}"/>
      <geom name="{name}" type="box" size="{half} {half} {half}" mass="{mass}" material="{material}" friction="1 0.01 0.0001"
            {_OBJECT}/>
    </body>"""


def _look(eye: tuple[float, float, float], at: tuple[float, float, float]) -> str:
    """MJCF attributes of an upright camera at ``eye`` [m] that looks at a point."""
    back = np.subtract(eye, at)
    right = np.cross([0.0, 0.0, 1.0], back)
    up = np.cross(back, right)
    axes = " ".join(f"{value:.5f}" for value in (*right, *up))
    return f'pos="{eye[0]} {eye[1]} {eye[2]}" xyaxes="{axes}"'


def scene(objects: str = "", tool: str = "") -> str:
    """MJCF of the arm on its table.

    Args:
        objects: Bodies to add to the world.
        tool: Geoms to add to the hand, in its frame: z is the approach direction, ``ee`` at ``FLANGE_TO_EE``.
    """
    return f"""
<mujoco model="arm">
  <compiler angle="radian" autolimits="true"/>
  <option timestep="{TIMESTEP}" integrator="implicitfast" cone="pyramidal" impratio="10" iterations="50" ls_iterations="50"
          tolerance="1e-7"/>
  <size memory="1M"/>
  <visual>
    <quality shadowsize="0" offsamples="0"/>
    <headlight ambient="0.42 0.42 0.44" diffuse="0.25 0.25 0.25" specular="0.1 0.1 0.1"/>
    <map znear="0.02" zfar="20" shadowclip="1"/>
    <rgba haze="0.93 0.95 0.97 1"/>
  </visual>
  <asset>
    <texture name="sky" type="skybox" builtin="gradient" rgb1="0.96 0.97 0.98" rgb2="0.70 0.77 0.84" width="64" height="384"/>
    <material name="wood" rgba="0.86 0.78 0.67 1" specular="0.1" shininess="0.1"/>
    <material name="floor" rgba="0.80 0.83 0.86 1" specular="0" shininess="0"/>
    <material name="shell" rgba="0.94 0.95 0.96 1" specular="0.5" shininess="0.6"/>
    <material name="accent" rgba="0.12 0.42 0.62 1" specular="0.4" shininess="0.5"/>
    <material name="dark" rgba="0.16 0.18 0.21 1" specular="0.3" shininess="0.4"/>
    <material name="rubber" rgba="0.28 0.30 0.33 1" specular="0" shininess="0"/>
    <material name="red" rgba="0.86 0.20 0.18 1" specular="0.3" shininess="0.3"/>
    <material name="green" rgba="0.20 0.62 0.36 1" specular="0.3" shininess="0.3"/>
    <material name="goal" rgba="0.30 0.72 0.45 0.45" specular="0" shininess="0"/>
  </asset>
  <worldbody>
    <light name="key" pos="0.2 0.9 1.9" dir="0.12 -0.45 -1" diffuse="0.55 0.54 0.52" specular="0.2 0.2 0.2" directional="true"/>
    <camera name="film" {_look((1.30, 0.80, 0.78), (0.33, 0.0, 0.22))} fovy="41"/>
    <camera name="front" {_look((1.05, 0.0, 0.68), (0.47, 0.0, 0.04))} fovy="46"/>
    <geom name="table" type="plane" size="0.60 0.60 0.02" pos="0.40 0 0" material="wood" friction="1 0.01 0.0001" {_OBJECT}/>
    <geom type="box" size="0.60 0.60 0.02" pos="0.40 0 -0.0205" material="wood" mass="0" {_GHOST}/>
    <geom type="plane" size="4 4 0.1" pos="0 0 -0.75" material="floor" {_GHOST}/>
    {_arm(tool)}
    {objects}
  </worldbody>
  <tendon>
    <fixed name="width"><joint joint="left_finger" coef="1"/><joint joint="right_finger" coef="1"/></fixed>
  </tendon>
  <equality><joint joint1="left_finger" joint2="right_finger" solref="0.01 1"/></equality>
  <contact><exclude body1="left_finger" body2="right_finger"/></contact>
  <actuator>{_actuators()}
  </actuator>
</mujoco>"""
