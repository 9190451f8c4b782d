"""Deformations: a displacement in RAS mm on a lattice, and what one does with it.

A deformation maps a point x of the fixed image to x + u(x) in the moving image. Coordinates are RAS mm; ITK's
files, in LPS mm, are translated when they are read and written.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from GradProjIOLib import volume as volumes
from GradProjIOLib.volume import InputError, Volume

if TYPE_CHECKING:
    import SimpleITK

TRANSFORM_SUFFIXES = (".h5", ".hdf5", ".tfm", ".txt")
READABLE_SUFFIXES = (*TRANSFORM_SUFFIXES, ".mat", ".xfm", *volumes.IMAGE_SUFFIXES)
INVERSE_TOLERANCE = 0.01  # mm
INVERSE_ITERATIONS = 100
POINTS_AT_ONCE = 1 << 20
Lattice = tuple[tuple[int, int, int], np.ndarray]


@dataclass(frozen=True, eq=False)
class Deformation:
    """The map x → x + u(x), with u = `displacement` [k, j, i, 3] in RAS mm and `affine` (4x4) from the index
    (i, j, k, 1) of its lattice to RAS mm.

    u is trilinear inside the lattice. Outside it keeps the value of the nearest point of the border, as in
    3D Slicer; ITK takes u = 0 from half a voxel outside on.
    """

    displacement: np.ndarray
    affine: np.ndarray

    def __post_init__(self) -> None:
        displacement = np.ascontiguousarray(self.displacement, dtype=np.float32)
        if displacement.ndim != 4 or displacement.shape[3] != 3:
            raise ValueError(f"expected a displacement of shape [k, j, i, 3], found {displacement.shape}")
        object.__setattr__(self, "displacement", displacement)
        object.__setattr__(self, "affine", np.array(self.affine, dtype=np.float64))
        volumes.check_affine(self.affine, "the lattice of the deformation")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of samples of the lattice along (k, j, i)."""
        return self.displacement.shape[:3]

    @classmethod
    def from_network(
        cls,
        phi: torch.Tensor | np.ndarray,
        fixed_shape: tuple[int, int, int],
        fixed_affine: np.ndarray,
        moving_shape: tuple[int, int, int],
        moving_affine: np.ndarray,
    ) -> Deformation:
        """The deformation that a network's map `phi` [3, D, H, W] stands for between two images.

        `phi` lives on the fixed image stretched to the lattice (D, H, W) and points into the moving image
        stretched to the same lattice (both with `align_corners=False`); its components (along D, H, W) are 0
        at the first and 1 at the last sample, as in the package icon_registration. Shapes are (K, J, I),
        affines from the index (i, j, k, 1) to RAS mm.

        The result's lattice is the network's with one more sample on every side, on which `phi` moves as its
        neighbor does. With them it covers the whole fixed image, whose outermost voxels can lie outside the
        network's samples.
        """
        phi = np.asarray(phi.detach().cpu() if isinstance(phi, torch.Tensor) else phi)
        lattice = phi.shape[1:]
        fixed = volumes.lattice_affine(fixed_affine, fixed_shape, lattice)
        moving = volumes.lattice_affine(moving_affine, moving_shape, lattice)
        samples = np.stack(np.meshgrid(*map(np.arange, lattice), indexing="ij"))
        shift = phi * (np.reshape(lattice, (3, 1, 1, 1)) - 1.0) - samples
        shift = np.pad(shift, [(0, 0)] + [(1, 1)] * 3, mode="edge")[::-1].transpose(1, 2, 3, 0)
        affine = fixed @ _translation(-1)
        difference = moving @ _translation(-1) - affine
        displacement = shift @ moving[:3, :3].T + lattice_points(shift.shape[:3], difference)
        return cls(displacement, affine)

    @classmethod
    def from_linear(cls, matrix: np.ndarray, shape: tuple[int, int, int], affine: np.ndarray) -> Deformation:
        """The linear map `matrix` (4x4, RAS mm) sampled on a lattice."""
        return cls(lattice_points(shape, (matrix - np.eye(4)) @ affine), affine)

    def map_points(self, points: np.ndarray) -> np.ndarray:
        """x + u(x) for `points` [..., 3] in RAS mm."""
        points = np.asarray(points, dtype=np.float64)
        return points + self._displacement_at(points)

    def sample(self, shape: tuple[int, int, int], affine: np.ndarray) -> Deformation:
        """The same deformation sampled on another lattice of `shape` (K, J, I)."""
        if shape == self.shape and np.array_equal(affine, self.affine):
            return self
        return _deformation_from(lambda points: points, self._displacement_at, shape, affine)

    def warp(
        self,
        volume: Volume,
        reference: Volume | Lattice,
        interpolation: str = "linear",
        background: float | None = None,
    ) -> Volume:
        """The moving `volume` drawn onto the fixed image: voxel x of `reference` gets volume(x + u(x)).

        `interpolation` is "linear", "bspline" (cubic) or "nearest" (labels). The pixel type stays; whole
        numbers are rounded. `background` is given to points more than half a voxel outside `volume`; it is
        the volume's minimum unless given, and 0 for "nearest".
        """
        shape, affine = (reference.shape, reference.affine) if isinstance(reference, Volume) else reference
        sampler = _sampler(volume.array, interpolation)
        if background is None:
            background = 0 if interpolation == "nearest" else volume.array.min()
        to_index = np.linalg.inv(volume.affine)
        upper = np.array(volume.shape[::-1]) - 0.5
        warped = np.empty(shape, dtype=volume.array.dtype)
        for slab, points in _slabs(shape, affine):
            index = _apply(to_index, self.map_points(points))
            values = _to_type(sampler(index), warped.dtype)
            inside = ((index >= -0.5) & (index <= upper)).all(axis=-1)
            warped[slab] = np.where(inside, values, np.asarray(background, dtype=warped.dtype))
        return Volume(warped, affine, volume.name)

    def compose(self, inner: Deformation) -> Deformation:
        """x → self(inner(x)), on the lattice of `inner`."""
        return _deformation_from(inner.map_points, self._displacement_at, inner.shape, inner.affine)

    def then_linear(self, matrix: np.ndarray) -> Deformation:
        """x → matrix·(x + u(x)), on the same lattice and exact inside it; `matrix` is 4x4 in RAS mm."""
        linear_part = lattice_points(self.shape, (matrix - np.eye(4)) @ self.affine)
        return Deformation(self.displacement @ np.asarray(matrix)[:3, :3].T + linear_part, self.affine)

    def preceded_by_linear(
        self, matrix: np.ndarray, shape: tuple[int, int, int], affine: np.ndarray
    ) -> Deformation:
        """y → matrix·y + u(matrix·y), sampled on the given lattice; `matrix` is 4x4 in RAS mm."""
        return _deformation_from(lambda points: _apply(matrix, points), self._displacement_at, shape, affine)

    def inverse(
        self, shape: tuple[int, int, int] | None = None, affine: np.ndarray | None = None
    ) -> Deformation:
        """The inverse map, y → x with x + u(x) = y, on this lattice or a given one.

        Each point is found by the fixed-point iteration x ← x − M⁻¹·(x + u(x) − y), where M is the linear map
        closest to x + u(x). With M = 1 it is the iteration of Chen et al. 2008 (Medical Physics 35(1));
        with M it finds linear maps at once. Where a step does not come closer, it is halved.

        Where the deformation folds, several x belong to one y and there is no inverse. The iteration then
        ends at one of them, or at the nearest it came to; neighbors may take different ones. A RuntimeWarning
        says how many points are off by more than 0.01 mm and by how much at most.
        """
        shape, affine = (shape or self.shape), (self.affine if affine is None else affine)
        step = np.linalg.inv(self._linear_part())
        displacement = np.empty((*shape, 3), dtype=np.float32)
        errors = []
        for slab, points in _slabs(shape, affine):
            found, error = _solve(self.map_points, points.reshape(-1, 3), step)
            displacement[slab] = found.reshape(points.shape) - points
            errors.append(error)
        error = np.concatenate(errors)
        missed = int((error > INVERSE_TOLERANCE).sum())
        if missed:
            warnings.warn(
                f"the inverse deformation is off by up to {error.max():.2f} mm, at {missed} of {error.size} "
                "points by more than 0.01 mm; the deformation folds there or changes too abruptly",
                RuntimeWarning,
                stacklevel=2,
            )
        return Deformation(displacement, affine)

    def write(self, path: str | os.PathLike) -> None:
        """Write an ITK transform (.h5, .tfm) or a displacement image (.nii.gz, .nrrd, .mha …).

        The file is written whole or not at all. Both kinds are in LPS mm and map the fixed image's points to
        the moving image's, the direction in which ITK, ANTs and 3D Slicer use a file to resample the moving
        image. Raises WriteError.
        """
        import SimpleITK as sitk

        path = Path(path)
        image = sitk.GetImageFromArray(self.displacement * np.float32([-1, -1, 1]), isVector=True)
        volumes.set_lattice(image, self.affine)
        if path.suffix.lower() in TRANSFORM_SUFFIXES:
            field = sitk.DisplacementFieldTransform(sitk.Cast(image, sitk.sitkVectorFloat64))
            _write_transform(field, path)
        else:
            volumes.write_sitk(image, path)

    @classmethod
    def read(
        cls,
        path: str | os.PathLike,
        shape: tuple[int, int, int] | None = None,
        affine: np.ndarray | None = None,
    ) -> Deformation:
        """Read what `write` writes, or any other ITK transform (linear, B-spline, composite).

        With `shape` (K, J, I) and `affine` the result is sampled on that lattice; they may be left out for a
        file that holds one displacement field. Raises InputError where the file is missing, unreadable, or
        holds something else.
        """
        path = Path(path)
        if path.name.lower().endswith(volumes.IMAGE_SUFFIXES):
            found = _from_field(_read_field(path), path)
        else:
            transform = _read_transform(path)
            if transform.GetName() != "DisplacementFieldTransform":
                return _from_transform(transform, shape, affine, path)
            found = _from_field(transform.GetDisplacementField(), path)
        return found if shape is None else found.sample(tuple(shape), affine)

    def _displacement_at(self, points: np.ndarray) -> np.ndarray:
        return sample_linear(self.displacement, _apply(np.linalg.inv(self.affine), points))

    def _linear_part(self) -> np.ndarray:
        """The 3x3 matrix M of the affine map closest to x + u(x), from a part of the samples."""
        k, j, i = (max(1, n // 16) for n in self.shape)
        coarse = self.displacement[::k, ::j, ::i]
        points = lattice_points(coarse.shape[:3], self.affine @ np.diag([i, j, k, 1])).reshape(-1, 3)
        known = np.column_stack([points - points.mean(axis=0), np.ones(len(points))])
        change, *_ = np.linalg.lstsq(known, coarse.reshape(-1, 3), rcond=None)
        return np.eye(3) + change[:3].T


def read_linear(path: str | os.PathLike) -> np.ndarray | None:
    """The 4x4 matrix (RAS mm, fixed → moving) of the linear ITK transform in `path`, None for any other one.

    Raises InputError where the file is missing or is no ITK transform.
    """
    path = Path(path)
    if path.name.lower().endswith(volumes.IMAGE_SUFFIXES):
        return None
    transform = _read_transform(path)
    if not transform.IsLinear():
        return None
    corners = np.vstack([np.zeros(3), np.eye(3)])
    images = np.array([transform.TransformPoint(point) for point in corners.tolist()])
    matrix = np.eye(4)
    matrix[:3, :3] = (images[1:] - images[0]).T
    matrix[:3, 3] = images[0]
    return volumes.RAS_TO_LPS @ matrix @ volumes.RAS_TO_LPS


def write_linear(matrix: np.ndarray, path: str | os.PathLike) -> None:
    """Write the linear map `matrix` (4x4, RAS mm, fixed → moving) as an ITK transform. Raises WriteError."""
    import SimpleITK as sitk

    lps = volumes.RAS_TO_LPS @ matrix @ volumes.RAS_TO_LPS
    transform = sitk.AffineTransform(lps[:3, :3].ravel().tolist(), lps[:3, 3].tolist())
    _write_transform(transform, Path(path))


def lattice_points(
    shape: tuple[int, int, int], affine: np.ndarray, first: int = 0, last: int | None = None
) -> np.ndarray:
    """Where `affine` (4x4) puts the indices of a lattice of `shape` (K, J, I): [k, j, i, 3], float64.

    `first` and `last` choose the slices k that are computed.
    """
    k, j, i = np.arange(first, shape[0] if last is None else last), np.arange(shape[1]), np.arange(shape[2])
    return (
        k[:, None, None, None] * affine[:3, 2]
        + (j[:, None, None] * affine[:3, 1] + (i[:, None] * affine[:3, 0] + affine[:3, 3]))
    )


def sample_linear(values: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Trilinear samples of `values` [k, j, i, channels] at `index` [..., 3], given as (i, j, k) and clamped.

    Returns float32 [..., channels].
    """
    extent = np.maximum(np.array(values.shape[2::-1]) - 1, 1)
    grid = torch.from_numpy((index * (2 / extent) - 1).astype(np.float32).reshape(1, 1, 1, -1, 3))
    source = torch.from_numpy(np.asarray(values, dtype=np.float32)).permute(3, 0, 1, 2)[None]
    found = torch.nn.functional.grid_sample(source, grid, padding_mode="border", align_corners=True)
    return found[0, :, 0, 0].T.reshape(*index.shape[:-1], values.shape[3]).numpy()


def _sampler(array: np.ndarray, interpolation: str):
    """A function of an index [..., 3] (i, j, k) that interpolates `array` [k, j, i] there, clamped."""
    if interpolation == "linear":
        values = array.astype(np.float32)[..., None]
        return lambda index: sample_linear(values, index)[..., 0]
    if interpolation == "nearest":
        return lambda index: array[_nearest(array.shape, index)]
    if interpolation == "bspline":
        from scipy import ndimage

        coefficients = ndimage.spline_filter(array, order=3, mode="mirror", output=np.float32)
        return lambda index: ndimage.map_coordinates(
            coefficients,
            np.moveaxis(_clamp(array.shape, index)[..., ::-1], -1, 0),
            order=3,
            mode="mirror",
            prefilter=False,
        )
    raise ValueError(f"interpolation is one of linear, bspline, nearest; found {interpolation!r}")


def _clamp(shape: tuple[int, int, int], index: np.ndarray) -> np.ndarray:
    return np.clip(index, 0, np.array(shape[::-1]) - 1)


def _nearest(shape: tuple[int, int, int], index: np.ndarray) -> tuple[np.ndarray, ...]:
    rounded = _clamp(shape, np.floor(index + 0.5)).astype(np.intp)
    return tuple(np.moveaxis(rounded[..., ::-1], -1, 0))


def _to_type(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """`values` as `dtype`; whole-number types get the nearest whole number in their range."""
    if dtype.kind in "ui" and values.dtype.kind == "f":
        limits = np.iinfo(dtype)
        values = np.clip(np.rint(values.astype(np.float64)), limits.min, limits.max)
    return values.astype(dtype, copy=False)


def _apply(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    return points @ matrix[:3, :3].T + matrix[:3, 3]


def _translation(distance: float) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, 3] = distance
    return matrix


def _slabs(shape: tuple[int, int, int], affine: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Runs of slices k of a lattice with their points, few enough to stay small in memory."""
    thickness = max(1, POINTS_AT_ONCE // (shape[1] * shape[2]))
    for first in range(0, shape[0], thickness):
        last = min(first + thickness, shape[0])
        yield slice(first, last), lattice_points(shape, affine, first, last)


def _deformation_from(inner, displacement_at, shape: tuple[int, int, int], affine: np.ndarray) -> Deformation:
    """The deformation x → inner(x) + displacement_at(inner(x)) sampled on a lattice."""
    displacement = np.empty((*shape, 3), dtype=np.float32)
    for slab, points in _slabs(shape, affine):
        moved = inner(points)
        displacement[slab] = moved - points + displacement_at(moved)
    return Deformation(displacement, affine)


def _solve(forward, targets: np.ndarray, step: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points whose image under `forward` is `targets` [n, 3], and how far off the images are [n], in mm."""
    found = targets.copy()
    residual = forward(found) - targets
    error = np.linalg.norm(residual, axis=1)
    pace = np.ones(len(targets))
    active = np.flatnonzero(error > INVERSE_TOLERANCE / 10)
    for _ in range(INVERSE_ITERATIONS):
        if active.size == 0:
            break
        trial = found[active] - pace[active, None] * (residual[active] @ step.T)
        trial_residual = forward(trial) - targets[active]
        trial_error = np.linalg.norm(trial_residual, axis=1)
        closer = trial_error < error[active]
        improved = active[closer]
        found[improved], residual[improved], error[improved] = (
            trial[closer],
            trial_residual[closer],
            trial_error[closer],
        )
        pace[active] = np.where(closer, np.minimum(2 * pace[active], 1), pace[active] / 2)
        active = active[error[active] > INVERSE_TOLERANCE / 10]
    return found, error


def _read_transform(path: Path) -> SimpleITK.Transform:
    import SimpleITK as sitk

    volumes.check_readable(path, READABLE_SUFFIXES)
    try:
        transform = sitk.ReadTransform(str(path))
    except RuntimeError as error:
        raise InputError(
            f"{path} cannot be read as an ITK transform; export it again, as .h5 or .tfm."
        ) from error
    if transform.GetDimension() != 3:
        raise InputError(f"{path} is a {transform.GetDimension()}-D transform; choose a 3-D one.")
    return transform


def _read_field(path: Path) -> SimpleITK.Image:
    import SimpleITK as sitk

    volumes.check_readable(path)
    try:
        field = sitk.ReadImage(str(path))
    except RuntimeError as error:
        raise InputError(f"{path} cannot be read as a displacement image; export it again.") from error
    if field.GetDimension() != 3 or field.GetNumberOfComponentsPerPixel() != 3:
        raise InputError(
            f"{path} is not a displacement image; choose a 3-D image with three components per voxel (mm)."
        )
    return field


def _from_field(field: SimpleITK.Image, path: Path) -> Deformation:
    import SimpleITK as sitk

    displacement = sitk.GetArrayFromImage(field).astype(np.float32)
    if not np.isfinite(displacement).all():
        raise InputError(f"{path} has NaN or infinity among its displacements; compute it again.")
    displacement *= np.float32([-1, -1, 1])
    return Deformation(displacement, volumes.lattice_of(field))


def _from_transform(
    transform: SimpleITK.Transform,
    shape: tuple[int, int, int] | None,
    affine: np.ndarray | None,
    path: Path,
) -> Deformation:
    import SimpleITK as sitk

    if shape is None or affine is None:
        raise InputError(
            f"{path} holds a {transform.GetName()}, which needs an image that says where to sample it; "
            "give the fixed image, too."
        )
    lattice = sitk.Image([int(n) for n in shape[::-1]], sitk.sitkUInt8)
    volumes.set_lattice(lattice, affine)
    to_field = sitk.TransformToDisplacementFieldFilter()
    to_field.SetReferenceImage(lattice)
    to_field.SetOutputPixelType(sitk.sitkVectorFloat64)
    return _from_field(to_field.Execute(transform), path)


def _write_transform(transform: SimpleITK.Transform, path: Path) -> None:
    import SimpleITK as sitk

    if path.suffix.lower() not in TRANSFORM_SUFFIXES:
        raise volumes.WriteError(f"{path} cannot be written: use the suffix .h5 or .tfm.")
    with volumes.atomic_path(path) as temporary:
        # On a full disk ITK's text writer says nothing and HDF5 brings the process down when it ends.
        _require_space(temporary, 65536 + 25 * transform.GetNumberOfParameters())
        try:
            sitk.WriteTransform(transform, str(temporary))
        except RuntimeError as error:
            raise volumes.write_error(path, error) from error


def _require_space(path: Path, size: int) -> None:
    """Raise OSError where a file of `size` bytes cannot be written at `path`."""
    block = bytes(1 << 20)
    with open(path, "wb") as file:
        for _ in range(0, size, len(block)):
            file.write(block)
    path.unlink()
