"""A head made of formulas: label and T1-like intensity at any point in space. Nothing comes from patient data.

The head has its own frame: millimeters, x to the right, y to the front, z up (RAS), the origin near the
middle of the brain. Its shapes are signed distances (negative inside) of ellipsoids and bent tubes; the
folded cortex is the neighborhood of the zero level of a random field that hardly changes along the radius,
which gives sheets (the sulci) perpendicular to the surface. A deformed head is the same formula at deformed
points: exact, without interpolating an image.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from GradProjIOLib.spatial.sampling import sample

STRUCTURES = {
    0: ("air and everything else outside", 2.0),
    1: ("cerebral cortex", 96.0),
    2: ("cerebral white matter", 150.0),
    3: ("left lateral ventricle", 30.0),
    4: ("right lateral ventricle", 30.0),
    5: ("left thalamus", 126.0),
    6: ("right thalamus", 126.0),
    7: ("left putamen", 114.0),
    8: ("right putamen", 114.0),
    9: ("left caudate nucleus", 104.0),
    10: ("right caudate nucleus", 104.0),
    11: ("cerebellar cortex", 92.0),
    12: ("brain stem", 138.0),
    13: ("cerebellar white matter", 144.0),
    14: ("left hippocampus", 94.0),
    15: ("right hippocampus", 94.0),
    16: ("left pallidum", 134.0),
    17: ("right pallidum", 134.0),
    18: ("left amygdala", 96.0),
    19: ("right amygdala", 96.0),
    20: ("third ventricle", 30.0),
    21: ("fourth ventricle", 30.0),
    22: ("cerebrospinal fluid", 28.0),
    23: ("bone", 16.0),
    24: ("bone marrow", 105.0),
    25: ("fat and skin", 195.0),
    26: ("muscle", 80.0),
    27: ("eyes", 38.0),
}
"""Name of the structure of each label, and its mean intensity in a T1-weighted image, on a scale to about 200.

