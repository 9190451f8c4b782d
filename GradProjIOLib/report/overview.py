"""The picture that sums up one registration: three slices of the images, the differences, the determinant."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from GradProjIOLib.geometry.lattice import apply_matrix
from GradProjIOLib.geometry.volume import Volume, in_ras_order
from GradProjIOLib.report.canvas import new_figure
from GradProjIOLib.report.colors import FOLD_COLOR, determinant_colors, scale_colors, tick_labels
from GradProjIOLib.report.orientation import to_anatomical, worst_fold
from GradProjIOLib.report.steps import draw_steps

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from GradProjIOLib.spatial.deformation import Deformation

DIFFERENCE_COLORS = "magma"
DOTS_PER_INCH = 110
IMAGES = ("Fixed", "Moving, before", "Moving, warped")
DIFFERENCES = ("|Difference| before", "|Difference| after")
CHECKERBOARDS = ("Fixed and moving, before", "Fixed and moving, after")
SQUARES = 8
"""Of a checkerboard along the longest axis of what is shown."""


class _View(NamedTuple):
    """One orthogonal slice. Both axes on screen grow to the left and upwards, the radiological convention."""

    name: str
    through: int
    horizontal: int
    vertical: int


VIEWS = (_View("Axial", 2, 0, 1), _View("Coronal", 1, 0, 2), _View("Sagittal", 0, 1, 2))
DIRECTIONS = (("L", "R"), ("P", "A"), ("I", "S"))


class _Frame(NamedTuple):
    """What all panels share. Axes are 0 (right), 1 (anterior), 2 (superior).

    affine: index → RAS mm. low, high: the first and one past the last index of what is shown. position: the index
    that the slices go through.
    """

    affine: np.ndarray
    low: np.ndarray
    high: np.ndarray
    position: np.ndarray

    @property
    def spacing(self) -> np.ndarray:
        """Distance between the samples in mm."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)

    def slice(self, array: np.ndarray, view: _View) -> np.ndarray:
        """The view's slice of an array as rows from bottom to top: [vertical, horizontal, …]."""
        part: list[slice | int] = [slice(*bounds) for bounds in zip(self.low, self.high, strict=True)]
        part[view.through] = int(self.position[view.through])
        return np.swapaxes(array[tuple(part)], 0, 1)[:, ::-1]

    @property
    def extent(self) -> np.ndarray:
        """Lengths in mm of the part shown."""
        return (self.high - self.low) * self.spacing


def _window(array: np.ndarray) -> tuple[float, float]:
    """Intensities shown as black and white: the first to the 99.5th percentile of what is not background."""
    low = float(array.min())
    array = array[::2, ::2, ::2]
    values = array[array > low + 0.02 * (np.percentile(array, 99.5) - low)]
    return low, float(np.percentile(values, 99.5)) if values.size else low + 1


def _frame(affine: np.ndarray, foreground: np.ndarray, determinant: np.ndarray, folded: np.ndarray) -> _Frame:
    """Slices through the worst fold, else through the middle of the foreground."""
    from scipy import ndimage

    shape = np.array(folded.shape)
    position = shape // 2
    if folded.any():
        position = worst_fold(determinant, folded)
    elif foreground.any():
        position = np.round(ndimage.center_of_mass(foreground)).astype(int)
    boxes = ndimage.find_objects((foreground | folded).astype(np.uint8)) or [[slice(0, size) for size in shape]]
    low, high = np.array([[part.start, part.stop] for part in boxes[0]]).T
    margin = np.ceil(0.04 * (high - low)).astype(int)
    return _Frame(affine, np.maximum(low - margin, 0), np.minimum(high + margin, shape), position)


