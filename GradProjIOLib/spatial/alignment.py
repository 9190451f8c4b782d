"""Automatic linear alignment of two images, as the start of a deformable registration.

Mutual information says how well the images fit, since it needs no common contrast. A coarse search over
rotations finds the starts from which SimpleITK's registration framework optimizes (Mattes et al. 2003, IEEE
Transactions on Medical Imaging 22(1)), first over rigid, then over affine maps.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from operator import itemgetter
from typing import TYPE_CHECKING

import numpy as np

from GradProjIOLib.errors import InputError
from GradProjIOLib.geometry.lattice import affine_of, apply_matrix, in_view, lattice_affine, lattice_points
from GradProjIOLib.geometry.transform_files import linear_from_sitk, sitk_from_linear
from GradProjIOLib.geometry.volume import Volume, to_sitk
from GradProjIOLib.settings import ALIGNMENTS, LANDMARK_ALIGNMENTS
from GradProjIOLib.spatial.deformation import Deformation, as_deformation
from GradProjIOLib.spatial.sampling import sample_linear

if TYPE_CHECKING:
    import SimpleITK

LONGEST_SIDE = 96
BINS = 32
FEWEST_SAMPLES = 8
SEARCH_SHRINK = 4
SEARCH_DEGREES = (-50, -25, 0, 25, 50)
STARTS = 4
SAMPLES = 30_000
LARGEST_STRETCH = 2.5
LEAST_EXTENT = 1.0
"""Standard deviation in mm that landmarks must have along a direction to say how it is turned or stretched."""


def align(
    fixed: Volume,
    moving: Volume,
    kind: str = "affine",
    seed: int = 0,
    fixed_mask: Volume | None = None,
    moving_mask: Volume | None = None,
) -> np.ndarray:
    """The linear map (4x4, RAS mm) from points of `fixed` to points of `moving`.

    `kind` is "none" (the identity), "centers" (only a shift, which brings what is visible in the two images to the same
    place), "rigid" or "affine". Masks (any lattice, non-zero inside) say where the images count; the coarse search
    ignores the masks, because a small region matches in many places. The same `seed` gives the same matrix bit for bit,
    on any number of cores. Raises InputError where the images cannot be aligned.
    """
    kinds = [one for one in ALIGNMENTS if one not in LANDMARK_ALIGNMENTS]
    if kind not in kinds:
        raise InputError(f"The alignment {kind!r} is not known; choose one of {', '.join(kinds)}.")
    if kind == "none":
        return np.eye(4)
    extent = fixed.spacing * fixed.shape[::-1]
    spacing = max(float(extent.max()) / LONGEST_SIDE, float(fixed.spacing.min()))
    fine = _reduced(fixed, spacing), _reduced(moving, spacing)
    if kind == "centers":
        return affine_of(np.eye(3), _center(fine[1]) - _center(fine[0]))
    coarse = _reduced(fine[0], SEARCH_SHRINK * spacing), _reduced(fine[1], SEARCH_SHRINK * spacing)
    attempts = [_optimized(*coarse, start, "rigid", (1,), seed) for start in _starts(*coarse)]
    reached = [result for result in attempts if result is not None]
    if not reached:
        raise _failure(fixed, moving, "they do not overlap")
    _, matrix = max(reached, key=itemgetter(0))
    for step in kinds[2 : kinds.index(kind) + 1]:
        result = _optimized(*fine, matrix, step, (2, 1), seed, fixed_mask, moving_mask)
        if result is None:
            raise _failure(fixed, moving, "they came apart")
        _, matrix = result
    if _stretches(matrix):
        raise _failure(fixed, moving, "one would be stretched beyond recognition")
    return matrix


def align_landmarks(fixed: np.ndarray, moving: np.ndarray, kind: str) -> np.ndarray:
    """The linear map (4x4) that takes points ``fixed`` [n, 3] nearest to their partners ``moving`` [n, 3], in RAS mm.

    It minimizes the sum of squared distances. kind: "landmarks_rigid" (Kabsch, Acta Crystallographica A32, 1976) or
    "landmarks_affine". Raises InputError where there are too few pairs, or they do not determine the map.
    """
    from scipy.spatial.transform import Rotation

    rigid = kind == "landmarks_rigid"
    name, fewest, flat = ("rigid", 3, "on one line") if rigid else ("affine", 4, "in one plane")
    if len(fixed) < fewest:
        raise InputError(
            f"An alignment that is {name} needs at least {fewest} pairs of landmarks, and there are {len(fixed)}; "
            "place more, or choose another alignment."
        )
    centers = fixed.mean(axis=0), moving.mean(axis=0)
    around = fixed - centers[0], moving - centers[1]
    extents = [np.linalg.svd(points, compute_uv=False)[fewest - 2] / math.sqrt(len(points)) for points in around]
    if min(extents) < LEAST_EXTENT:
        which = "fixed" if extents[0] < LEAST_EXTENT else "moving"
        raise InputError(
            f"The {which} landmarks lie {flat}, so they do not determine an alignment that is {name}; place more of "
            "them elsewhere, or choose another alignment."
        )
    if rigid:
        linear = Rotation.align_vectors(around[1], around[0])[0].as_matrix()
    else:
        linear = np.linalg.lstsq(around[0], around[1], rcond=None)[0].T
    matrix = affine_of(linear, centers[1] - linear @ centers[0])
    if _stretches(matrix) or np.linalg.det(linear) < 0:
        raise InputError(
            "The landmarks would stretch or mirror the moving image beyond recognition; check that partners have the "
            "same names or the same order."
        )
    return matrix


def _stretches(matrix: np.ndarray) -> bool:
    """Whether a map stretches something more than images of a patient differ."""
    stretch = np.linalg.svd(matrix[:3, :3], compute_uv=False)
    return bool(stretch.max() > LARGEST_STRETCH or stretch.min() < 1 / LARGEST_STRETCH)


def overlap(fixed: Volume, moving: Volume, transform: Deformation | np.ndarray) -> float:
    """The part (0 to 1) of the fixed image's field of view that `transform` (4x4 in RAS mm, or a Deformation, fixed →
    moving) puts into the moving image's field of view."""
    lattice = (24, 24, 24)
    points = lattice_points(lattice, lattice_affine(fixed.affine, fixed.shape, lattice))
    mapped = as_deformation(transform).map_points(points)
    return float(in_view(apply_matrix(np.linalg.inv(moving.affine), mapped), moving.shape).mean())


