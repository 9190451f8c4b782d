"""How good a registration is: overlap of labels, distance of landmarks, and folding.

Nothing here reads files. Deformations map fixed points to moving points in RAS mm,
arrays of labels are [k, j, i], and every distance is in mm. What is measured comes as columns of a row of `tables`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import ndimage

from GradProjIOLib.errors import InputError
from GradProjIOLib.evaluation.statistics import summarize
from GradProjIOLib.geometry.landmarks import Landmarks, match_landmarks
from GradProjIOLib.geometry.volume import Volume
from GradProjIOLib.spatial import jacobian
from GradProjIOLib.spatial.deformation import Deformation

IDENTITY = Deformation(np.zeros((2, 2, 2, 3)), np.eye(4))
Columns = dict[str, Any]


def evaluate_labels(
    deformation: Deformation, fixed: Volume, moving: Volume, structures: Sequence[int] | None = None
) -> Columns:
    """Overlap of the `fixed` labels and the `moving` ones, drawn onto their lattice by nearest neighbor.

    The columns are those of `label_columns`. Raises InputError where there is no structure. See `label_overlap`.
    """
    warped = deformation.warp(moving, fixed, "nearest").array
    overlaps = label_overlap(fixed.array, warped, fixed.spacing.tolist(), structures, moving.array)
    undeformed = IDENTITY.warp(moving, fixed, "nearest").array
    measured = [overlap["structure"] for overlap in overlaps if not np.isnan(overlap["dice"])]
    return label_columns(overlaps, summarize(dice_of(fixed.array, undeformed, measured)).mean)


def label_columns(overlaps: Sequence[Columns], dice_before: float) -> Columns:
    """Mean dice and hd95_mm over the structures that are in both images (NaN where there is none), and all structures.

    `overlaps` come from `label_overlap`; `dice_before` is the mean Dice without the deformation.
    """
    dice, hd95_mm = (summarize([overlap[key] for overlap in overlaps]).mean for key in ("dice", "hd95_mm"))
    return {"dice": dice, "dice_before": dice_before, "hd95_mm": hd95_mm, "structures": list(overlaps)}


def evaluate_landmarks(deformation: Deformation, fixed: Landmarks, moving: Landmarks) -> Columns:
    """Target registration error, without and with the deformation. The columns are those of `landmark_columns`.

    Partners are found by `match_landmarks`. Raises InputError where the landmarks do not match.
    """
    partners = moving.points[match_landmarks(fixed.names, moving.names)]
    before, after = (
        np.linalg.norm(points - partners, axis=1) for points in (fixed.points, deformation.map_points(fixed.points))
    )
    return landmark_columns(fixed.names, before, after)


def landmark_columns(names: Sequence[object], before: np.ndarray, after: np.ndarray) -> Columns:
    """Mean errors tre_mm and tre_before_mm, and the landmarks one by one, from their errors [n] in mm."""
    landmarks = [
        {"name": str(name), "before_mm": first, "after_mm": last}
        for name, first, last in zip(names, before.tolist(), after.tolist(), strict=True)
    ]
    return {"tre_mm": float(after.mean()), "tre_before_mm": float(before.mean()), "landmarks": landmarks}


def evaluate_folding(deformation: Deformation, reference: Volume, mask: Volume | None = None) -> Columns:
    """Folding on the lattice of `reference`, and where `mask` (on any lattice) is not 0.

    The columns are ndv_percent (non-diffeomorphic volume in percent of the voxels looked at), folded_voxels (whose
    Jacobian determinant is not positive) and std_log_jacobian (the standard deviation of the logarithm of the
    determinant where it is positive). Those of the mask end in _in_mask. Raises InputError for a mask that has no voxel
    there.
    """
    sampled = deformation.sample(reference.shape, reference.affine)
    determinant = jacobian.determinant_map(sampled)
    regions: dict[str, np.ndarray | None] = {"": None}
    if mask is not None:
        regions["_in_mask"] = inside = IDENTITY.warp(mask, reference, "nearest").array != 0
        if not inside.any():
            raise InputError(f"{mask.name} marks no voxel of the fixed image; choose another mask.")
    columns: Columns = {}
    for ending, region in regions.items():
        folding = jacobian.folding(sampled, region)
        columns[f"ndv_percent{ending}"] = folding.ndv_percent
        columns[f"folded_voxels{ending}"] = folding.folded_voxels
        columns[f"std_log_jacobian{ending}"] = jacobian.summary(determinant, folding.region)["std_log"]
    return columns


def label_overlap(
    fixed: np.ndarray,
    warped: np.ndarray,
    spacing: Sequence[float],
    structures: Sequence[int] | None = None,
    moving: np.ndarray | None = None,
) -> list[Columns]:
    """Dice (0 to 1) and HD95 (mm) of every structure in the `fixed` and the `warped` labels [k, j, i].

    Each comes as structure, dice and hd95_mm. The last two are NaN where the fixed or the moving labels lack the
    structure. A structure that the deformation has lost (it is in both labels, but not in the warped ones) has Dice 0
    and an infinite HD95.

    `spacing` (3) is in mm along i, j, k. `structures` are label values; without them all but 0 that occur.
    `moving` are the labels before warping, of any shape: they distinguish structures that were never there
    from structures that were lost. Raises InputError where the shapes differ or no structure is left.
    """
    if fixed.shape != warped.shape:
        raise InputError(
            f"The fixed labels have the shape {fixed.shape}, the warped ones {warped.shape}; "
            "resample one onto the other first."
        )
    present = (fixed, warped if moving is None else moving)
    in_fixed, in_moving = (set(np.unique(labels).tolist()) for labels in present)
    if structures is None:
        structures = sorted((in_fixed | in_moving) - {0})
    if not structures:
        raise InputError("The labels hold no structure: all their values are 0.")
    overlaps = []
    for structure, dice in zip(structures, dice_of(fixed, warped, structures), strict=True):
        in_both = structure in in_fixed and structure in in_moving
        distance = hd95(fixed == structure, warped == structure, spacing) if in_both else np.nan
        overlaps.append({"structure": structure, "dice": dice if in_both else np.nan, "hd95_mm": distance})
    return overlaps


def hd95(first: np.ndarray, second: np.ndarray, spacing: Sequence[float]) -> float:
    """95th percentile of the Hausdorff distance between two masks [k, j, i], in mm.

    `spacing` (3) is in mm along i, j, k.

    Each direction's percentile is over the surface, every surface element weighted by its area; the larger of
    the two counts. Nikolov et al., Deep learning to achieve clinically applicable segmentation of head and
    neck anatomy for radiotherapy (arXiv 1809.04430), by their library `surface-distance`, which LUMIR uses,
    too. Infinite where one mask is empty, NaN where both are.
    """
    if not (first.any() and second.any()):
        return np.inf if first.any() or second.any() else np.nan
    with warnings.catch_warnings():
        # The library reaches scipy.ndimage through namespaces that SciPy has deprecated.
        warnings.simplefilter("ignore", DeprecationWarning)
        import surface_distance

        distances = surface_distance.compute_surface_distances(first, second, spacing[::-1])
        return float(surface_distance.compute_robust_hausdorff(distances, 95))


def dice_of(first: np.ndarray, second: np.ndarray, structures: Sequence[int]) -> list[float]:
    """Dice (0 to 1) of every structure in two label arrays of the same shape; NaN where it is in neither."""
    in_first, in_second = _voxel_counts(first), _voxel_counts(second)
    in_both = _voxel_counts(first[first == second])
    totals = [in_first.get(structure, 0) + in_second.get(structure, 0) for structure in structures]
    return [
        2 * in_both.get(structure, 0) / total if total else np.nan
        for structure, total in zip(structures, totals, strict=True)
    ]


def label_centers(labels: np.ndarray, structures: Sequence[int]) -> np.ndarray:
    """Center of gravity [n, 3] of each structure, as an index along its axes; NaN where it is absent."""
    with np.errstate(invalid="ignore"):
        centers = ndimage.center_of_mass(np.ones(labels.shape, np.uint8), labels, structures)
    return np.reshape(centers, (-1, labels.ndim))


def _voxel_counts(labels: np.ndarray) -> dict[int, int]:
    values, counts = np.unique(labels, return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))