Left and right are the subject's.
"""
T1_INTENSITIES = [intensity for _, intensity in STRUCTURES.values()]

FOLD_WAVELENGTH = 23.0
FOLD_LATTICE_SPACING = 4.0
FOLD_LATTICE_SIZE = 48

BRAIN_LOW = (-75.0, -110.0, -62.0)
BRAIN_HIGH = (75.0, 75.0, 82.0)
HULL_CENTER = (0.0, -17.0, 8.0)
HULL_RADII = (67.0, 86.0, 68.0)


@dataclass(frozen=True)
class Anatomy:
    """What differs between two heads besides a smooth deformation."""

    folds: Tensor
    """Random field [n, n, n] whose zero level the sulci follow, from `random_folds`."""
    ventricle_growth: tuple[float, float]
    """By how many mm the left and the right lateral ventricle are inflated; 3 mm double their volume."""
    cortex_thickness: float = 3.0
    sulcus_width: float = 1.2
    sulcus_depth: float = 14.0
    shifts: dict[int, tuple[float, float, float]] = field(default_factory=dict)
    """Offset in mm of single structures, by label."""
    growth: dict[int, float] = field(default_factory=dict)
    """By how many mm single structures are inflated, by label."""


def random_folds(generator: torch.Generator, wavelength: float = FOLD_WAVELENGTH) -> Tensor:
    """A random field [n, n, n] with one dominant wavelength (mm) and a slope of about 1 per mm.

    Two sulci lie about half the wavelength apart.
    """
    size = FOLD_LATTICE_SIZE
    noise = torch.randn(size, size, size, generator=generator)
    frequency = torch.fft.fftfreq(size, d=FOLD_LATTICE_SPACING)
    radius = (frequency[:, None, None] ** 2 + frequency[None, :, None] ** 2 + frequency[None, None, :] ** 2).sqrt()
    ring = torch.exp(-(((radius * wavelength - 1) / 0.22) ** 2))
    folds = torch.fft.ifftn(torch.fft.fftn(noise) * ring).real
    slope = torch.stack(torch.gradient(folds, spacing=FOLD_LATTICE_SPACING)).square().sum(0).mean().sqrt()
    return folds / slope


@dataclass(frozen=True)
class _Canvas:
    """Image and labels under construction: every stroke covers what lies below it, with soft edges."""

    points: Tensor
    """x, y, z in mm: [3, D, H, W]."""
    intensities: Tensor
    edge: float
    image: Tensor
    labels: Tensor

    def crop(self, low: Sequence[float], high: Sequence[float]) -> _Canvas:
        """The part of the canvas that holds all points between the corners `low` and `high` (mm).

        Where it is has been looked up in every fourth voxel, which is enough for smooth deformations.
        """
        margin = 3 * self.edge
        inside = torch.ones_like(self.image[::4, ::4, ::4], dtype=torch.bool)
        for coordinate, lower, upper in zip(self.points[:, ::4, ::4, ::4], low, high, strict=True):
            inside &= (coordinate > lower - margin) & (coordinate < upper + margin)
        window = tuple(
            slice(max(0, 4 * int(hits.min()) - 4), 4 * int(hits.max()) + 5) if len(hits) else slice(0)
            for hits in inside.nonzero().T
        )
        points = self.points[:, *window].contiguous()
        return _Canvas(points, self.intensities, self.edge, self.image[window], self.labels[window])

    def stroke(self, label: int, distance: Tensor) -> None:
        """Paint the shape with this signed distance (mm) in the structure's label and intensity.

        A voxel is covered by the part of it inside the shape: a ramp as wide as the edge around distance 0.
        """
        cover = (0.5 - distance / self.edge).clamp_(0, 1)
        self.labels.masked_fill_(cover > 0.5, label)
        self.image.add_(cover.mul_(self.intensities[label] - self.image))

    def ellipsoid(self, label: int, center: tuple[float, ...], radii: tuple[float, ...]) -> None:
        """Paint an axis-aligned ellipsoid."""
        x, y, z = self.points
        self.stroke(label, _ellipsoid(x, y, z, center, radii))

    def tube(self, label: int, path: list[tuple[float, float, float, float]]) -> None:
        """Paint a bent tube through (x, y, z, radius) knots."""
        x, y, z = self.points
        self.stroke(label, _tube(x, y, z, path))


def _ellipsoid(x: Tensor, y: Tensor, z: Tensor, center: tuple, radii: tuple) -> Tensor:
    """Signed distance of an axis-aligned ellipsoid, exact at its surface to first order."""
    a, b, c = ((p - m) / r for p, m, r in zip((x, y, z), center, radii, strict=True))
    scaled = (a * a + b * b + c * c).sqrt()
    slope = ((a / radii[0]) ** 2 + (b / radii[1]) ** 2 + (c / radii[2]) ** 2).sqrt()
    return scaled * (scaled - 1) / (slope + 1e-6)


def _tube(x: Tensor, y: Tensor, z: Tensor, path: list[tuple[float, float, float, float]]) -> Tensor:
    """Signed distance of a bent tube through (x, y, z, radius) knots."""
    distances = []
    for start, end in itertools.pairwise(path):
        direction = [e - s for s, e in zip(start, end, strict=True)]
        length = sum(d * d for d in direction[:3])
        a, b, c = x - start[0], y - start[1], z - start[2]
        along = ((a * direction[0] + b * direction[1] + c * direction[2]) / length).clamp_(0, 1)
        offsets = (p - along * d for p, d in zip((a, b, c), direction[:3], strict=True))
        distances.append(sum(offset * offset for offset in offsets).sqrt() - (start[3] + along * direction[3]))
    return functools.reduce(torch.minimum, distances)


def _merge(first: Tensor, second: Tensor, blend: float) -> Tensor:
    """Union of two shapes whose seam is rounded over `blend` mm."""
    seam = (blend - (first - second).abs()).clamp(min=0)
    return torch.minimum(first, second) - seam * seam / (4 * blend)


def _cerebrum(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    narrowed = x * (1 + 0.0014 * (y + 30))
    dome = _ellipsoid(narrowed, y, z, HULL_CENTER, HULL_RADII)
    base = -(z + 17 - 0.05 * y - 0.0016 * (y + 10) ** 2 + 4 * torch.cos(0.09 * x))
    dome = -_merge(-dome, -base, 22.0)
    side = x.abs()
    temporal = _ellipsoid(side, y, z + 0.15 * (y + 8), (44.0, -12.0, -20.0), (21.0, 46.0, 23.0))
    return _merge(dome, temporal, 6.0)


def _cerebellum(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    return _merge(
        _ellipsoid(x.abs(), y, z, (23.0, -63.0, -39.0), (28.0, 27.0, 20.0)),
        _ellipsoid(x, y, z, (0.0, -58.0, -36.0), (14.0, 26.0, 22.0)),
        8.0,
    )


STEM = [
    (0.0, -19.0, -6.0, 13.0),
    (0.0, -24.0, -18.0, 12.0),
    (0.0, -24.0, -31.0, 14.5),
    (0.0, -34.0, -52.0, 9.0),
    (0.0, -41.0, -78.0, 6.0),
    (0.0, -44.0, -130.0, 5.5),
]


def _fissures(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Distance to the fissure between the hemispheres and to the Sylvian fissures."""
    core = _ellipsoid(x, y, z, (0.0, -14.0, 2.0), (40.0, 44.0, 25.0))
    middle = x + 1.2 * torch.sin(0.06 * y + 1.0)
    between = (middle * middle + (-core).clamp_(min=0) ** 2).sqrt_() - 0.3
    side = x.abs()
    rise = z - (0.38 * (y + 10) - 4 + 0.12 * (side - 45) + (0.8 * torch.sign(x)))
    outside = (34 - side).clamp_(min=0) ** 2 + (-38 - y).clamp_(min=0) ** 2 + (y - 24).clamp_(min=0) ** 2
    lateral = (rise * rise + outside).sqrt_()
    return torch.minimum(between, lateral)