def mutual_information(first: np.ndarray, second: np.ndarray) -> float:
    """Mutual information (nats) of two arrays of intensities of equal shape, from a joint histogram."""
    joint, _, _ = np.histogram2d(first.ravel(), second.ravel(), bins=BINS)
    joint /= joint.sum()
    independent = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
    seen = joint > 0
    return float((joint[seen] * np.log(joint[seen] / independent[seen])).sum())


def _reduced(volume: Volume, spacing: float) -> Volume:
    """`volume` smoothed and sampled about every `spacing` mm, outliers clipped, intensities in [0, 1]."""
    from scipy import ndimage

    low, high = np.percentile(volume.array, [0.1, 99.8])
    values = (volume.array.astype(np.float32) - low).clip(0, high - low) / max(high - low, 1e-12)
    steps = volume.spacing[::-1]
    values = ndimage.gaussian_filter(values, np.where(steps < spacing, 0.5 * spacing / steps, 0))
    k, j, i = np.maximum(np.round(np.array(volume.shape) * steps / spacing), FEWEST_SAMPLES).astype(int).tolist()
    lattice = (k, j, i)
    affine = lattice_affine(volume.affine, volume.shape, lattice)
    index = lattice_points(lattice, np.linalg.inv(volume.affine) @ affine)
    return Volume(sample_linear(values[..., None], index)[..., 0], affine, volume.name)


def _center(reduced: Volume) -> np.ndarray:
    """The middle (RAS mm) of what is brighter than Otsu's threshold.

    Where that fills the lattice's faces as much as its inside, it is no object on a background; then it is the
    middle of the lattice.
    """
    import SimpleITK as sitk

    bright = sitk.GetArrayFromImage(sitk.OtsuThreshold(to_sitk(reduced), 0, 1)).astype(bool)
    faces = np.ones(reduced.shape, dtype=bool)
    faces[1:-1, 1:-1, 1:-1] = False
    if bright[faces].mean() >= 0.5 * bright.mean():
        return _lattice_center(reduced)
    return apply_matrix(reduced.affine, np.argwhere(bright).mean(axis=0)[::-1])


