"""How good a registration is: overlap of labels, distance of landmarks, folding, and statistics over cases.

Nothing here reads files. Deformations map fixed points to moving points in RAS mm,
arrays of labels are [k, j, i], and every distance is in mm.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from GradProjIOLib.errors import InputError
from GradProjIOLib.geometry.landmarks import match_landmarks
from GradProjIOLib.geometry.volume import Volume
from GradProjIOLib.spatial import jacobian
from GradProjIOLib.spatial.deformation import Deformation

IDENTITY = Deformation(np.zeros((2, 2, 2, 3)), np.eye(4))


@dataclass(frozen=True)
class LabelEvaluation:
    """Overlap of every structure, the means over them, and the mean Dice without the deformation."""

    structures: list[StructureOverlap]
    dice: float
    hd95: float
    dice_before: float


def evaluate_labels(
    deformation: Deformation, fixed: Volume, moving: Volume, structures: Sequence[int] | None = None
) -> LabelEvaluation:
    """Overlap of the `fixed` labels and the `moving` ones, drawn onto their lattice by nearest neighbor.

    Raises InputError where there is no structure. See `label_overlap`.
    """
    warped = deformation.warp(moving, fixed, "nearest").array
    overlaps = label_overlap(fixed.array, warped, fixed.spacing.tolist(), structures, moving.array)
    undeformed = IDENTITY.warp(moving, fixed, "nearest").array
    structures = [overlap.structure for overlap in overlaps if not np.isnan(overlap.dice)]
    before = dice_of(fixed.array, undeformed, structures)
    return LabelEvaluation(overlaps, *mean_overlap(overlaps), float(np.mean(before)) if before else np.nan)


@dataclass(frozen=True)
class LandmarkError:
    """Distance (mm) of one fixed landmark from its moving partner, without and with the deformation."""

    name: str
    before: float
    after: float


def evaluate_landmarks(
    deformation: Deformation,
    fixed: np.ndarray,
    moving: np.ndarray,
    fixed_names: Sequence[str] | None = None,
    moving_names: Sequence[str] | None = None,
) -> list[LandmarkError]:
    """Target registration error of every landmark; `fixed` and `moving` are points [n, 3] in RAS mm.

    Partners are found by `match_landmarks` where both lists have names, by order otherwise.
    Raises InputError where they do not match.
    """
    names = list(fixed_names or map(str, range(1, len(fixed) + 1)))
    if fixed_names and moving_names:
        moving = np.asarray(moving)[match_landmarks(list(fixed_names), list(moving_names))]
    before = landmark_distances(fixed, moving)
    after = landmark_distances(deformation.map_points(fixed), moving)
    return [LandmarkError(*error) for error in zip(names, before.tolist(), after.tolist(), strict=True)]


@dataclass(frozen=True)
class FoldingEvaluation:
    """Non-diffeomorphic volume (% of the voxels looked at), number of voxels whose Jacobian determinant is
    not positive, and the standard deviation of the logarithm of the determinant where it is positive."""

    ndv_percent: float
    folded_voxels: int
    std_log_jacobian: float


def evaluate_folding(
    deformation: Deformation, reference: Volume, mask: Volume | None = None
) -> tuple[FoldingEvaluation, FoldingEvaluation | None]:
    """Folding on the lattice of `reference`, as a whole and where `mask` (on any lattice) is not 0.

    Raises InputError for a mask that has no voxel there.
    """
    sampled = deformation.sample(reference.shape, reference.affine)
    determinant = jacobian.determinant_map(sampled, reference.shape, reference.affine)

    def inside(region: np.ndarray | None) -> FoldingEvaluation:
        folding = jacobian.folding(sampled, reference.shape, reference.affine, region)
        spread = jacobian.summary(determinant, jacobian.defined_region(sampled, region))["std_log"]
        return FoldingEvaluation(folding.ndv_percent, folding.folded_voxels, spread)

    if mask is None:
        return inside(None), None
    region = IDENTITY.warp(mask, reference, "nearest").array != 0
    if not region.any():
        raise InputError(f"{mask.name} marks no voxel of the fixed image; choose another mask.")
    return inside(None), inside(region)


@dataclass(frozen=True)
class StructureOverlap:
    """Dice (0 to 1) and HD95 (mm) of one structure.

    Both are NaN where the fixed or the moving labels lack the structure. One that the deformation has lost
    (it is in both, but not in the warped labels) has Dice 0 and an infinite HD95.
    """

    structure: int
    dice: float
    hd95: float


def label_overlap(
    fixed: np.ndarray,
    warped: np.ndarray,
    spacing: Sequence[float],
    structures: Sequence[int] | None = None,
    moving: np.ndarray | None = None,
) -> list[StructureOverlap]:
    """Dice and HD95 of every structure in the `fixed` and the `warped` labels [k, j, i].

    `spacing` (3) is in mm along i, j, k. `structures` are label values; without them all but 0 that occur.
    `moving` are the labels before warping, of any shape: they distinguish structures that were never there
    from structures that were lost. Raises InputError where the shapes differ or no structure is left.
    """
    if fixed.shape != warped.shape:
        raise InputError(
            f"The fixed labels have the shape {fixed.shape}, the warped ones {warped.shape}; "
            "resample one onto the other first."
        )
    in_fixed = _voxel_counts(fixed).keys()
    in_moving = _voxel_counts(warped if moving is None else moving).keys()
    if structures is None:
        structures = sorted((in_fixed | in_moving) - {0})
    if not structures:
        raise InputError("The labels hold no structure: all their values are 0.")
    # The smallest box around each label in either array; distances need nothing outside of it. Labels may be huge.
    both = np.stack([fixed, warped])
    numbers, positions = np.unique(both, return_inverse=True)
    boxes = dict(zip(numbers.tolist(), ndimage.find_objects(positions.reshape(both.shape) + 1), strict=True))
    overlaps = []
    for structure, dice in zip(structures, dice_of(fixed, warped, structures), strict=True):
        if structure in in_fixed and structure in in_moving:
            box = boxes[structure][1:]
            distance = hd95(fixed[box] == structure, warped[box] == structure, spacing)
            overlaps.append(StructureOverlap(structure, dice, distance))
        else:
            overlaps.append(StructureOverlap(structure, np.nan, np.nan))
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

        distances = surface_distance.compute_surface_distances(
            first.astype(bool), second.astype(bool), [float(step) for step in reversed(spacing)]
        )
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


def mean_overlap(overlaps: Sequence[StructureOverlap]) -> tuple[float, float]:
    """Mean Dice and mean HD95 (mm) over the structures that are in both images; NaN where there is none."""
    measured = [overlap for overlap in overlaps if not np.isnan(overlap.dice)]
    if not measured:
        return np.nan, np.nan
    return (
        float(np.mean([overlap.dice for overlap in measured])),
        float(np.mean([overlap.hd95 for overlap in measured])),
    )


def landmark_distances(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Distance of each pair of corresponding points [n, 3], in their unit: [n].

    The target registration error is that of mapped fixed points from moving points, in RAS mm.
    """
    if np.shape(first) != np.shape(second):
        raise InputError(
            f"There are {len(first)} fixed and {len(second)} moving landmarks; "
            "give the same number, in the same order or with the same names."
        )
    return np.linalg.norm(np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64), axis=-1)


def label_centers(labels: np.ndarray, structures: Sequence[int]) -> np.ndarray:
    """Center of gravity [n, 3] of each structure, as an index along its axes; NaN where it is absent."""
    labels = np.asarray(labels)
    present = np.isin(structures, labels)
    centers = np.full((len(structures), labels.ndim), np.nan)
    if present.any():
        centers[present] = ndimage.center_of_mass(
            np.ones(labels.shape, np.uint8), labels, np.asarray(structures)[present]
        )
    return centers


def _voxel_counts(labels: np.ndarray) -> dict[int, int]:
    values, counts = np.unique(labels, return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))