def draw_overview(
    fixed: Volume,
    moved_before: Volume,
    warped: Volume,
    determinant: np.ndarray,
    folded: np.ndarray,
    steps: Sequence[Mapping[str, Any]],
    title: str,
    deformation: Deformation | None = None,
    one_kind: bool = True,
) -> Figure:
    """The picture of one registration as a matplotlib figure.

    Three orthogonal slices (radiological convention, along the fixed image's axes, through the worst fold or
    the middle of the foreground) of the fixed image, the moving image before and after the deformation, the
    differences to the fixed image and the Jacobian determinant; below them the losses of the steps.

    one_kind: whether the images have the same contrasts. Else differences say little, and there are checkerboards of
    the fixed and the moving image in their place.

    `moved_before` (the moving image as the initial alignment places it), `warped`, `determinant` and the mask
    `folded` are all on the fixed image's lattice [k, j, i]. `steps` are those of report.json; none for direct
    inference. With `deformation` (fixed → moving, RAS mm), the lines of a regular grid of the moving image are drawn
    into the determinant map. Raises ValueError where the shapes differ.
    """
    for name, array in (("moved_before", moved_before.array), ("warped", warped.array),
                        ("determinant", determinant), ("folded", folded)):  # fmt: skip
        if array.shape != fixed.shape:
            raise ValueError(f"expected {name} on the lattice {fixed.shape} of fixed, found {array.shape}")
    folded = folded | (determinant <= 0)
    volumes, moving_window = (fixed, moved_before, warped), _window(moved_before.array)
    images = [
        to_anatomical(np.clip((volume.array.astype(np.float32) - low) / (high - low), 0, 1), fixed.affine)
        for volume, (low, high) in zip(volumes, (_window(fixed.array), moving_window, moving_window), strict=True)
    ]
    determinant, folded = (to_anatomical(array, fixed.affine) for array in (determinant, folded))
    foreground = np.maximum.reduce(images) > 0.08
    frame = _frame(in_ras_order(fixed)[0].affine, foreground, determinant, folded)
    if one_kind:
        compared = [np.abs(image - images[0]) for image in images[1:]]
        means = [float(difference[foreground].mean()) if foreground.any() else 0.0 for difference in compared]
        titles, notes = DIFFERENCES, [f"mean {mean:.3f}" for mean in means]
        scale = {"cmap": DIFFERENCE_COLORS, "vmax": max(float(np.percentile(compared[0][::2, ::2, ::2], 99.5)), 0.05)}
    else:
        squares = _checkerboard(frame, images[0].shape)
        compared = [np.where(squares, images[0], image) for image in images[1:]]
        titles, notes, scale = CHECKERBOARDS, ["", "edges should meet"], {"cmap": "gray", "vmax": 1}

    footer = 3.55 if steps else 1.35
    figure, panels = _layout(frame, title, footer)
    names = [_shorten(Path(volume.name).name) for volume in volumes]
    notes = [*names, *notes, f"{determinant.min():.2f} to {determinant.max():.2f}"]
    for axes, column, note in zip(panels[0], (*IMAGES, *titles, "Jacobian determinant"), notes, strict=True):
        axes.set_title(f"{column}\n{note}", fontsize=11, parse_math=False)
    scales = [{"cmap": "gray", "vmax": 1}] * 3 + [scale] * 2
    for row, view in zip(panels, VIEWS, strict=True):
        for axes, image, scale in zip(row, (*images, *compared), scales, strict=False):
            _show(axes, frame, view, frame.slice(image, view), vmin=0, **scale)
        plane = frame.slice(folded, view)
        _show(row[5], frame, view, determinant_colors(frame.slice(determinant, view), plane))
        _outline(row[5], plane)
        if deformation is not None:
            _draw_grid(row[5], frame, view, deformation)
        if folded.any():
            _ring(row[2], frame, view)
            _ring(row[5], frame, view)
        _letter(row[0], view)
    _draw_legends(figure, footer, panels[2], folded, one_kind)
    draw_steps(figure, footer, steps)
    return figure


