"""What Ant, Humanoid and Ingenuity are by definition: expected numbers of the tests."""

import numpy as np

# --- Ant ---

RADIUS = 0.08  # of all capsules of the Ant
HIP = ((0, 0, 1), (-40, 40))
RISING, FALLING = (30, 100), (-100, -30)

# Body, parent, place in the parent; its joint, axis, range (degrees).
ANT = [
    ("front_left_leg", "torso", (0.2, 0.2, 0), "hip_1", *HIP),
    ("front_left_foot", "front_left_leg", (0.2, 0.2, 0), "ankle_1", (-1, 1, 0), RISING),
    ("front_right_leg", "torso", (-0.2, 0.2, 0), "hip_2", *HIP),
    ("front_right_foot", "front_right_leg", (-0.2, 0.2, 0),
     "ankle_2", (1, 1, 0), FALLING),
    ("left_back_leg", "torso", (-0.2, -0.2, 0), "hip_3", *HIP),
    ("left_back_foot", "left_back_leg", (-0.2, -0.2, 0),
     "ankle_3", (-1, 1, 0), FALLING),
    ("right_back_leg", "torso", (0.2, -0.2, 0), "hip_4", *HIP),
    ("right_back_foot", "right_back_leg", (0.2, -0.2, 0), "ankle_4", (1, 1, 0), RISING),
]  # fmt: skip
ANT_FEET = ["front_left_foot", "front_right_foot", "left_back_foot", "right_back_foot"]

# --- Humanoid ---

# Body: parent, place in it, mass (kg), capsules (radius, end, end; spheres have equal
# ends). The left limbs are the right ones, mirrored in y.
HUMANOID = {
    "torso": ("world", (0, 0, 1.4), 5.854 + 3.054, [  # with the head, welded to it
        (0.07, (0, -0.07, 0), (0, 0.07, 0)),
        (0.06, (-0.01, -0.06, -0.12), (-0.01, 0.06, -0.12)),
        (0.09, (0, 0, 0.19), (0, 0, 0.19)),
    ]),
    "lwaist": ("torso", (-0.01, 0, -0.26), 2.262, [
        (0.06, (0, -0.06, 0), (0, 0.06, 0)),
    ]),
    "pelvis": ("lwaist", (0, 0, -0.165), 6.616, [
        (0.09, (-0.02, -0.07, 0), (-0.02, 0.07, 0)),
    ]),
    "right_thigh": ("pelvis", (0, -0.1, -0.04), 4.752, [
        (0.06, (0, 0, 0), (0, 0.01, -0.34)),
    ]),
    "right_shin": ("right_thigh", (0, 0.01, -0.403), 2.756, [
        (0.049, (0, 0, 0), (0, 0, -0.3)),
    ]),
    "right_foot": ("right_shin", (0, 0, -0.39), 1.131, [
        (0.027, (-0.07, -0.02, 0), (0.14, -0.04, 0)),
        (0.027, (-0.07, 0, 0), (0.14, 0.02, 0)),
    ]),
    "right_upper_arm": ("torso", (0, -0.17, 0.06), 1.661, [
        (0.04, (0, 0, 0), (0.16, -0.16, -0.16)),
    ]),
    # hand
    "right_lower_arm": ("right_upper_arm", (0.18, -0.18, -0.18), 0.962 + 0.268, [
        (0.031, (0.01, 0.01, 0.01), (0.17, 0.17, 0.17)),
        (0.04, (0.18, 0.18, 0.18), (0.18, 0.18, 0.18)),
    ]),
}  # fmt: skip


def mirrored(point):
    return (point[0], -point[1], point[2])


for body, (parent, place, mass, ends) in list(HUMANOID.items()):
    if body.startswith("right"):
        ends = [(r, mirrored(a), mirrored(b)) for r, a, b in ends]
        left = [text.replace("right", "left") for text in (body, parent)]
        HUMANOID[left[0]] = (left[1], mirrored(place), mass, ends)

# Range (degrees), spring, damping, armature, gear.
HIP_X = ((-45, 15), 10, 5, 0.01, 45)
HIP_Z = ((-60, 35), 10, 5, 0.01, 45)
HIP_Y = ((-120, 45), 20, 5, 0.01, 135)
KNEE = ((-160, 2), 5, 0.1, 0.007, 90)
ANKLE = ((-50, 50), 2, 1, 0.006, 22.5)
SHOULDER = ((-90, 70), 10, 5, 0.01, 67.5)
ELBOW = ((-90, 50), 2, 1, 0.006, 45)

