"""A pair of head-like phantom images whose true deformation is known.

`make_pair` evaluates the head of `anatomy.py` once on the moving image's lattice and once at the deformed voxel
centers of the fixed image, so that moving(x + u(x)) = fixed(x) holds without any interpolation; only the bias
fields and the noise of the two images differ. For demonstrations and tests, not a model of a population.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor

from GradProjIOLib.errors import InputError
from GradProjIOLib.geometry.lattice import lattice_points
from GradProjIOLib.geometry.volume import Volume
from GradProjIOLib.spatial.deformation import Deformation
from GradProjIOLib.spatial.jacobian import jacobian_determinant
from GradProjIOLib.synthetic.anatomy import T1_INTENSITIES, Anatomy, paint, random_folds
from GradProjIOLib.synthetic.random_fields import integrate, sample, smooth_noise

LABELS = range(1, 13)
"""The structures of `anatomy.STRUCTURES` in the label volumes; 11 is the whole cerebellum, 0 everything else."""

CEREBELLAR_WHITE_MATTER = 13
SMALLEST_DETERMINANT = 0.25
# The head is neither in the middle of the lattice nor parallel to it, nor is the lattice in the scanner.
SCANNER_CENTER = np.array([17.0, -29.0, 38.0])
LATTICE_ANGLES = (4.0, -3.0, 6.0)
HEAD_ANGLES = (-3.0, 2.0, -2.5)
HEAD_OFFSET = np.array([-4.0, 11.0, 9.0])


@dataclass(frozen=True)
class PhantomPair:
    """Two images [k, j, i], their labels (`LABELS`) and the true map fixed → moving."""

    fixed: Volume
    moving: Volume
    fixed_labels: Volume
    moving_labels: Volume
    deformation: Deformation


def _rotation(degrees: tuple[float, float, float]) -> np.ndarray:
    """Rotation matrix 3x3 about x, then y, then z."""
    return Rotation.from_euler("xyz", degrees, degrees=True).as_matrix()


def _centered_affine(shape: tuple[int, int, int], spacing: np.ndarray, rotation: np.ndarray) -> np.ndarray:
    """Affine index → RAS mm of a lattice whose middle lies at `SCANNER_CENTER`; `spacing` along (i, j, k)."""
    affine = np.eye(4)
    affine[:3, :3] = rotation @ np.diag(spacing)
    affine[:3, 3] = SCANNER_CENTER - affine[:3, :3] @ ((np.array(shape[::-1]) - 1) / 2)
    return affine


def _points(shape: tuple[int, int, int], affine: np.ndarray) -> Tensor:
    """RAS mm of every voxel center: float32 [3, K, J, I], component order (x, y, z)."""
    return torch.from_numpy(lattice_points(shape, affine)).float().movedim(-1, 0)


def _to_head(points: Tensor, wobble: Tensor) -> Tensor:
    """From RAS mm to the frame of `anatomy.paint`.

    `wobble` is a displacement in mm [3, n, n, n] every 4 mm of that frame, which makes the shapes irregular.
    """
    turn = _rotation(LATTICE_ANGLES) @ _rotation(HEAD_ANGLES)
    origin = SCANNER_CENTER + turn @ HEAD_OFFSET
    matrix = torch.from_numpy(turn.T.copy()).float()
    centered = points - torch.from_numpy(origin).float()[:, None, None, None]
    head = torch.einsum("ab,bkji->akji", matrix, centered)
    return head + sample(wobble, head.flip(0) / 4 + 31.5)


def _random_displacement(
    shape: tuple[int, int, int], spacing: float, weight: Tensor, mean: float, generator: torch.Generator
) -> Tensor:
    """Diffeomorphic displacement in voxels [3, K, J, I] of about `mean` mm on average where `weight` is 1."""
    coarse, fine = (smooth_noise(shape, wavelength / spacing, generator, 3) for wavelength in (56, 26))
    velocity = coarse + 0.6 * fine
    for axis, size in enumerate(shape):
        edge = torch.sin(torch.pi * (torch.arange(size) + 0.5) / size)
        window = (2 * edge).clamp(max=1).reshape([-1 if axis == other else 1 for other in range(3)])
        velocity = velocity * window
    length = velocity.square().sum(0).sqrt() * spacing
    velocity *= mean * weight.sum() / (length * weight).sum()
    displacement = integrate(velocity)
    while jacobian_determinant(displacement).min() < SMALLEST_DETERMINANT:
        velocity *= 0.93
        displacement = integrate(velocity)
    return displacement


def _acquire(image: Tensor, generator: torch.Generator, noise: float) -> np.ndarray:
    """Add what a scanner adds: a bias field of about ±12 % and Rician noise of this standard deviation."""
    bias = (0.12 * smooth_noise(image.shape, max(image.shape) / 2, generator)[0]).clamp(-0.3, 0.3).exp()
    real, imaginary = (noise * torch.randn(image.shape, generator=generator) for _ in range(2))
    return ((image * bias + real).square() + imaginary.square()).sqrt().numpy()


def make_pair(
    seed: int = 0,
    shape: tuple[int, int, int] = (96, 112, 96),
    spacing: float = 2.0,
    *,
    mean_displacement: float = 3.8,
    noise: float = 3.5,
    with_skull: bool = True,
    common_lattice: bool = True,
) -> PhantomPair:
    """A T1-like pair of heads with labels and the true deformation.

    `shape` (k, j, i) and `spacing` (mm, isotropic) of the fixed image; the head fills 190 x 220 x 190 mm.
    `mean_displacement` (mm) within the head; the deformation is smooth, diffeomorphic (its Jacobian
    determinant stays above 0.25) and fades towards the border of the lattice. `noise`: standard deviation
    on an intensity scale to about 200. Without skull, both images are 0 outside the brain. With
    `common_lattice` both images share one oblique, off-center lattice; else the moving image has another
    one: anisotropic, differently oblique, of another size. The same arguments give the same pair. Raises
    InputError for a shape below 16 voxels.
    """
    if min(shape) < 16:
        raise InputError(f"A phantom of {shape} voxels is too small; choose at least 16 along each axis.")
    generator = torch.Generator().manual_seed(seed)
    growth = 1.0 + 1.5 * torch.rand(2, generator=generator)
    anatomy = Anatomy(random_folds(generator), tuple(growth.tolist()))
    coarse, fine = (smooth_noise((64, 64, 64), wavelength, generator, 3) for wavelength in (12, 5))
    wobble = 2.3 * coarse + 0.7 * fine
    intensities = torch.tensor(T1_INTENSITIES)

    affine = _centered_affine(shape, np.full(3, spacing), _rotation(LATTICE_ANGLES))
    moving_shape, moving_affine = shape, affine
    if not common_lattice:
        stretch = np.array([0.94, 1.06, 1.3])
        k, j, i = (np.ceil(np.array(shape) / stretch[::-1]) + 3).astype(int).tolist()
        moving_shape = (k, j, i)
        moving_affine = _centered_affine(moving_shape, spacing * stretch, _rotation((-5.0, 7.0, -4.0)))

    fixed_points = _points(shape, affine)
    undeformed, _ = paint(_to_head(fixed_points, wobble), anatomy, intensities, 2 * spacing, with_skull=True)
    weight = (undeformed > 20).float()
    displacement = _random_displacement(shape, spacing, weight, mean_displacement, generator)
    physical = torch.einsum("ab,bkji->akji", torch.from_numpy(affine[:3, :3]).float(), displacement.flip(0))

    def volumes(points: Tensor, affine: np.ndarray, name: str) -> tuple[Volume, Volume]:
        image, structures = paint(_to_head(points, wobble), anatomy, intensities, spacing, with_skull)
        labels = structures.numpy()
        labels[labels == CEREBELLAR_WHITE_MATTER] = 11
        labels[labels > max(LABELS)] = 0
        array = _acquire(image, generator, noise)
        if not with_skull:
            array *= (image > T1_INTENSITIES[0]).numpy()
        return Volume(array, affine, name), Volume(labels, affine, f"{name} labels")

    fixed, fixed_labels = volumes(fixed_points + physical, affine, "phantom fixed")
    moving, moving_labels = volumes(_points(moving_shape, moving_affine), moving_affine, "phantom moving")
    deformation = Deformation(physical.movedim(0, -1).contiguous().numpy(), affine)
    return PhantomPair(fixed, moving, fixed_labels, moving_labels, deformation)
