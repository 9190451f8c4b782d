"""The picture that sums up one registration: three slices of the images, the differences, the determinant."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from GradProjIOLib.geometry.volume import Volume
from GradProjIOLib.report.canvas import new_figure
from GradProjIOLib.report.colors import FOLD_COLOR, LARGEST_DETERMINANT, determinant_colors
from GradProjIOLib.report.steps import draw_steps

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from GradProjIOLib.spatial.deformation import Deformation

DIFFERENCE_COLORS = "inferno"
DOTS_PER_INCH = 110
COLUMNS = ("Fixed", "Moving, before", "Moving, warped", "|Difference| before", "|Difference| after",
           "Jacobian determinant")  # fmt: skip


@dataclass(frozen=True)
class _View:
    """One orthogonal slice. Axes are 0 (right), 1 (anterior), 2 (superior); both on screen grow to the left
    and upwards, which is the radiological convention."""

    name: str
    through: int
    horizontal: int
    vertical: int


VIEWS = (_View("Axial", 2, 0, 1), _View("Coronal", 1, 0, 2), _View("Sagittal", 0, 1, 2))
DIRECTIONS = (("L", "R"), ("P", "A"), ("I", "S"))


def canonical_order(affine: np.ndarray) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """How to reorder an array [k, j, i] so that its axes come closest to (right, anterior, superior).

    Returns the axes of the array in the new order and whether each has to be reversed.
    """
    direction = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    right, front, up = max(
        itertools.permutations(range(3)),
        key=lambda order: sum(abs(direction[axis, column]) for axis, column in enumerate(order)),
    )
    reverse = bool(direction[0, right] < 0), bool(direction[1, front] < 0), bool(direction[2, up] < 0)
    return (2 - right, 2 - front, 2 - up), reverse


@dataclass(frozen=True)
class _Frame:
    """What all panels share: the order of the axes, the part of the lattice shown and the slices' place."""

    axes: tuple[int, ...]
    reverse: tuple[bool, ...]
    spacing: np.ndarray
    low: np.ndarray
    high: np.ndarray
    position: np.ndarray
    ras: np.ndarray

    def orient(self, array: np.ndarray) -> np.ndarray:
        """[k, j, i] → [right, anterior, superior]."""
        return orient(array, self.axes, self.reverse)

    def slice(self, array: np.ndarray, view: _View) -> np.ndarray:
        """The view's slice of an oriented array as rows from bottom to top: [vertical, horizontal, …]."""
        part: list[slice | int] = [slice(*bounds) for bounds in zip(self.low, self.high, strict=True)]
        part[view.through] = int(self.position[view.through])
        return np.swapaxes(array[tuple(part)], 0, 1)[:, ::-1]

    def extent(self, axis: int) -> float:
        """Length in mm of the part shown."""
        return float((self.high[axis] - self.low[axis]) * self.spacing[axis])


def orient(array: np.ndarray, axes: tuple[int, ...], reverse: tuple[bool, ...]) -> np.ndarray:
    """An array [k, j, i] as [right, anterior, superior], by what `canonical_order` gives."""
    oriented = np.moveaxis(array, axes, (0, 1, 2))
    return oriented[tuple(slice(None, None, -1 if flip else 1) for flip in reverse)]


def _window(array: np.ndarray) -> tuple[float, float]:
    """Intensities shown as black and white: the first to the 99.5th percentile of what is not background."""
    low = float(array.min())
    array = array[::2, ::2, ::2]
    values = array[array > low + 0.02 * (np.percentile(array, 99.5) - low)]
    if not values.size:
        return low, low + 1
    high = float(np.percentile(values, 99.5))
    return low, high if high > low else low + 1


