"""Pairs of synthetic images to train on: no patient data, a new pair for every seed.

In the spirit of Hoffmann et al., SynthMorph: learning contrast-invariant registration without acquired
images, IEEE TMI 2022: label maps of random smooth shapes, and here also heads made of formulas (`anatomy.py`),
get random intensities, and two instances of the same map, deformed by different random diffeomorphisms, are
imaged with different bias, blur, resolution and noise. The two heads of a pair also differ in what no smooth
deformation explains: folds of the cortex, size of the ventricles, size and place of nuclei.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from scipy import ndimage
from scipy.spatial.transform import Rotation
from torch import Tensor
from torch.nn import functional

from GradProjIOLib.synthetic.anatomy import T1_INTENSITIES, Anatomy, paint, random_folds
from GradProjIOLib.synthetic.random_fields import identity_points, integrate, resize, sample, smooth_noise

HEADS = 0.8
"""Probability of a pair of heads; the others are of random shapes."""
WITH_SKULL = 0.15
MISALIGNED = 0.1
"""Probability that the two images are not well aligned affinely."""
CONTRASTS = {"t1": 0.65, "inverted": 0.15, "random": 0.2}
LOW_RESOLUTION = 0.1
PERCENTILE = 0.99
"""Intensities above this part of all voxels are clipped, as for MRI before a registration."""

# Middle and extent (mm) along (x, y, z) of what is shown, in the frame of the head.
BRAIN = ((0.0, -17.0, 7.0), (134.0, 174.0, 138.0))
HEAD = ((0.0, -9.0, -4.0), (164.0, 216.0, 186.0))
LAST_NUCLEUS = 19
NUCLEI = [5, 6, 7, 8, 9, 10, 12, 14, 15, 16, 17, 18, 19]


class TrainingPair(NamedTuple):
    """Two images float32 [1, D, H, W] in [0, 1], and label maps (integers, [1, D, H, W]) where there are any.

    Equal labels are corresponding structures, 0 is background.
    """

    fixed: Tensor
    moving: Tensor
    fixed_labels: Tensor | None = None
    moving_labels: Tensor | None = None


class _Draw:
    """Random numbers from one seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=self.generator))

    def chance(self, probability: float) -> bool:
        return self.uniform(0, 1) < probability

    def integer(self, low: int, high: int) -> int:
        """From low to high, both included."""
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def uniforms(self, low: float, high: float, count: int = 3) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=self.generator)

    def normals(self, spread: float, *shape: int) -> Tensor:
        return spread * torch.randn(shape, generator=self.generator)


def synthetic_pair(seed: int, lattice: Sequence[int] = (96, 112, 80)) -> TrainingPair:
    """Two images of one label map in different shape, to be registered with each other.

    `lattice` (D, H, W): its axes run up, to the front and to the subject's right, as those of arrays [k, j, i] of
    an image in RAS order. Intensities are in [0, 1], and background is 0 in most pairs. Labels (uint8) are those of
    `anatomy.STRUCTURES` in heads.
    """
    draw = _Draw(seed)
    make = _heads if draw.chance(HEADS) else _shapes
    (fixed, fixed_labels), (moving, moving_labels) = make(draw, lattice)
    return TrainingPair(fixed[None], moving[None], fixed_labels[None], moving_labels[None])


def _affine_change(draw: _Draw, degrees: float, scale: float, shift: float) -> tuple[Tensor, Tensor]:
    """Random matrix 3x3 near the identity (rotation, scale, a little shear) and shift in mm."""
    rotation = Rotation.from_rotvec(draw.normals(degrees, 3).numpy(), degrees=True).as_matrix()
    stretch = torch.diag(1 + draw.normals(scale, 3)) + 0.3 * draw.normals(scale, 3, 3)
    return torch.from_numpy(rotation).float() @ stretch, draw.normals(shift, 3)


def _placement(
    draw: _Draw, lattice: Sequence[int], shown: tuple[tuple[float, ...], tuple[float, ...]]
) -> tuple[Tensor, Tensor, float]:
    """Matrix 3x3 and offset from index (d, h, w) to mm of the head's frame, and the voxel's mean size.

    Voxels are nearly isotropic, and as large as the extent needs with a random margin.
    """
    center, extent = (torch.tensor(values) for values in shown)
    size = torch.tensor(lattice, dtype=torch.float32)
    tight = extent.flip(0) / size
    spacing = tight.max() ** (1 - (mix := draw.uniform(0, 0.5))) * tight**mix * draw.uniform(1.02, 1.25)
    change, shift = _affine_change(draw, degrees=3.0, scale=0.03, shift=2.5)
    matrix = change @ torch.diag(spacing).flip(0)
    return matrix, center + shift - matrix @ ((size - 1) / 2), float(spacing.log().mean().exp())


