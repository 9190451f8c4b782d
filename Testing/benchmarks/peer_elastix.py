"""Elastix' B-spline registration of one pair, for peers.py, which runs it with an interpreter that has itk-elastix.

    python peer_elastix.py FIXED MOVING KIND FOLDER

Its default parameters for "bspline", without the linear stages, as the images lie already. Writes warp.nii.gz, the
displacements (LPS mm) on the fixed image, and prints the seconds of the registration.
"""

import sys
import time

import itk

fixed_path, moving_path, _, folder = sys.argv[1:]
start = time.perf_counter()
fixed, moving = (itk.imread(path, itk.F) for path in (fixed_path, moving_path))
parameters = itk.ParameterObject.New()
parameters.AddParameterMap(itk.ParameterObject.GetDefaultParameterMap("bspline"))
_, found = itk.elastix_registration_method(fixed, moving, parameter_object=parameters, log_to_console=False)
seconds = time.perf_counter() - start
itk.imwrite(itk.transformix_deformation_field(moving, found), f"{folder}/warp.nii.gz")
print(seconds)
