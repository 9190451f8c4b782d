import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
from matplotlib.text import Text

from GradProjIOLib.engine.optimization import Step
from GradProjIOLib.geometry.volume import Volume, in_ras_order
from GradProjIOLib.report.colors import FOLD_COLOR, NEARLY_COLOR, determinant_colors, scale_colors, tick_labels
from GradProjIOLib.report.orientation import to_anatomical
from GradProjIOLib.report.overview import draw_overview
from GradProjIOLib.spatial.deformation import Deformation

AXIAL, CORONAL, SAGITTAL = range(3)
FIXED, BEFORE, WARPED, DIFFERENCE_BEFORE, DIFFERENCE_AFTER, DETERMINANT = range(6)
# Every way to store an image: which anatomical axis each of i, j, k follows, and in which direction.
ORIENTATIONS = {
    "RAS": np.diag([2.0, 2.0, 3.0]),
    "LPS": np.diag([-2.0, -2.0, 3.0]),
    "LIA": np.array([[-2.0, 0, 0], [0, 0, 3.0], [0, -2.0, 0]]),
    "ASR": np.array([[0, 0, 3.0], [2.0, 0, 0], [0, 2.0, 0]]),
}
STEPS = [
    asdict(Step(0, 0.5, 0.01, 0.0, 0.2, "none", 0.1)),
    asdict(Step(1, 0.4, 0.02, 0.0, -0.1, "similarity", 0.1)),
    asdict(Step(2, 0.35, 0.03, 0.0, -0.2, "both", 0.1)),
]
REFINED = STEPS + [
    asdict(Step(index, 0.3 - 0.01 * index, 0.02, 0.0, 0.1, "both", 0.1, "refinement", level))
    for level in range(3)
    for index in range(10)
]

GUIDED = REFINED + [
    asdict(Step(index, 0.2, 0.02, 0.0, 0.1, "similarity, labels", 0.1, "refinement", 2, 0.0, 0.9 - 0.1 * index, 0.5))
    for index in range(5)
]


def scene(orientation: str = "RAS", tilt: float = 0.1) -> Volume:
    """A box of tissue with one bright blob that lies right, anterior and superior of its middle."""
    affine = np.eye(4)
    turn = np.array([[np.cos(tilt), -np.sin(tilt), 0], [np.sin(tilt), np.cos(tilt), 0], [0, 0, 1]])
    affine[:3, :3] = turn @ ORIENTATIONS[orientation]
    shape = (22, 28, 26)
    affine[:3, 3] = [40, -30, 20] - affine[:3, :3] @ ((np.array(shape[::-1]) - 1) / 2)
    index = np.stack(np.indices(shape)[::-1], axis=-1)
    points = (index @ affine[:3, :3].T + affine[:3, 3] - [40, -30, 20]) @ turn
    array = np.where((np.abs(points) < [18, 20, 22]).all(axis=-1), 40.0, 0.0)
    array += 160 * np.exp(-((points - [8, 9, 10]) ** 2).sum(axis=-1) / 40)
    return Volume(array.astype(np.float32), affine, "scene")


class Picture:
    """The overview of `fixed` with itself unless something else is given, and its pixels."""

    def __init__(self, fixed: Volume, **changes) -> None:
        determinant = changes.pop("determinant", np.ones(fixed.shape, dtype=np.float32))
        arguments = {"moved_before": fixed, "warped": fixed, "determinant": determinant, "steps": STEPS,
                     "folded": determinant <= 0, "title": "a → b"}  # fmt: skip
        self.figure = draw_overview(fixed, **{**arguments, **changes})
        self.figure.canvas.draw()
        self.pixels = np.asarray(self.figure.canvas.buffer_rgba())[..., :3] / 255

    def panel(self, row: int, column: int) -> np.ndarray:
        """RGB in [0, 1] of one panel without its frame."""
        box = self.figure.axes[6 * row + column].get_window_extent()
        height = len(self.pixels)
        rows = slice(round(height - box.y1) + 4, round(height - box.y0) - 4)
        return self.pixels[rows, round(box.x0) + 4 : round(box.x1) - 4]

    def texts(self) -> list[Text]:
        """Every text that is drawn: numbers of an axis only within its limits."""
        found = list(self.figure.texts)
        for axes in self.figure.axes:
            found += [*axes.texts, axes.title, axes.xaxis.label]
            found += axes.get_legend().get_texts() if axes.get_legend() else []
            for axis in (axes.xaxis, axes.yaxis):
                low, high = sorted(axis.get_view_interval())
                ticks = zip(axis.get_majorticklocs(), axis.get_ticklabels(), strict=True)
                found += [label for location, label in ticks if low <= location <= high]
        return [text for text in found if text.get_text()]