def _velocity(draw: _Draw, lattice: Sequence[int], strength: float) -> Tensor:
    """Random velocity field on a third of the lattice, in its voxels: [3, d, h, w].

    Three wavelengths with random shares; `strength` is the typical displacement as a part of the lattice.
    """
    coarse = [-(-length // 3) for length in lattice]
    size = sum(coarse) / 3
    velocity = torch.zeros(3, *coarse)
    for wavelength, share in ((0.5, 0.5), (0.25, 0.3), (0.12, 0.12)):
        amplitude = share * strength * size * draw.uniform(0.5, 1.5)
        velocity += amplitude * smooth_noise(coarse, wavelength * size, draw.generator, 3)
    return velocity


def _moved_points(velocity: Tensor, lattice: Sequence[int]) -> Tensor:
    """Index coordinates [3, D, H, W] moved by the diffeomorphism of a velocity field on a coarser lattice."""
    factors = torch.tensor([full / part for full, part in zip(lattice, velocity.shape[1:], strict=True)])
    displacement = integrate(velocity, squarings=5) * factors[:, None, None, None]
    return identity_points(lattice) + resize(displacement, lattice)


def _heads(draw: _Draw, lattice: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """Two images of heads and their labels."""
    with_skull = draw.chance(WITH_SKULL)
    matrix, offset, voxel = _placement(draw, lattice, HEAD if with_skull else BRAIN)
    residual = 4.0 if draw.chance(MISALIGNED) else 1.0
    contrast = _head_contrast(draw)
    subject = _family(draw)
    velocity = _velocity(draw, lattice, 0.03)
    strength = draw.uniform(0.008, 0.022)
    blur = draw.uniform(-0.5, 0.8)
    for _ in range(2):
        change, shift = _affine_change(draw, degrees=residual, scale=0.012 * residual, shift=residual)
        index = _moved_points(velocity + _velocity(draw, lattice, strength), lattice)
        points = change @ matrix @ index.reshape(3, -1) + (change @ offset + shift)[:, None]
        anatomy = subject()
        intensities = contrast * (1 + draw.normals(0.04, len(contrast)))
        edge = voxel * draw.uniform(0.8, 1.4)
        image, structures = paint(points.reshape(index.shape), anatomy, intensities, edge, with_skull)
        yield _acquire(draw, image, None if with_skull else structures > 0, blur), structures


def _family(draw: _Draw) -> Callable[[], Anatomy]:
    """Draws what the two subjects of a pair have in common; returns a function that draws one of them."""
    wavelength = draw.uniform(18.0, 29.0)
    common_folds = random_folds(draw.generator, wavelength)
    agreement = draw.uniform(0.5, 1.0)
    thickness, depth = draw.uniform(2.4, 3.8), draw.uniform(10.0, 20.0)
    common_shifts = draw.normals(1.5, LAST_NUCLEUS + 1, 3)
    common_growth = draw.normals(0.8, LAST_NUCLEUS + 1)

    def subject() -> Anatomy:
        # The older, the more fluid and the thinner the cortex.
        age = draw.uniform(0, 1)
        own_folds = random_folds(draw.generator, wavelength)
        shifts = common_shifts + draw.normals(0.5, LAST_NUCLEUS + 1, 3)
        growth = common_growth + draw.normals(0.3, LAST_NUCLEUS + 1)
        return Anatomy(
            folds=agreement * common_folds + (1 - agreement**2) ** 0.5 * own_folds,
            ventricle_growth=tuple((0.3 + 4.5 * age * draw.uniform(0.4, 1.0) + draw.normals(0.3, 2)).tolist()),
            cortex_thickness=thickness - 0.4 * age,
            sulcus_width=0.4 + 1.8 * age * draw.uniform(0.4, 1.0),
            sulcus_depth=depth,
            shifts={label: tuple(shifts[label].tolist()) for label in NUCLEI},
            growth={label: float(growth[label]) for label in NUCLEI},
        )

    return subject


def _head_contrast(draw: _Draw) -> Tensor:
    """Mean intensity of every structure: T1-like, T1 inverted within the head, or random by tissue."""
    base = torch.tensor(T1_INTENSITIES)
    drawn = torch.multinomial(torch.tensor(list(CONTRASTS.values())), 1, generator=draw.generator)
    name = list(CONTRASTS)[int(drawn)]
    if name == "inverted":
        base[1:] = 225.0 - base[1:]
        base[23] = T1_INTENSITIES[23]
    if name == "random":
        # Structures of equal T1 intensity get one new intensity: they are the same tissue.
        tissues, tissue_of = base.unique(return_inverse=True)
        base = draw.uniforms(20.0, 220.0, len(tissues))[tissue_of]
        base[0] = T1_INTENSITIES[0]
    return base * (1 + draw.normals(0.06, len(base)))


def _shapes(draw: _Draw, lattice: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """Two images of shapes and their labels.

    Labels are the cells between the level sets of two smooth random fields, often within one big blob.
    """
    levels = (draw.integer(4, 5), draw.integer(4, 5))
    size = sum(lattice) / 3
    fields = torch.cat(
        [smooth_noise(lattice, size * draw.uniform(0.12, 0.4), draw.generator) for _ in levels]
        + [_blob(draw, lattice) if draw.chance(0.7) else torch.ones(1, *lattice)]
    )
    intensities = draw.uniforms(0.0, 200.0, levels[0] * levels[1] + 1)
    intensities[0] = 2.0
    detail = draw.uniform(0.0, 0.15)
    strength = draw.uniform(0.015, 0.05)
    blur = draw.uniform(0.4, 0.9)
    for _ in range(2):
        instance = sample(fields, _moved_points(_velocity(draw, lattice, strength), lattice))
        instance += detail * smooth_noise(lattice, 0.15 * size, draw.generator)
        cells = [_cells(field, count) for field, count in zip(instance, levels, strict=False)]
        structures = (1 + cells[0] + levels[0] * cells[1]).masked_fill_(instance[2] < 0, 0)
        varied = intensities * (1 + draw.normals(0.04, len(intensities)))
        image = varied[structures.long()]
        inside = structures > 0 if draw.chance(0.7) else None
        yield _acquire(draw, image, inside, blur), structures


def _blob(draw: _Draw, lattice: Sequence[int]) -> Tensor:
    """A field [1, D, H, W] that is positive within a dented ball."""
    axes = [torch.linspace(-1, 1, size) for size in lattice]
    radii = draw.uniforms(0.65, 1.0)
    square = [(axis / radius) ** 2 for axis, radius in zip(axes, radii.tolist(), strict=True)]
    radius = square[0][:, None, None] + square[1][:, None] + square[2]
    dents = smooth_noise(lattice, sum(lattice) / 3 * draw.uniform(0.2, 0.5), draw.generator)
    return 1 - radius[None] + 0.25 * dents


def _cells(field: Tensor, count: int) -> Tensor:
    """Index 0 … count − 1 (uint8) of equally probable intervals of standard normal noise."""
    return torch.bucketize(field, torch.special.ndtri(torch.arange(1, count) / count)).to(torch.uint8)


def _acquire(draw: _Draw, image: Tensor, inside: Tensor | None, blur: float) -> Tensor:
    """What scanner and preprocessing do to an image: [D, H, W] → float32 in [0, 1], 0 outside.

    `blur`: about the standard deviation of the blur in voxels; there is none where it is negative.
    """
    spread = blur + draw.uniform(-0.2, 0.2)
    if spread >= 0.2:
        image = torch.from_numpy(ndimage.gaussian_filter(image.numpy(), spread, mode="constant", radius=2))
    if draw.chance(LOW_RESOLUTION):
        image = _thick_slices(draw, image)
    wavelength = max(image.shape) * draw.uniform(0.3, 0.7)
    bias = smooth_noise(image.shape, wavelength, draw.generator)[0]
    image = image * (draw.uniform(0.02, 0.18) * bias).exp_()
    grain = torch.randn(image.shape, generator=draw.generator)
    image = (image + grain * draw.uniform(0.5, 7.0)).abs_()
    if inside is not None:
        image = image * inside
    # Clip to [minimum, 99th percentile] and scale to [0, 1], by the look of every 27th voxel.
    few = image[::3, ::3, ::3].flatten()
    low, high = few.min(), few.kthvalue(round(PERCENTILE * few.numel())).values
    image = ((image - low) / (high - low).clamp(min=1e-6)).clamp_(0, 1)
    return image.pow_(draw.uniform(0.8, 1.25))


def _thick_slices(draw: _Draw, image: Tensor) -> Tensor:
    """Average slices along one axis, as if they had been two to four times as thick."""
    axis = draw.integer(0, 2)
    reduced = list(image.shape)
    reduced[axis] = max(4, round(reduced[axis] / draw.uniform(1.5, 3.5)))
    averaged = functional.adaptive_avg_pool3d(image[None], (reduced[0], reduced[1], reduced[2]))
    return resize(averaged, image.shape)[0]