def _sample_folds(x: Tensor, y: Tensor, z: Tensor, folds: Tensor) -> Tensor:
    """Distance (mm) to the zero level of the random field around the origin of the head's frame."""
    if not x.numel():
        return x
    extent = FOLD_LATTICE_SPACING * (FOLD_LATTICE_SIZE - 1) / 2
    grid = torch.stack([x, y, z], dim=-1) / extent
    return sample(folds[None, None], grid[None], "reflection")[0, 0].abs()


def _sulci(x: Tensor, y: Tensor, z: Tensor, depth: Tensor, anatomy: Anatomy) -> Tensor:
    """Distance (mm) to the nearest sulcal sheet, given the depth under the surface."""
    directions = [(p - c) / r for p, c, r in zip((x, y, z), HULL_CENTER, HULL_RADII, strict=True)]
    radius = sum(d * d for d in directions).sqrt_()
    # Along the radius the field is stretched, so that its zero level stands upright on the surface.
    stretch = (0.62 + 0.38 * radius) / (radius + 0.05)
    right, front, up = (stretch * d * r for d, r in zip(directions, HULL_RADII, strict=True))
    sheet = _sample_folds(right, front, up, anatomy.folds)
    beyond = torch.maximum(depth - anatomy.sulcus_depth, 70 * (0.52 - radius)).clamp_(min=0)
    return (sheet * sheet + beyond * beyond).sqrt_()