def yellow(picture: np.ndarray) -> np.ndarray:
    return np.abs(picture - FOLD_COLOR).max(axis=-1) < 0.02


def middle(mask: np.ndarray) -> np.ndarray:
    """Center of a mask as parts of its height (from the top) and width (from the left)."""
    return np.argwhere(mask).mean(axis=0) / np.array(mask.shape)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_slices_are_shown_in_radiological_convention(orientation: str) -> None:
    """The right side is on the left; anterior is up in axial and left in sagittal slices; superior is up.

    And the box of 36 x 40 x 44 mm keeps its proportions, whatever the spacing of the voxels.
    """
    picture = Picture(scene(orientation))
    for row, (width, height) in enumerate([(36, 40), (36, 44), (40, 44)]):
        panel = picture.panel(row, WARPED)[..., 0]
        down, across = middle(panel > 0.97 * panel.max())
        assert across < 0.42
        assert down < 0.42
        rows, columns = (np.flatnonzero((panel > 0.1).any(axis=axis)) for axis in (1, 0))
        assert np.ptp(columns) / np.ptp(rows) == pytest.approx(width / height, rel=0.09)


def test_arrays_are_turned_to_the_anatomical_axes_from_every_permutation_and_flip() -> None:
    for matrix in ORIENTATIONS.values():
        affine = np.eye(4)
        affine[:3, :3] = matrix
        index = np.stack(np.indices((3, 4, 5))[::-1], axis=-1)
        ras = np.stack([to_anatomical(axis, affine) for axis in np.moveaxis(index @ matrix.T, -1, 0)], axis=-1)
        for axis in range(3):
            assert (np.diff(ras[..., axis], axis=axis) > 0).all()
        turned = in_ras_order(Volume(np.zeros((3, 4, 5)), affine))[0].affine
        found = np.stack(np.indices(ras.shape[:3]), axis=-1) @ turned[:3, :3].T + turned[:3, 3]
        assert np.allclose(found, ras)


@pytest.mark.parametrize("orientation", ["RAS", "LIA"])
def test_a_single_folded_voxel_is_seen_in_its_place(orientation: str) -> None:
    fixed = scene(orientation)
    determinant = np.ones(fixed.shape, dtype=np.float32)
    determinant[np.unravel_index(fixed.array.argmax(), fixed.shape)] = -0.3
    picture = Picture(fixed, determinant=determinant)
    for row in (AXIAL, CORONAL, SAGITTAL):
        blob = middle(picture.panel(row, FIXED).min(axis=-1) > 0.9)
        for column in (WARPED, DETERMINANT):
            marked = yellow(picture.panel(row, column))
            assert marked.sum() > 20
            assert np.abs(middle(marked) - blob).max() < 0.06
        assert not yellow(picture.panel(row, FIXED)).any()


def test_nothing_is_yellow_without_folding() -> None:
    fixed = scene()
    determinant = np.exp(np.random.default_rng(0).normal(size=fixed.shape)).astype(np.float32)
    assert not yellow(Picture(fixed, determinant=determinant).pixels).any()


def test_folds_that_only_the_mask_knows_are_shown_too() -> None:
    fixed = scene()
    folded = np.zeros(fixed.shape, dtype=bool)
    folded[10, 14, 13] = True
    assert yellow(Picture(fixed, folded=folded).panel(AXIAL, DETERMINANT)).any()


def test_determinant_colors_diverge_from_one() -> None:
    determinant = np.array([0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 100.0])
    colors = determinant_colors(determinant, determinant <= 0)
    assert tuple(colors[0]) == FOLD_COLOR
    assert colors[3].min() > 0.95
    assert (colors[1:3, 2] > colors[1:3, 0]).all()
    assert (colors[4:, 0] > colors[4:, 2]).all()
    assert np.array_equal(colors[5], colors[6])


