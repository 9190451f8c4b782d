"""ANTs on one pair, for peers.py, which runs it with an interpreter that has antspyx.

    python peer_ants.py FIXED MOVING KIND FOLDER

Writes warp.nii.gz, the displacements (LPS mm) of all of ANTs' stages on the fixed image, and inverse.nii.gz, those of
their inverse on the moving image, and prints the seconds of the registration.
"""

import shutil
import sys
import time

import ants

fixed_path, moving_path, kind, folder = sys.argv[1:]
start = time.perf_counter()
fixed, moving = ants.image_read(fixed_path), ants.image_read(moving_path)
initial = "identity" if kind == "SyNOnly" else None
found = ants.registration(fixed, moving, type_of_transform=kind, initial_transform=initial, random_seed=1)
seconds = time.perf_counter() - start
for name, images, transforms in (
    ("warp", (fixed, moving), "fwdtransforms"),
    ("inverse", (moving, fixed), "invtransforms"),
):
    inverted = [transforms == "invtransforms" and path.endswith(".mat") for path in found[transforms]]
    written = ants.apply_transforms(*images, found[transforms], whichtoinvert=inverted, compose=f"{folder}/{name}")
    shutil.move(written, f"{folder}/{name}.nii.gz")
print(seconds)