def _paint_outside(canvas: _Canvas, cavity: Tensor, anatomy: Anatomy) -> None:
    """Scalp, face, neck and skull around the cavity of the brain (signed distance, mm)."""
    x, y, z = canvas.points
    face = _ellipsoid(x, y, z, (0.0, 40.0, -62.0), (56.0, 48.0, 66.0))
    neck = _tube(x, y, z, [(0.0, -30.0, -70.0, 52.0), (0.0, -38.0, -140.0, 54.0)])
    nose = _tube(x, y, z, [(0.0, 80.0, -30.0, 5.0), (0.0, 97.0, -52.0, 8.0)])
    head = _merge(_merge(_merge(cavity - 13, face, 26.0), neck, 30.0), nose, 10.0)
    muscle = torch.maximum(head + 6, (z + 12 + 0.25 * y) * 0.9)
    septa = 0.4 * _sample_folds(x, y, z, anatomy.folds) + 0.3
    canvas.stroke(25, head)
    canvas.stroke(26, muscle)
    canvas.stroke(25, torch.maximum(muscle, septa))
    canvas.stroke(23, cavity - 8.5)
    canvas.stroke(24, torch.maximum((cavity - 5.2).abs() - 1.4, -18 - z))
    for side in (-1, 1):
        canvas.ellipsoid(25, (31.0 * side, 58.0, -27.0), (17.0, 24.0, 16.0))
        canvas.ellipsoid(27, (32.0 * side, 69.0, -27.0), (12.0, 12.0, 12.0))
        canvas.ellipsoid(0, (28.0 * side, 58.0, -56.0), (11.0, 15.0, 12.0))
    canvas.ellipsoid(0, (0.0, 54.0, -52.0), (6.0, 28.0, 18.0))
    canvas.tube(0, [(0.0, 22.0, -66.0, 6.0), (0.0, 6.0, -90.0, 6.0), (0.0, 6.0, -140.0, 7.0)])
    arch = _ellipsoid(x, y, z, (0.0, 34.0, -92.0), (44.0, 44.0, 30.0)).abs() - 4
    canvas.stroke(23, torch.maximum(torch.maximum(arch, 6 - x.abs()), 22 - y))
    canvas.tube(23, [(0.0, -24.0, -76.0, 11.5), (0.0, -26.0, -140.0, 12.5)])
    canvas.tube(24, [(0.0, -24.0, -76.0, 9.0), (0.0, -26.0, -140.0, 10.0)])
    canvas.tube(22, [(0.0, -40.0, -66.0, 11.0), (0.0, -45.0, -140.0, 9.0)])


def _paint_cerebrum(canvas: _Canvas, anatomy: Anatomy) -> None:
    """White matter, cortical ribbon and the fluid in the sulci."""
    part = canvas.crop((-75, -110, -50), (75, 75, 82))
    x, y, z = part.points
    hull, fissure = _cerebrum(x, y, z), _fissures(x, y, z)
    sulcus = _sulci(x, y, z, torch.minimum(-hull, fissure), anatomy)
    pial = torch.minimum(torch.minimum(sulcus, fissure) - anatomy.sulcus_width / 2, -hull)
    part.stroke(2, hull)
    part.stroke(1, torch.maximum(pial - anatomy.cortex_thickness, hull))
    part.stroke(22, torch.maximum(pial, hull))


def _paint_cerebellum(canvas: _Canvas) -> None:
    part = canvas.crop((-56, -96, -64), (56, -28, -10))
    x, y, z = part.points
    hull = _cerebellum(x, y, z)
    leaves = torch.sin(16 * torch.atan2(z + 34, y + 36) + 0.05 * x)
    part.stroke(22, hull - 2.5)
    part.stroke(11, hull)
    part.stroke(13, hull + 8.0 + 3.5 * leaves)