def _scaled(array: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    return np.clip((array.astype(np.float32) - window[0]) / (window[1] - window[0]), 0, 1)


def _bounds(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First and one past the last index of the mask along each axis; the whole lattice for an empty mask."""
    if not mask.any():
        return np.zeros(3, dtype=int), np.array(mask.shape)
    lines = [np.flatnonzero(mask.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    return np.array([line[0] for line in lines]), np.array([line[-1] + 1 for line in lines])


def _frame(affine: np.ndarray, foreground: np.ndarray, folded: np.ndarray, determinant: np.ndarray) -> _Frame:
    """Slices through the worst fold, else through the middle of the foreground (arrays [k, j, i])."""
    axes, reverse = canonical_order(affine)
    shown, folds, values = (orient(array, axes, reverse) for array in (foreground, folded, determinant))
    if folds.any():
        worst = np.argmin(np.where(folds, values, np.inf))
        position = np.array(np.unravel_index(worst, folds.shape))
    elif shown.any():
        position = np.round([np.average(np.arange(n), weights=shown.sum(axis=tuple({0, 1, 2} - {axis})))
                             for axis, n in enumerate(shown.shape)]).astype(int)  # fmt: skip
    else:
        position = np.array(shown.shape) // 2
    low, high = _bounds(shown | folds)
    margin = np.ceil(0.04 * (high - low)).astype(int)
    index = np.where(reverse, np.array(shown.shape) - 1 - position, position)
    ijk = np.empty(3)
    ijk[[2 - axis for axis in axes]] = index
    return _Frame(
        axes=axes,
        reverse=reverse,
        spacing=np.linalg.norm(affine[:3, :3], axis=0)[[2 - axis for axis in axes]],
        low=np.maximum(low - margin, 0),
        high=np.minimum(high + margin, shown.shape),
        position=position,
        ras=(affine @ [*ijk, 1])[:3],
    )


def draw_overview(
    fixed: Volume,
    moved_before: Volume,
    warped: Volume,
    determinant: np.ndarray,
    folded: np.ndarray,
    steps: Sequence[Any],
    title: str,
    deformation: Deformation | None = None,
) -> Figure:
    """The picture of one registration as a matplotlib figure.

    Three orthogonal slices (radiological convention, along the fixed image's axes, through the worst fold or
    the middle of the foreground) of the fixed image, the moving image before and after the deformation, the
    differences to the fixed image and the Jacobian determinant; below them the losses of the steps.

    `moved_before` (the moving image as the initial alignment places it), `warped`, `determinant` and the mask
    `folded` are all on the fixed image's lattice [k, j, i]. `steps` are `Step`s or the mappings of
    report.json; none for direct inference. With `deformation` (fixed → moving, RAS mm), the lines of a
    regular grid of the moving image are drawn into the determinant map. Raises ValueError where the shapes
    differ.
    """
    for name, array in (("moved_before", moved_before.array), ("warped", warped.array),
                        ("determinant", determinant), ("folded", folded)):  # fmt: skip
        if array.shape != fixed.shape:
            raise ValueError(f"expected {name} on the lattice {fixed.shape} of fixed, found {array.shape}")
    folded = np.asarray(folded, dtype=bool) | (determinant <= 0)
    moving_window = _window(moved_before.array)
    images = [_scaled(fixed.array, _window(fixed.array)), _scaled(moved_before.array, moving_window),
              _scaled(warped.array, moving_window)]  # fmt: skip
    foreground = np.maximum.reduce(images) > 0.08
    frame = _frame(fixed.affine, foreground, folded, determinant)
    differences = [np.abs(image - images[0]) for image in images[1:]]
    means = [float(difference[foreground].mean()) if foreground.any() else 0.0 for difference in differences]
    highest = max(float(np.percentile(differences[0][::2, ::2, ::2], 99.5)), 0.05)

    footer = 3.55 if steps else 1.35
    figure, panels = _layout(frame, title, footer)
    names = [_shorten(fixed.name), _shorten(moved_before.name), _shorten(warped.name)]
    notes = [*names, *(f"mean {mean:.3f}" for mean in means),
             f"{determinant.min():.2f} to {determinant.max():.2f}"]  # fmt: skip
    for column, note in enumerate(notes):
        panels[0][column].set_title(f"{COLUMNS[column]}\n{note}", fontsize=11, parse_math=False)
    oriented = [frame.orient(image) for image in (*images, *differences)]
    values, mask = frame.orient(determinant), frame.orient(folded)
    scales = [{"cmap": "gray", "vmax": 1}] * 3 + [{"cmap": DIFFERENCE_COLORS, "vmax": highest}] * 2
    for row, view in enumerate(VIEWS):
        for axes, image, scale in zip(panels[row], oriented, scales, strict=False):
            _show(axes, frame, view, frame.slice(image, view), vmin=0, **scale)
        colors = determinant_colors(frame.slice(values, view), frame.slice(mask, view))
        _show(panels[row][5], frame, view, colors)
        if deformation is not None:
            _draw_grid(panels[row][5], frame, view, fixed, deformation)
        if folded.any():
            _ring(panels[row][2], frame, view)
            _ring(panels[row][5], frame, view)
        _letter(panels[row][0], frame, view)
    _difference_legend(figure, footer, panels, highest)
    _determinant_legend(figure, footer, panels, folded)
    draw_steps(figure, footer, steps)
    return figure


def _shorten(name: str, longest: int = 26) -> str:
    return name if len(name) <= longest else f"{name[: longest - 11]}…{name[-10:]}"


def _layout(frame: _Frame, title: str, footer: float) -> tuple[Figure, list[list[Axes]]]:
    """Figure and panels [row][column] at one scale, with `footer` inches left below them."""
    title = textwrap.fill(title, 145, break_on_hyphens=False)
    left, right, gap, top = 0.75, 0.2, 0.1, 0.95 + 0.23 * title.count("\n")
    widest = max(frame.extent(view.horizontal) for view in VIEWS)
    tallest = max(frame.extent(view.vertical) for view in VIEWS)
    inches = min(2.6 / widest, 3.4 / tallest)
    column_width = max(widest * inches, 2.1)
    heights = [frame.extent(view.vertical) * inches for view in VIEWS]
    width = left + 6 * column_width + 5 * gap + right
    height = top + sum(heights) + 2 * gap + footer
    figure = new_figure(figsize=(width, height), dpi=DOTS_PER_INCH, facecolor="white")
    figure.text(left / width, 1 - 0.2 / height, title, fontsize=13, va="top", parse_math=False)
    panels = []
    bottom = height - top
    for view, row_height in zip(VIEWS, heights, strict=True):
        bottom -= row_height
        panel_width = frame.extent(view.horizontal) * inches
        start = left + (column_width - panel_width) / 2
        row = [
            figure.add_axes((
                (start + column * (column_width + gap)) / width, bottom / height,
                panel_width / width, row_height / height,
            ))
            for column in range(6)
        ]  # fmt: skip
        for axes in row:
            axes.set_facecolor("black")
            axes.set_xticks([])
            axes.set_yticks([])
        coordinate = frame.ras[view.through]
        place = f"{DIRECTIONS[view.through][int(coordinate >= 0)]} {abs(coordinate):.0f} mm"
        figure.text(
            0.3 / width, (bottom + row_height / 2) / height, f"{view.name}\n{place}",
            rotation=90, ha="center", va="center", fontsize=11, linespacing=1.3,
        )  # fmt: skip
        panels.append(row)
        bottom -= gap
    return figure, panels


def _show(axes: Axes, frame: _Frame, view: _View, plane: np.ndarray, **options: Any) -> None:
    """One slice, in mm from the lower left corner of the part shown."""
    extent = (0, frame.extent(view.horizontal), 0, frame.extent(view.vertical))
    axes.imshow(plane, origin="lower", extent=extent, interpolation="nearest", aspect="auto", **options)


def _letter(axes: Axes, frame: _Frame, view: _View) -> None:
    """The directions at the four edges."""
    from matplotlib.patheffects import withStroke

    back, front = DIRECTIONS[view.horizontal]
    down, up = DIRECTIONS[view.vertical]
    places = ((front, 0.02, 0.5, "left", "center"), (back, 0.98, 0.5, "right", "center"),
              (up, 0.5, 0.98, "center", "top"), (down, 0.5, 0.02, "center", "bottom"))  # fmt: skip
    for letter, x, y, horizontal, vertical in places:
        axes.text(
            x, y, letter, transform=axes.transAxes, ha=horizontal, va=vertical, color="yellow", fontsize=11,
            fontweight="bold", path_effects=[withStroke(linewidth=2.5, foreground="black")],
        )  # fmt: skip


def _draw_grid(axes: Axes, frame: _Frame, view: _View, fixed: Volume, deformation: Deformation) -> None:
    """Where the lines of a regular grid of the moving image come to lie on the fixed image."""
    index = np.meshgrid(*map(np.arange, fixed.shape), indexing="ij", copy=False)
    plane = np.stack([frame.slice(frame.orient(axis), view) for axis in reversed(index)], axis=-1)
    points = plane @ fixed.affine[:3, :3].T + fixed.affine[:3, 3]
    mapped = (deformation.map_points(points) - fixed.affine[:3, 3]) @ np.linalg.inv(fixed.affine[:3, :3]).T
    columns = [2 - axis for axis in frame.axes]
    x = (np.arange(plane.shape[1]) + 0.5) * frame.spacing[view.horizontal]
    y = (np.arange(plane.shape[0]) + 0.5) * frame.spacing[view.vertical]
    distance = max(frame.extent(axis) for axis in range(3)) / 24
    for axis in (view.horizontal, view.vertical):
        position = mapped[..., columns[axis]] * frame.spacing[axis]
        levels = np.arange(position.min(), position.max(), distance)
        if len(levels):
            axes.contour(x, y, position, levels=levels, colors="black", linewidths=0.5, alpha=0.55)


def _ring(axes: Axes, frame: _Frame, view: _View) -> None:
    """Mark the worst fold, which may be a single voxel."""
    x = (frame.high - frame.position - 0.5)[view.horizontal] * frame.spacing[view.horizontal]
    y = (frame.position - frame.low + 0.5)[view.vertical] * frame.spacing[view.vertical]
    for color, width in (("black", 3.0), (FOLD_COLOR, 1.6)):
        axes.plot([x], [y], "o", markersize=16, fillstyle="none", color=color, markeredgewidth=width)


def _bar(figure: Figure, footer: float, first: Axes, last: Axes) -> Axes:
    """Axes for a horizontal color bar under the panels from `first` to `last`."""
    height = figure.get_figheight()
    start, end = first.get_position().x0, last.get_position().x1
    length = 0.84 * (end - start)
    return figure.add_axes(((start + end - length) / 2, (footer - 0.35) / height, length, 0.13 / height))


def _difference_legend(figure: Figure, footer: float, panels: list[list[Axes]], highest: float) -> None:
    axes = _bar(figure, footer, panels[2][3], panels[2][4])
    ramp = np.linspace(0, 1, 256)[None]
    axes.imshow(ramp, aspect="auto", cmap=DIFFERENCE_COLORS, extent=(0, highest, 0, 1))
    axes.set_yticks([])
    axes.tick_params(labelsize=9)
    axes.set_xlabel("part of each image's intensity window", fontsize=9)


def _determinant_legend(figure: Figure, footer: float, panels: list[list[Axes]], folded: np.ndarray) -> None:
    axes = _bar(figure, footer, panels[2][5], panels[2][5])
    ramp = LARGEST_DETERMINANT ** np.linspace(-1, 1, 256)[None]
    axes.imshow(determinant_colors(ramp, ramp <= 0), aspect="auto", extent=(-2, 2, 0, 1))
    axes.set_yticks([])
    axes.set_xticks([-2, -1, 0, 1, 2], ["≤¼", "½", "1", "2", "≥4"])
    axes.tick_params(labelsize=9)
    count = int(folded.sum())
    text = f"folded: {count:,} voxels ({100 * count / folded.size:.2g} %)" if count else "no folded voxels"
    label = axes.set_xlabel(text, fontsize=9)
    if count:
        label.set_bbox({"facecolor": FOLD_COLOR, "edgecolor": "none", "pad": 2})
