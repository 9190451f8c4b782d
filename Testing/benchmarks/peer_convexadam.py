"""ConvexAdam on one pair, for peers.py, which runs it with an interpreter that has convexadam.

    python peer_convexadam.py FIXED MOVING KIND FOLDER

Its default parameters, with MIND. Writes warp.nii.gz, the displacements (LPS mm) on the fixed image, and prints the
seconds of the registration.
"""

import sys
import time

import numpy as np
import SimpleITK as sitk
from convexAdam.convex_adam_MIND import convex_adam_pt

fixed_path, moving_path, _, folder = sys.argv[1:]
start = time.perf_counter()
fixed = sitk.ReadImage(fixed_path, sitk.sitkFloat32)
moving = sitk.Resample(sitk.ReadImage(moving_path, sitk.sitkFloat32), fixed)
voxels = convex_adam_pt(fixed, moving)
seconds = time.perf_counter() - start
# Along (k, j, i) in voxels; ITK has mm along the axes of the world.
to_world = np.reshape(fixed.GetDirection(), (3, 3)) * fixed.GetSpacing()
field = sitk.GetImageFromArray(voxels[..., ::-1].astype(np.float64) @ to_world.T, isVector=True)
field.CopyInformation(fixed)
sitk.WriteImage(field, f"{folder}/warp.nii.gz")
print(seconds)
