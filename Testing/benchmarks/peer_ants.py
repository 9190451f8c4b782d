"""ANTs on one pair, for peers.py, which runs it with an interpreter that has antspyx.

    python peer_ants.py FIXED MOVING MOVING_LABELS KIND FOLDER

Writes labels.nii.gz, the moving labels on the fixed image, warp.nii.gz, the displacements (LPS mm) of ANTs' last stage,
and inverse.nii.gz, their inverse, and prints the seconds of the registration.
"""

import shutil
import sys
import time

import ants

fixed_path, moving_path, labels_path, kind, folder = sys.argv[1:]
start = time.perf_counter()
fixed, moving = ants.image_read(fixed_path), ants.image_read(moving_path)
initial = "identity" if kind == "SyNOnly" else None
found = ants.registration(fixed, moving, type_of_transform=kind, initial_transform=initial, random_seed=1)
seconds = time.perf_counter() - start
labels = ants.apply_transforms(fixed, ants.image_read(labels_path), found["fwdtransforms"], "nearestNeighbor")
ants.image_write(labels, f"{folder}/labels.nii.gz")
shutil.copy(found["fwdtransforms"][0], f"{folder}/warp.nii.gz")
shutil.copy(found["invtransforms"][-1], f"{folder}/inverse.nii.gz")
print(seconds)