def _checkerboard(frame: _Frame, shape: tuple[int, ...]) -> np.ndarray:
    """Where the fixed image is shown: every second cube of edge length extent / SQUARES, in mm."""
    edge = frame.extent.max() / SQUARES
    cubes = [((np.arange(n) - low) * d // edge) for n, low, d in zip(shape, frame.low, frame.spacing, strict=True)]
    return np.add.outer(np.add.outer(cubes[0], cubes[1]), cubes[2]) % 2 == 0


def _shorten(name: str, longest: int = 26) -> str:
    return name if len(name) <= longest else f"{name[: longest - 11]}…{name[-10:]}"


def _layout(frame: _Frame, title: str, footer: float) -> tuple[Figure, np.ndarray]:
    """Figure and panels [row, column] at one scale, with `footer` inches left below them."""
    title = textwrap.fill(title, 145, break_on_hyphens=False)
    left, right, gap, top = 0.75, 0.2, 0.1, 0.95 + 0.23 * title.count("\n")
    widest = max(frame.extent[view.horizontal] for view in VIEWS)
    tallest = max(frame.extent[view.vertical] for view in VIEWS)
    inches = min(2.6 / widest, 3.4 / tallest)
    column_width = max(widest * inches, 2.1)
    heights = [frame.extent[view.vertical] * inches for view in VIEWS]
    width = left + 6 * column_width + 5 * gap + right
    height = top + sum(heights) + 2 * gap + footer
    figure = new_figure(figsize=(width, height), dpi=DOTS_PER_INCH, facecolor="white")
    figure.text(left / width, 1 - 0.2 / height, title, fontsize=13, va="top", parse_math=False)
    grid = {"left": left / width, "right": 1 - right / width, "bottom": footer / height, "top": 1 - top / height,
            "wspace": gap / column_width, "hspace": gap / (sum(heights) / 3), "height_ratios": heights}  # fmt: skip
    panels = figure.subplots(3, 6, gridspec_kw=grid, subplot_kw={"facecolor": "black", "xticks": [], "yticks": []})
    for view, row in zip(VIEWS, panels, strict=True):
        coordinate = (frame.affine @ [*frame.position, 1])[view.through]
        place = f"{DIRECTIONS[view.through][int(coordinate >= 0)]} {abs(coordinate):.0f} mm"
        row[0].set_ylabel(f"{view.name}\n{place}", fontsize=11, linespacing=1.3)
    return figure, panels


def _show(axes: Axes, frame: _Frame, view: _View, plane: np.ndarray, **options: Any) -> None:
    """One slice in its proportions. Its lower left voxel is at (0, 0), and the next ones are at whole numbers."""
    aspect = frame.spacing[view.vertical] / frame.spacing[view.horizontal]
    axes.imshow(plane, origin="lower", aspect=aspect, interpolation="nearest", **options)


def _outline(axes: Axes, folded: np.ndarray) -> None:
    """A black line around what folds: no color of the scale is next to the yellow."""
    from matplotlib.collections import LineCollection

    rows, columns = (np.diff(np.pad(folded, 1), axis=axis) for axis in (0, 1))
    lines = [[(x, y), (x + 1, y)] for y, x in np.argwhere(rows[:, 1:-1]) - 0.5]
    lines += [[(x, y), (x, y + 1)] for y, x in np.argwhere(columns[1:-1]) - 0.5]
    axes.add_collection(LineCollection(lines, colors="black", linewidths=0.8), autolim=False)


def _letter(axes: Axes, view: _View) -> None:
    """The directions at the four edges."""
    from matplotlib.patheffects import withStroke

    back, front = DIRECTIONS[view.horizontal]
    down, up = DIRECTIONS[view.vertical]
    places = ((front, 0.02, 0.5, "left", "center"), (back, 0.98, 0.5, "right", "center"),
              (up, 0.5, 0.98, "center", "top"), (down, 0.5, 0.02, "center", "bottom"))  # fmt: skip
    for letter, x, y, horizontal, vertical in places:
        axes.text(
            x, y, letter, transform=axes.transAxes, ha=horizontal, va=vertical, color="white", fontsize=11,
            fontweight="bold", path_effects=[withStroke(linewidth=2.5, foreground="black")],
        )  # fmt: skip


def _draw_grid(axes: Axes, frame: _Frame, view: _View, deformation: Deformation) -> None:
    """Where the lines of a regular grid of the moving image come to lie on the fixed image."""
    index = np.meshgrid(*map(np.arange, frame.high), indexing="ij", copy=False)
    plane = np.stack([frame.slice(axis, view) for axis in index], axis=-1)
    mapped = deformation.map_points(apply_matrix(frame.affine, plane))
    mapped = apply_matrix(np.linalg.inv(frame.affine), mapped) * frame.spacing
    distance = frame.extent.max() / 24
    for axis in (view.horizontal, view.vertical):
        position = mapped[..., axis]
        levels = np.arange(position.min(), position.max(), distance)
        if len(levels):
            axes.contour(position, levels=levels, colors="black", linewidths=0.5, alpha=0.55)


def _ring(axes: Axes, frame: _Frame, view: _View) -> None:
    """Mark the worst fold, which may be a single voxel."""
    x = (frame.high - 1 - frame.position)[view.horizontal]
    y = (frame.position - frame.low)[view.vertical]
    for color, width in (("black", 3.0), (FOLD_COLOR, 1.6)):
        axes.plot([x], [y], "o", markersize=16, fillstyle="none", color=color, markeredgewidth=width)


def _bar(figure: Figure, footer: float, first: Axes, last: Axes) -> Axes:
    """Axes for a horizontal color bar under the panels from `first` to `last`."""
    height = figure.get_figheight()
    start, end = first.get_position().x0, last.get_position().x1
    length = 0.84 * (end - start)
    axes = figure.add_axes(((start + end - length) / 2, (footer - 0.35) / height, length, 0.13 / height))
    axes.tick_params(labelsize=9)
    return axes


def _draw_legends(figure: Figure, footer: float, lowest: np.ndarray, folded: np.ndarray, one_kind: bool) -> None:
    """Color bars of the differences, where there are some, and the determinant under the `lowest` row of panels."""
    if one_kind:
        axes = _bar(figure, footer, lowest[3], lowest[4])
        bar = figure.colorbar(lowest[3].images[0], cax=axes, orientation="horizontal")
        bar.set_label("difference of gray values (black is 0, white is 1 in the images)", fontsize=9)
    count = int(folded.sum())
    text = f"folded: {count:,} voxels ({100 * count / folded.size:.2g} %)" if count else "no folded voxels"
    axes = _bar(figure, footer, lowest[5], lowest[5])
    axes.set_title("volume in moving / in fixed", fontsize=9, pad=3)
    label = axes.set_xlabel(text, fontsize=9)
    axes.imshow(scale_colors(np.linspace(-1, 1, 256)[None]), aspect="auto", extent=(-2, 2, 0, 1))
    axes.set_yticks([])
    axes.set_xticks([-2, -1, 0, 1, 2], tick_labels())
    if count:
        label.set_bbox({"facecolor": FOLD_COLOR, "edgecolor": "none", "pad": 2})