# Joint: body, anchor, axis, range (degrees), spring, damping, armature, gear.
HUMANOID_JOINTS = {
    "abdomen_z": ("lwaist", (0, 0, 0.065), (0, 0, 1), (-45, 45), 20, 5, 0.02, 67.5),
    "abdomen_y": ("lwaist", (0, 0, 0.065), (0, 1, 0), (-75, 30), 20, 5, 0.01, 67.5),
    "abdomen_x": ("pelvis", (0, 0, 0.1), (1, 0, 0), (-35, 35), 10, 5, 0.01, 67.5),
    "right_hip_x": ("right_thigh", (0, 0, 0), (1, 0, 0), *HIP_X),
    "right_hip_z": ("right_thigh", (0, 0, 0), (0, 0, 1), *HIP_Z),
    "right_hip_y": ("right_thigh", (0, 0, 0), (0, 1, 0), *HIP_Y),
    "right_knee": ("right_shin", (0, 0, 0.02), (0, -1, 0), *KNEE),
    "right_ankle_y": ("right_foot", (0, 0, 0.08), (0, 1, 0), *ANKLE),
    "right_ankle_x": ("right_foot", (0, 0, 0.08), (1, 0, 0.5), *ANKLE),
    "left_hip_x": ("left_thigh", (0, 0, 0), (-1, 0, 0), *HIP_X),
    "left_hip_z": ("left_thigh", (0, 0, 0), (0, 0, -1), *HIP_Z),
    "left_hip_y": ("left_thigh", (0, 0, 0), (0, 1, 0), *HIP_Y),
    "left_knee": ("left_shin", (0, 0, 0.02), (0, -1, 0), *KNEE),
    "left_ankle_y": ("left_foot", (0, 0, 0.08), (0, 1, 0), *ANKLE),
    "left_ankle_x": ("left_foot", (0, 0, 0.08), (1, 0, 0.5), *ANKLE),
    "right_shoulder1": ("right_upper_arm", (0, 0, 0), (2, 1, 1), *SHOULDER),
    "right_shoulder2": ("right_upper_arm", (0, 0, 0), (0, -1, 1), *SHOULDER),
    "right_elbow": ("right_lower_arm", (0, 0, 0), (0, -1, 1), *ELBOW),
    "left_shoulder1": ("left_upper_arm", (0, 0, 0), (-2, 1, -1), *SHOULDER),
    "left_shoulder2": ("left_upper_arm", (0, 0, 0), (0, -1, -1), *SHOULDER),
    "left_elbow": ("left_lower_arm", (0, 0, 0), (0, -1, -1), *ELBOW),
}
RHO = {67.5: 0.5, 45: 1 / 3, 135: 1, 90: 2 / 3, 22.5: 1 / 6}  # by gear, Humanoid

# --- By name, or by name and variant ---

GRAVITY = {"Ant": 9.81, "Humanoid": 9.81, "Ingenuity": 3.721}
RANGES = {
    "Ant": np.radians([row[5] for row in ANT]),
    "Humanoid": np.radians([row[3] for row in HUMANOID_JOINTS.values()]),
}
GEARS = {
    ("Ant", "oige"): np.full(8, 7.5),
    ("Ant", "ige"): np.full(8, 15.0),
    ("Humanoid", "oige"): np.array([row[7] for row in HUMANOID_JOINTS.values()]),
    ("Humanoid", "ige"): np.array([row[7] for row in HUMANOID_JOINTS.values()]),
}
FEET = {
    ("Ant", "oige"): ANT_FEET,
    ("Ant", "ige"): ANT_FEET,
    ("Humanoid", "oige"): ["left_foot", "right_foot"],
    ("Humanoid", "ige"): ["right_foot", "left_foot"],
}
# First index of: joint positions, velocities, joint forces, foot sensors, action; the
# end.
LAYOUT = {
    ("Ant", "oige"): (12, 20, 28, 28, 52, 60),
    ("Ant", "ige"): (12, 20, 28, 28, 52, 60),
    ("Humanoid", "oige"): (12, 33, 54, 54, 66, 87),
    ("Humanoid", "ige"): (12, 33, 54, 75, 87, 108),
}
SCALES = {  # spin, joint velocities, foot sensors
    "Ant": (1.0, 0.2, 0.1),
    "Humanoid": (0.25, 0.1, 0.01),
}
FALLEN = {"Ant": (0.31, -2.0), "Humanoid": (0.8, -1.0)}  # height, reward
START_HEIGHT = {("Ant", "oige"): 0.5, ("Ant", "ige"): 0.44}  # Humanoid: 1.34
