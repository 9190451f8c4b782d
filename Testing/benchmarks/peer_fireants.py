"""FireANTs' greedy registration of one pair, for peers.py, which runs it with an interpreter that has fireants.

    python peer_fireants.py FIXED MOVING KIND FOLDER

Cross-correlation in windows of five voxels at 4, 2 and 1 voxels, and its defaults otherwise. Writes warp.nii.gz, the
displacements (LPS mm) on the fixed image, and prints the seconds of the registration.
"""

import sys
import time

from fireants.io.image import BatchedImages, Image
from fireants.registration.greedy import GreedyRegistration

fixed_path, moving_path, _, folder = sys.argv[1:]
start = time.perf_counter()
fixed, moving = (BatchedImages([Image.load_file(path, device="cpu")]) for path in (fixed_path, moving_path))
greedy = GreedyRegistration([4, 2, 1], [200, 100, 50], fixed, moving, loss_type="cc", cc_kernel_size=5)
greedy.optimize()
seconds = time.perf_counter() - start
greedy.save_as_ants_transforms([f"{folder}/warp.nii.gz"])
print(seconds)
