"""Register two images and use the result: python register_pair.py FIXED MOVING FOLDER [STEPS]

STEPS are those of the refinement at each resolution."""

import sys

import numpy as np
import SimpleITK as sitk

import GradProjIOLib as gp


def main(fixed_path: str, moving_path: str, folder: str, steps: str = "60") -> None:
    # Images may be paths, or what a notebook has in memory: here one is a SimpleITK image.
    moving = sitk.ReadImage(moving_path)
    settings = gp.Settings(model="compact", align="centers", seed=1)
    result = gp.register(fixed_path, moving, settings, refine_steps=int(steps), progress=True)
    print(result)

    # The report has every figure that the command writes into report.json.
    folding = result.report["jacobian"]
    print(f"{folding['folded_voxels']} voxels fold; the smallest determinant is {folding['min']:.2f}")
    for warning in result.report["warnings"]:
        print("note:", warning)

    # A point of the fixed image, in RAS mm, and where it lies in the moving image.
    center = result.fixed.affine @ [*(np.array(result.fixed.shape[::-1]) / 2), 1]
    print("center:", center[:3].round(1), "→", result.forward.map_points(center[:3]).round(1))

    # Another image of the moving subject follows the same deformation; masks and labels with "nearest".
    bright = result.moving.array > result.moving.array.mean()
    mask = gp.Volume(bright.astype(np.uint8), result.moving.affine, "bright")
    warped_mask = result.forward.warp(mask, result.fixed, "nearest")

    result.write(folder)
    gp.write_volume(warped_mask, f"{folder}/bright.nii.gz")
    result.plot().savefig(f"{folder}/again.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