def _lattice_center(volume: Volume) -> np.ndarray:
    return apply_matrix(volume.affine, (np.array(volume.shape[::-1]) - 1) / 2)


def _starts(fixed: Volume, moving: Volume) -> list[np.ndarray]:
    """The most promising rotations of a coarse grid, each with the best of three shifts.

    The shifts bring the visible objects, the fields of view, or nothing to the same place.
    """
    from scipy.spatial.transform import Rotation

    center = _center(fixed)
    shifts = (_center(moving) - center, _lattice_center(moving) - _lattice_center(fixed), np.zeros(3))
    points = lattice_points(fixed.shape, fixed.affine)
    scored = []
    for degrees in itertools.product(SEARCH_DEGREES, repeat=3):
        rotation = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix()
        candidates = [affine_of(rotation, center + shift - rotation @ center) for shift in shifts]
        scored.append(max(((_fit(fixed, moving, points, one), one) for one in candidates), key=itemgetter(0)))
    return [matrix for _, matrix in sorted(scored, key=itemgetter(0), reverse=True)[:STARTS]]


def _fit(fixed: Volume, moving: Volume, points: np.ndarray, matrix: np.ndarray) -> float:
    """Mutual information of `fixed` and the moving image under `matrix`, 0 outside the moving image."""
    index = apply_matrix(np.linalg.inv(moving.affine) @ matrix, points)
    warped = sample_linear(moving.array[..., None], index)[..., 0] * in_view(index, moving.shape)
    return mutual_information(fixed.array, warped)


def _optimized(
    fixed: Volume,
    moving: Volume,
    start: np.ndarray,
    kind: str,
    shrink: tuple[int, ...],
    seed: int,
    fixed_mask: Volume | None = None,
    moving_mask: Volume | None = None,
) -> tuple[float, np.ndarray] | None:
    """The mutual information and the rigid or affine map that the optimizer reaches from `start`, coarse to
    fine by the factors `shrink`; None where the images have too little in common on the way."""
    import SimpleITK as sitk

    registration = sitk.ImageRegistrationMethod()
    registration.SetMetricAsMattesMutualInformation(BINS)
    registration.SetMetricSamplingStrategy(registration.RANDOM)
    shares = [min(1.0, SAMPLES * factor**3 / fixed.array.size) for factor in shrink]
    registration.SetMetricSamplingPercentagePerLevel(shares, seed + 1)
    registration.SetInterpolator(sitk.sitkLinear)
    registration.SetShrinkFactorsPerLevel(list(shrink))
    registration.SetSmoothingSigmasPerLevel([0.5 * factor if factor > 1 else 0 for factor in shrink])
    registration.SmoothingSigmasAreSpecifiedInPhysicalUnitsOff()
    registration.SetOptimizerAsRegularStepGradientDescent(
        learningRate=1.0,
        minStep=1e-4,
        numberOfIterations=200,
        estimateLearningRate=registration.Once,
        maximumStepSizeInPhysicalUnits=2 * float(fixed.spacing.max()),
    )
    registration.SetOptimizerScalesFromPhysicalShift()
    registration.SetInitialTransform(sitk_from_linear(start, _center(fixed), kind == "rigid"), inPlace=False)
    if fixed_mask is not None:
        registration.SetMetricFixedMask(_zeros_and_ones(fixed_mask))
    if moving_mask is not None:
        registration.SetMetricMovingMask(_zeros_and_ones(moving_mask))
    # With more threads the metric adds up in changing order, and two runs differ. It follows only SimpleITK's global
    # number of threads, not the registration's own.
    threads = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    try:
        found = registration.Execute(to_sitk(fixed), to_sitk(moving))
    except RuntimeError:
        return None
    finally:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)
    return -registration.GetMetricValue(), linear_from_sitk(found)


def _zeros_and_ones(mask: Volume) -> SimpleITK.Image:
    if not mask.array.any():
        raise InputError(f"{mask.name} is empty; choose a mask with voxels in it.")
    return to_sitk(replace(mask, array=(mask.array != 0).astype(np.uint8)))


def _failure(fixed: Volume, moving: Volume, reason: str) -> InputError:
    return InputError(
        f"{moving.name} could not be aligned to {fixed.name} automatically ({reason}); "
        "give an initial transform or align them by their centers."
    )