# Label and signed distance of the deep structures of the left side; the label of the right one is the next. x grows
# away from the middle. `bulge` (mm): how far the lateral ventricle is inflated; the nuclei beside it give way.
PAIRED: list[tuple[int, Callable[[Tensor, Tensor, Tensor, float], Tensor]]] = [
    (7, lambda x, y, z, bulge: _ellipsoid(
        x - 0.22 * (4 - y) - 0.6 * bulge, y, z, (26.0, 3.0, 1.0), (6.0, 16.0, 10.5))),
    (16, lambda x, y, z, bulge: _ellipsoid(
        x - 0.3 * (0 - y) - 0.6 * bulge, y, z, (19.0, -2.0, -1.0), (4.5, 10.0, 7.0))),
    (5, lambda x, y, z, bulge: _ellipsoid(
        x + 0.25 * (y + 17) - 0.4 * (0.6 * bulge), y, z, (11.0, -17.0, 7.0), (8.5, 15.0, 9.0))),
    (9, lambda x, y, z, bulge: _tube(x - 0.6 * bulge, y, z, [
        (13.5, 18.0, 1.0, 6.5), (14.5, 9.0, 10.0, 5.8), (17.5, -8.0, 18.0, 4.2),
        (23.0, -26.0, 16.0, 2.8)])),
    (14, lambda x, y, z, _: _tube(x, y, z, [
        (24.0, -9.0, -21.0, 6.0), (30.0, -22.0, -15.0, 5.0), (26.0, -36.0, -3.0, 3.8)])),
    (18, lambda x, y, z, _: _ellipsoid(x, y, z, (22.0, -1.0, -20.0), (8.0, 7.5, 7.5))),
    (3, lambda x, y, z, bulge: torch.minimum(
        _tube(x, y, z, [
            (11.0, 32.0, 3.0, 3.0), (7.5, 20.0, 11.0, 4.5), (7.5, -6.0, 19.5, 4.2),
            (14.0, -30.0, 16.0, 5.5), (24.0, -43.0, 6.0, 5.5), (24.0, -64.0, 5.0, 2.0)]),
        _tube(x, y, z, [(24.0, -43.0, 6.0, 5.0), (33.0, -26.0, -10.0, 2.4), (31.0, -10.0, -18.0, 1.6)]),
    ) - bulge),
]  # fmt: skip


def _paint_deep(canvas: _Canvas, anatomy: Anatomy) -> None:
    """Ventricles and deep nuclei."""
    for side, bulge in zip((-1, 1), anatomy.ventricle_growth, strict=True):
        inner, outer = sorted((-4.0 * side, 48.0 * side))
        half = canvas.crop((inner, -76, -34), (outer, 44, 34))
        for left, distance in PAIRED:
            label = left + (side > 0)
            shift = anatomy.shifts.get(label, (0.0, 0.0, 0.0))
            x, y, z = (p - offset for p, offset in zip(half.points, shift, strict=True))
            half.stroke(label, distance(x * side, y, z, bulge) - anatomy.growth.get(label, 0.0))
    bulge = 0.17 * sum(anatomy.ventricle_growth)
    canvas.ellipsoid(20, (0.0, -10.0, 1.0), (1.8 + bulge, 14.0 + bulge, 10.0 + bulge))
    canvas.ellipsoid(21, (0.0, -41.0, -34.0), (6.0 + bulge, 5.0 + bulge, 9.0 + bulge))


def paint(
    points: Tensor, anatomy: Anatomy, intensities: Tensor, edge: float, with_skull: bool
) -> tuple[Tensor, Tensor]:
    """Intensity and label of the head at the given points.

    `points` float32 [3, D, H, W]: x, y, z in mm of the head's frame; `intensities` [28]: one per label, as
    `T1_INTENSITIES`; `edge`: width in mm of the soft edges, best the voxel's size; without skull,
    everything outside the brain and the fluid in it is 0, like after brain extraction.
    Returns the image (float32) and the labels (uint8), both [D, H, W].
    """
    image = torch.full(points.shape[1:], float(intensities[0]))
    canvas = _Canvas(points, intensities, edge, image, torch.zeros(image.shape, dtype=torch.uint8))
    brain = canvas if with_skull else canvas.crop(BRAIN_LOW, BRAIN_HIGH)
    x, y, z = brain.points
    stem = _tube(x, y, z, STEM) - anatomy.growth.get(12, 0.0)
    if with_skull:
        cavity = _merge(_merge(_cerebrum(x, y, z), _cerebellum(x, y, z), 12.0), stem, 8.0) - 3.0
        _paint_outside(canvas, cavity, anatomy)
        canvas.stroke(22, cavity)
    else:
        stem = torch.maximum(stem, BRAIN_LOW[2] - z)
    _paint_cerebellum(brain)
    _paint_cerebrum(brain, anatomy)
    brain.stroke(12, stem)
    _paint_deep(brain, anatomy)
    return canvas.image, canvas.labels