# Linear RGB as people without red or without green cones see it: Viénot 1999 and Machado 2009 (severity 1).
TO_CONES = np.array([[17.8824, 43.5161, 4.11935], [3.45565, 27.1554, 3.86714], [0.0299566, 0.184309, 1.46709]])
SEEN = {
    "usual": np.eye(3),
    "protanope, Viénot": np.linalg.inv(TO_CONES) @ [[0, 2.02344, -2.52581], [0, 1, 0], [0, 0, 1]] @ TO_CONES,
    "deuteranope, Viénot": np.linalg.inv(TO_CONES) @ [[1, 0, 0], [0.494207, 0, 1.24827], [0, 0, 1]] @ TO_CONES,
    "protanope, Machado": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranope, Machado": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
}


def seen_lab(colors, reader: str) -> np.ndarray:
    """CIE L*a*b* (D65) of sRGB colors [n, 3] as a reader sees them."""
    colors = np.asarray(colors, dtype=float)
    linear = np.where(colors <= 0.04045, colors / 12.92, ((colors + 0.055) / 1.055) ** 2.4)
    linear = np.clip(linear @ np.transpose(SEEN[reader]), 0, 1)
    to_xyz = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750],
                       [0.0193339, 0.1191920, 0.9503041]])  # fmt: skip
    xyz = linear @ to_xyz.T / [0.95047, 1.0, 1.08883]
    root = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    x, y, z = np.moveaxis(root, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


@pytest.mark.parametrize("reader", SEEN)
def test_no_reader_confuses_folds_with_the_scale_or_its_ends_with_each_other(reader: str) -> None:
    scale = seen_lab(scale_colors(np.linspace(-1, 1, 401)), reader)
    fold, nearly = seen_lab([FOLD_COLOR, NEARLY_COLOR], reader)
    assert np.linalg.norm(scale - fold, axis=1).min() > 60
    assert np.linalg.norm(nearly - fold) > 60
    smaller, larger = seen_lab(scale_colors(np.array([-0.5, 0.5])), reader)
    assert np.linalg.norm(smaller - larger) > 60


def test_the_ticks_of_the_scale_are_its_values() -> None:
    assert tick_labels(4.0) == ["¼", "½", "1", "2", "4"]
    assert tick_labels(2.0) == ["½", "0.707", "1", "1.41", "2"]
    assert tick_labels(1.25) == ["0.8", "0.894", "1", "1.12", "1.25"]


def test_differences_vanish_only_where_the_images_agree() -> None:
    fixed = scene()
    shifted = Volume(np.roll(fixed.array, 3, axis=2), fixed.affine, "shifted")
    picture = Picture(fixed, moved_before=shifted)
    assert picture.panel(AXIAL, DIFFERENCE_BEFORE).max() > 0.5
    assert picture.panel(AXIAL, DIFFERENCE_AFTER).max() < 0.05


def test_grid_lines_follow_the_deformation() -> None:
    fixed = scene(tilt=0.0)
    still = Deformation(np.zeros((*fixed.shape, 3)), fixed.affine)
    bent = still.displacement.copy()
    bent[..., 0] = 4 * np.sin(np.arange(fixed.shape[1]) / 4)[:, None]
    plain, straight, curved = (
        Picture(fixed, deformation=deformation).panel(AXIAL, DETERMINANT).mean(axis=-1)
        for deformation in (None, still, Deformation(bent, fixed.affine))
    )
    inner = (slice(15, -15), slice(15, -15))
    assert np.ptp(plain) < 0.02
    # A straight line is dark along a whole column of pixels.
    assert straight[inner].max(axis=0).min() < 0.8 < curved[inner].max(axis=0).min()
    assert straight[inner].max(axis=1).min() < 0.8 < plain.min()


def words(picture: Picture) -> str:
    return "\n".join(text.get_text() for text in picture.texts())


def test_losses_and_conflicts_are_told() -> None:
    text = words(Picture(scene()))
    assert "Similarity loss: 0.5 → 0.35" in text
    assert "conflict in 2 of 3 steps" in text
    assert "projected (2)" in text
    assert "projected (1)" in text
    vanilla = STEPS[0] | {"cosine": None, "projected": None}
    assert "Cosine" not in words(Picture(scene(), steps=[vanilla]))
    assert "No optimization steps" in words(Picture(scene(), steps=[]))


def test_the_losses_of_what_guides_are_told_from_where_it_guides() -> None:
    text = words(Picture(scene(), steps=GUIDED))
    assert "Landmarks loss in refinement 3:\n0.9 → 0.5" in text
    assert "Labels loss in refinement 3:\n0.5 → 0.5" in text
    # The gradients of the images and of the labels were projected in all steps in which the labels guided.
    assert text.count("projected (5)") == 1
    assert text.count("projected (37)") == 1
    assert "Landmarks" not in words(Picture(scene(), steps=REFINED))


def test_stages_and_levels_are_marked_and_numbered_in_a_row() -> None:
    picture = Picture(scene(), steps=REFINED)
    text = words(picture)
    for name in ("network", "refinement 1", "refinement 2", "refinement 3"):
        assert text.split("\n").count(name) == 3
    assert "Similarity loss in refinement 3: 0.3 → 0.21" in text
    similarity = next(axes for axes in picture.figure.axes if axes.get_title().startswith("Similarity"))
    lines = [line.get_xdata() for line in similarity.lines if len(line.get_xdata()) in (3, 10)]
    assert [list(x) for x in lines] == [
        [*range(first, last + 1)] for first, last in ((1, 3), (4, 13), (14, 23), (24, 33))
    ]
    # Where losses of another lattice begin, there is a line and no connection.
    assert [line.get_xdata()[0] for line in similarity.lines if line.get_xdata()[0] % 1] == [3.5, 13.5, 23.5]
    assert "refinement" not in words(Picture(scene()))


def test_images_of_different_kinds_are_compared_by_checkerboards() -> None:
    fixed = scene()
    inverted = Volume(fixed.array.max() - fixed.array, fixed.affine, "inverted")
    picture = Picture(fixed, moved_before=inverted, warped=inverted, one_kind=False)
    board, own, other = (picture.panel(AXIAL, column) for column in (DIFFERENCE_AFTER, FIXED, WARPED))
    is_own, is_other = (np.abs(board - image).max(axis=-1) < 0.02 for image in (own, other))
    differ = np.abs(own - other).max(axis=-1) > 0.1
    assert (is_own | is_other)[differ].mean() > 0.95
    assert 0.3 < is_own[differ].mean() < 0.7
    assert "mean" not in words(picture)


@pytest.mark.parametrize("one_kind", [True, False])
@pytest.mark.parametrize("steps", [STEPS, REFINED, GUIDED, []])
def test_texts_do_not_overlap_and_lie_within_the_picture(steps: list, one_kind: bool) -> None:
    fixed = Volume(scene().array, scene().affine, "a_very_long_$file_name$_of_a_subject_at_baseline.nii.gz")
    determinant = np.ones(fixed.shape, dtype=np.float32)
    determinant[10:14, 10:14, 10:14] = -1
    picture = Picture(fixed, determinant=determinant, steps=steps, title="moving_$1$ → fixed, " * 12,
                      one_kind=one_kind)  # fmt: skip
    found = picture.texts()
    boxes = [text.get_window_extent() for text in found]
    for number, box in enumerate(boxes):
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= picture.figure.bbox.x1
        assert box.y1 <= picture.figure.bbox.y1
        for other, text in zip(boxes[:number], found, strict=False):
            assert not box.overlaps(other), (found[number].get_text(), text.get_text())


def test_constant_and_empty_images_are_drawn() -> None:
    empty = Volume(np.zeros((12, 12, 12), dtype=np.int16), np.eye(4))
    assert Picture(empty).panel(AXIAL, WARPED).max() < 0.05


def test_pyplot_stays_unloaded() -> None:
    """Its import would choose a window system for the host application."""
    code = (
        "import sys, numpy as np; from GradProjIOLib.geometry import volume;"
        "from GradProjIOLib.report import overview as figures;"
        "image = volume.Volume(np.ones((9, 9, 9)), np.eye(4)); ones = image.array;"
        "figures.draw_overview(image, image, image, ones, ones < 0, [], 'a');"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def test_another_lattice_is_refused() -> None:
    fixed = scene()
    with pytest.raises(ValueError, match="expected warped on the lattice"):
        Picture(fixed, warped=Volume(fixed.array[:-1], fixed.affine))
