"""Volumes, transforms, labels and folds between the package and slicer-core's real MRML scene."""

import math
import sys
import time

import numpy as np
import pytest
import slicer
import vtk

from GradProjIOLib.errors import InputError
from GradProjIOLib.geometry.labels import Labels
from GradProjIOLib.geometry.lattice import lattice_points
from GradProjIOLib.geometry.volume import Volume
from GradProjIOLib.report.colors import FOLD_COLOR, NEARLY_COLOR, SMALLER_TO_LARGER
from GradProjIOLib.scene import folding, folds, jacobian_colors, nodes, transforms
from GradProjIOLib.scene.compare_view import CompareView
from GradProjIOLib.scene.folding_view import MARKER_NAME, FoldingView
from GradProjIOLib.scene.inputs import Inputs
from GradProjIOLib.scene.labels import add_segment, labels_from_node, labels_to_segmentation
from GradProjIOLib.scene.plots import LossPlot, add_histogram
from GradProjIOLib.scene.structures import fill_statistics, structures_on

RIGHT_ANGLE = np.array([[0, -1, 0], [1, 0, 0], [0, 0, 1]], dtype=float)


@pytest.fixture
def scene():
    scene = slicer.vtkMRMLScene()
    # What Slicer's Colors module does when the application starts.
    scene.RegisterNodeClass(slicer.vtkMRMLColorLegendDisplayNode())
    yield scene
    scene.Clear(True)


def rotation(*degrees):
    """A general rotation: about R, then A, then S."""
    result = np.eye(3)
    for axis, angle in enumerate(np.radians(degrees)):
        turn = np.eye(3)
        first, second = (axis + 1) % 3, (axis + 2) % 3
        turn[[first, second], [first, second]] = math.cos(angle)
        turn[first, second], turn[second, first] = -math.sin(angle), math.sin(angle)
        result = turn @ result
    return result


def affine_of(spacing, directions, origin):
    affine = np.eye(4)
    affine[:3, :3] = directions * np.array(spacing)
    affine[:3, 3] = origin
    return affine


def smooth_image(shape, affine):
    """A sum of waves in world coordinates, so it can be evaluated anywhere."""
    return wave(lattice_points(shape, affine).reshape(-1, 3)).reshape(shape).astype(np.float32)


def wave(points):
    x, y, z = points.T
    return 100 + 30 * np.sin(x / 9) + 20 * np.cos(y / 11) + 25 * np.sin(z / 8)


def volume_node(scene, volume, kind="vtkMRMLScalarVolumeNode", parent=None):
    node = scene.AddNewNodeByClass(kind, volume.name)
    nodes.volume_to_node(volume, node)
    if parent is not None:
        node.SetAndObserveTransformNodeID(parent.GetID())
    return node


def linear_node(scene, matrix, name="parent"):
    node = scene.AddNewNodeByClass("vtkMRMLLinearTransformNode", name)
    node.SetMatrixTransformToParent(slicer.util.vtkMatrixFromArray(matrix))
    return node


def bump(shape, affine, amplitude=4.0):
    """A smooth displacement in RAS mm on a lattice."""
    points = lattice_points(shape, affine).reshape(-1, 3)
    center = points.mean(axis=0)
    decay = np.exp(-((points - center) ** 2).sum(axis=1) / 300)
    field = amplitude * decay[:, None] * np.array([1.0, -0.5, 0.7])
    return field.reshape(*shape, 3).astype(np.float32)


OBLIQUE = affine_of((1.2, 0.9, 2.1), rotation(11, -17, 23), (-14, 9, 30))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64, np.float32, np.float64, bool])
def test_a_volume_comes_back_from_the_scene_as_it_was(scene, dtype):
    values = np.random.default_rng(1).integers(0, 2 if dtype is bool else 100, (9, 10, 11)).astype(dtype)
    node = volume_node(scene, Volume(values, OBLIQUE, "image"))
    back = nodes.volume_from_node(node)
    assert np.array_equal(back.array, values)
    assert np.allclose(back.affine, OBLIQUE)
    assert back.name == "image"


def test_a_linear_parent_only_changes_the_affine(scene):
    matrix = affine_of((1, 1, 1), rotation(20, 5, -40), (5, -6, 7))
    outer = linear_node(scene, matrix, "outer")
    inner = linear_node(scene, affine_of((2, 2, 2), RIGHT_ANGLE, (1, 2, 3)), "inner")
    inner.SetAndObserveTransformNodeID(outer.GetID())
    values = np.arange(9 * 10 * 11, dtype=np.int16).reshape(9, 10, 11)
    node = volume_node(scene, Volume(values, OBLIQUE), parent=inner)
    volume = nodes.volume_from_node(node)
    assert np.shares_memory(volume.array, slicer.util.arrayFromVolume(node))
    node.HardenTransform()
    assert np.allclose(volume.affine, nodes.local_affine(node))


@pytest.mark.parametrize("kind", ["grid", "shear"])
def test_parents_that_bend_or_shear_resample_to_what_slicer_shows(scene, kind):
    affine = affine_of((1.5, 1.5, 2), rotation(0, 0, 15), (-20, -20, -18))
    node = volume_node(scene, Volume(smooth_image((20, 26, 28), affine), affine, "bent"))
    if kind == "grid":
        parent = scene.AddNewNodeByClass("vtkMRMLGridTransformNode")
        transforms.deformation_to_node(bump((20, 26, 28), affine), affine, np.eye(4), parent)
    else:
        shear = np.eye(4)
        shear[0, 1] = 0.3
        parent = linear_node(scene, shear)
    node.SetAndObserveTransformNodeID(parent.GetID())
    volume = nodes.volume_from_node(node)
    columns = volume.affine[:3, :3]
    assert np.allclose(columns.T @ columns, np.diag(volume.spacing**2), atol=1e-6)

    # A point of the volume is shown at to_world(point) with the same intensity.
    to_world = vtk.vtkGeneralTransform()
    parent.GetTransformToWorld(to_world)
    inner = lattice_points((20, 26, 28), affine)[4:-4, 5:-5, 5:-5].reshape(-1, 3)
    shown = np.array([to_world.TransformPoint(point) for point in inner])
    index = (shown - volume.affine[:3, 3]) @ np.linalg.inv(columns).T
    assert np.abs(trilinear(volume.array, index) - wave(inner)).max() < 2.5


def trilinear(array, index):
    from scipy.ndimage import map_coordinates

    return map_coordinates(array.astype(np.float64), index[:, ::-1].T, order=1)


@pytest.mark.parametrize("broken", ["none", "no voxels", "vector", "flat", "labels"])
def test_a_bad_node_gives_one_sentence_that_names_it(scene, broken):
    node = scene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", "My scan")
    if broken == "vector":
        image = vtk.vtkImageData()
        image.SetDimensions(9, 9, 9)
        image.AllocateScalars(vtk.VTK_UNSIGNED_CHAR, 3)
        node = scene.AddNewNodeByClass("vtkMRMLVectorVolumeNode", "My scan 1")
        node.SetAndObserveImageData(image)
    elif broken == "flat":
        node = volume_node(scene, Volume(np.zeros((1, 9, 9)), np.eye(4), "My scan"))
    elif broken == "labels":
        labels = Volume(np.zeros((9, 9, 9), int), np.eye(4), "My scan")
        node = volume_node(scene, labels, "vtkMRMLLabelMapVolumeNode")
    with pytest.raises(InputError, match="choose") as caught:
        nodes.check_image_node(None if broken == "none" else node, "fixed image")
    assert "fixed image" in str(caught.value)
    assert broken == "none" or "My scan" in str(caught.value)


@pytest.mark.parametrize("parents", ["none", "fixed", "moving", "both"])
def test_moving_under_the_transform_lies_where_the_deformation_says(scene, parents):
    """The moving volume hardened under the transform shows wave(x + u(x)) at x, with oblique voxels."""
    affine = affine_of((1.4, 1.1, 1.8), rotation(8, 12, -20), (-18, -16, -18))
    parent = linear_node(scene, affine_of((1, 1, 1), rotation(0, 25, 10), (3, -4, 6)))
    local = np.linalg.inv(nodes.slicer.util.arrayFromTransformMatrix(parent)) @ affine
    under = parent if parents in ("moving", "both") else None
    shape = (24, 30, 28)
    moving = volume_node(scene, Volume(smooth_image(shape, affine), local if under else affine, "moving"), parent=under)
    fixed_under = parent if parents in ("fixed", "both") else None
    fixed = volume_node(
        scene,
        Volume(np.zeros(shape, np.float32), local if fixed_under else affine, "fixed"),
        parent=fixed_under,
    )

    lattice = affine @ np.diag([2, 2, 2, 1.0])
    displacement = bump((12, 15, 14), lattice)
    transform = scene.AddNewNodeByClass("vtkMRMLGridTransformNode", "T")
    transforms.deformation_to_node(displacement, lattice, np.eye(4), transform)
    moving.HardenTransform()
    moving.SetAndObserveTransformNodeID(transform.GetID())
    assert transforms.is_under(moving, transform)
    moving_world = nodes.volume_from_node(moving)

    points = lattice_points(shape, affine)[4:-4, 4:-4, 4:-4].reshape(-1, 3)
    index = (points - lattice[:3, 3]) @ np.linalg.inv(lattice[:3, :3]).T
    displaced = points + np.stack([trilinear(displacement[..., c], index) for c in range(3)], axis=1)
    shown = (points - moving_world.affine[:3, 3]) @ np.linalg.inv(moving_world.affine[:3, :3]).T
    assert np.abs(trilinear(moving_world.array, shown) - wave(displaced)).max() < 2.5

    result = volume_node(scene, Volume(np.ones(shape), affine, "out"))
    nodes.volume_to_node(Volume(np.ones(shape), affine), result, like=fixed)
    assert result.GetParentTransformNode() is fixed_under
    assert np.allclose(nodes.world_affine(result), affine)
    assert np.allclose(nodes.world_affine(fixed), affine)


def test_a_transform_node_is_written_as_itk_reads_it(scene, tmp_path):
    sitk = pytest.importorskip("SimpleITK")
    affine = affine_of((2, 2.5, 3), rotation(10, 20, 30), (-10, -12, -14))
    displacement = bump((10, 11, 12), affine)
    node = scene.AddNewNodeByClass("vtkMRMLGridTransformNode")
    transforms.deformation_to_node(displacement, affine, np.eye(4), node)
    storage = scene.AddNewNodeByClass("vtkMRMLTransformStorageNode")
    storage.SetFileName(str(tmp_path / "transform.h5"))
    assert storage.WriteData(node)
    transform = sitk.ReadTransform(str(tmp_path / "transform.h5"))
    point = affine @ [5, 6, 4, 1]
    flip = np.array([-1, -1, 1])
    moved = flip * transform.TransformPoint((flip * point[:3]).tolist())
    assert np.allclose(moved - point[:3], displacement[4, 6, 5], atol=1e-4)


def test_initial_transforms_are_read_as_point_maps_fixed_to_moving(scene, tmp_path):
    matrix = affine_of((1, 1, 1), rotation(5, 6, 7), (1, 2, 3))
    images = [nodes.add_node(scene, "vtkMRMLScalarVolumeNode", name) for name in ("fixed", "moving")]
    for node in images:
        nodes.volume_to_node(Volume(np.random.default_rng(1).random((6, 7, 8), np.float32), np.eye(4)), node)
    request = Inputs(*images, linear_node(scene, matrix)).request(tmp_path, {}, False)
    assert np.allclose(request.inputs["initial_transform"]["matrix"], np.linalg.inv(matrix))
    affine = affine_of((3, 3, 3), np.eye(3), (-20, -20, -20))
    displacement = bump((12, 13, 14), affine)
    node = scene.AddNewNodeByClass("vtkMRMLGridTransformNode")
    transforms.deformation_to_node(displacement, affine, np.eye(4), node)
    sampled, linear = transforms.deformation_from_node(node, (12, 13, 14), affine)
    assert np.array_equal(linear, np.eye(4))
    assert np.abs(sampled - displacement).max() < 1e-4


def test_a_grid_and_a_linear_map_are_one_node(scene, tmp_path):
    """The node moves volumes as both maps do, is ITK's composite in a file, and comes back as it was."""
    sitk = pytest.importorskip("SimpleITK")
    affine = affine_of((2, 2.5, 3), rotation(10, 20, 30), (-10, -12, -14))
    linear = affine_of((1.1, 0.9, 1), rotation(-8, 5, 12), (4, -6, 9))
    displacement = bump((10, 11, 12), affine)
    node = scene.AddNewNodeByClass("vtkMRMLGridTransformNode", "T")
    transforms.deformation_to_node(displacement, affine, linear, node)
    assert slicer_save(scene, tmp_path)
    transform = sitk.ReadTransform(str(next(tmp_path.glob("T.*"))))
    again = slicer.vtkMRMLScene()
    again.SetURL(str(tmp_path / "scene.mrml"))
    again.Import()
    index = np.random.default_rng(0).integers(0, 10, (40, 3))
    inside = nodes.apply_matrix(affine, index)
    expected = nodes.apply_matrix(linear, inside + displacement[tuple(index.T[::-1])])
    outside = inside + 400
    flip = np.array([-1, -1, 1])
    for one in (node, again.GetFirstNodeByName("T")):
        found, matrix = transforms.deformation_from_node(one, (10, 11, 12), affine)
        assert np.abs(found - displacement).max() < 1e-4
        assert np.allclose(matrix, linear)
        general = vtk.vtkGeneralTransform()
        one.GetTransformFromWorld(general)
        assert np.allclose(nodes.mapped(general, inside), expected, atol=1e-4)
    for points, target in ((inside, expected), (outside, nodes.apply_matrix(linear, outside))):
        mapped = [flip * transform.TransformPoint((flip * point).tolist()) for point in points]
        assert np.allclose(mapped, target, atol=1e-4)
    for found, put in zip(transforms.deformation_from_result(node), (displacement, affine, linear), strict=True):
        assert np.allclose(found, put, atol=1e-6)


def two_segments(scene, shape, affine):
    node = scene.AddNewNodeByClass("vtkMRMLSegmentationNode", "organs")
    node.CreateDefaultDisplayNodes()
    masks = np.zeros((2, *shape), dtype=np.uint8)
    masks[0, 4:9, 3:8, 2:6] = 1
    masks[1, 4:9, 3:8, 8:12] = 1
    for mask, name, color in zip(masks, ("liver", "spleen"), ((1, 0, 0), (0, 0, 1)), strict=True):
        add_segment(node, Volume(mask, affine, name), color)
    return node, masks


def test_segmentations_come_as_labels_on_the_image_and_go_back_with_names_and_colors(scene):
    shape = (14, 15, 16)
    parent = linear_node(scene, affine_of((1, 1, 1), rotation(0, 0, 30), (5, 0, 0)))
    image = volume_node(scene, Volume(np.zeros(shape), OBLIQUE, "image"), parent=parent)
    segmentation, masks = two_segments(scene, shape, OBLIQUE)
    segmentation.SetAndObserveTransformNodeID(parent.GetID())
    before = scene.GetNumberOfNodes()
    labels = labels_from_node(segmentation, image)
    assert scene.GetNumberOfNodes() == before
    assert np.array_equal(labels.array, masks[0] + 2 * masks[1])
    assert np.allclose(labels.affine, nodes.world_affine(image))

    copy = scene.AddNewNodeByClass("vtkMRMLSegmentationNode", "copy")
    labels_to_segmentation(labels, copy, image, segmentation)
    segments = copy.GetSegmentation()
    assert [segments.GetNthSegment(n).GetName() for n in range(2)] == ["liver", "spleen"]
    assert segments.GetNthSegment(0).GetColor() == (1, 0, 0)
    assert np.array_equal(labels_from_node(copy, image).array, labels.array)


def test_label_maps_are_read_and_empty_ones_refused(scene):
    labels = np.zeros((9, 10, 11), np.int16)
    node = volume_node(scene, Volume(labels, OBLIQUE, "empty mask"), "vtkMRMLLabelMapVolumeNode")
    with pytest.raises(InputError, match="empty mask is empty"):
        labels_from_node(node, node)
    slicer.util.arrayFromVolume(node)[3:5, 4:6, 5:7] = 3
    assert labels_from_node(node, node).array.sum() == 3 * 8


def test_labels_without_a_color_table_get_different_colors(scene):
    values = np.zeros((9, 10, 11), np.int16)
    values[2:4, 2:4, 2:4], values[5:7, 5:7, 5:7] = 1035, 1036
    node = scene.AddNewNodeByClass("vtkMRMLSegmentationNode")
    labels_to_segmentation(Volume(values, OBLIQUE), node)
    segments = [node.GetSegmentation().GetNthSegment(number) for number in range(2)]
    assert [segment.GetName() for segment in segments] == ["Label 1035", "Label 1036"]
    assert np.abs(np.subtract(*(segment.GetColor() for segment in segments))).max() > 0.3


def folded_map(scene):
    shape = (20, 21, 22)
    determinant = np.full(shape, 1.0, np.float32)
    determinant[3:5, 3:5, 3:6] = -0.2
    determinant[4, 4, 4] = -0.7
    determinant[12, 13, 14] = -0.4
    determinant[15, 15, 15] = 0
    parent = linear_node(scene, affine_of((1, 1, 1), rotation(0, 10, 0), (4, 5, 6)))
    fixed = volume_node(scene, Volume(np.zeros(shape), OBLIQUE, "fixed"), parent=parent)
    node = volume_node(scene, Volume(determinant, OBLIQUE, "jacobian"), parent=parent)
    return fixed, node, determinant


def test_folds_are_found_the_largest_in_the_body_first_at_their_place_in_the_world(scene):
    _, node, determinant = folded_map(scene)
    found = folds.find_folds(node)
    assert [fold.voxels for fold in found] == [12, 1, 1]
    assert [round(fold.determinant, 6) for fold in found] == [-0.7, -0.4, 0]
    assert np.allclose(found[0].position, (nodes.world_affine(node) @ [4, 4, 4, 1])[:3])
    assert found[0].volume_mm3 == pytest.approx(12 * 1.2 * 0.9 * 2.1)
    assert sum(fold.voxels for fold in found) == (determinant <= 0).sum()
    body = np.ones(determinant.shape, bool)
    body[:9] = False
    labels = np.zeros(determinant.shape, np.uint8)
    labels[15, 15, 15] = 3
    found = folds.find_folds(node, None, lambda: body, Labels(Volume(labels, np.eye(4)), {3: "thalamus"}))
    assert [(fold.voxels, fold.inside, fold.segment) for fold in found] == [
        (1, True, ""),
        (1, True, "thalamus"),
        (12, False, ""),
    ]


def test_folds_are_found_without_scipy(scene, monkeypatch):
    """Slicer's Python need not have it."""
    monkeypatch.setitem(sys.modules, "scipy", None)
    assert len(folds.find_folds(folded_map(scene)[1])) == 3


def test_the_body_is_what_is_not_dark_and_what_that_encloses():
    array = np.random.default_rng(1).uniform(0, 3, (20, 20, 20)).astype(np.float32)
    array[5:15, 5:15, 5:15] = 200
    array[9:11, 9:11, 9:11] = 0
    body = folds.body_of(array)
    assert body.sum() == 1000
    assert body[10, 10, 10]


def test_the_body_is_what_is_not_dark_with_its_holes_filled():
    sitk = pytest.importorskip("SimpleITK")
    rng = np.random.default_rng(2)
    for dark in rng.uniform(0, 0.9, 100):
        image = (rng.random(rng.integers(1, 9, 3)) > dark).astype(np.float32)
        image[0, 0, 0] = 0
        filled = sitk.BinaryFillhole(sitk.GetImageFromArray(image.astype(np.uint8)))
        assert np.array_equal(folds.body_of(image), sitk.GetArrayFromImage(filled) > 0)


def test_the_body_of_an_image_with_many_holes_is_found_at_once():
    image = np.random.default_rng(3).normal(0, 1, (120, 120, 120)).astype(np.float32)
    image[40:80, 40:80, 40:80] += 40
    start = time.perf_counter()
    assert 0.9 < folds.body_of(image).mean() < 1
    assert time.perf_counter() - start < 1


def test_structures_are_read_at_the_voxels_of_the_map(scene):
    _, node, determinant = folded_map(scene)
    array = np.zeros(np.array(determinant.shape) * 2, np.int16)
    array[:20], array[30:] = 7, 9
    affine = nodes.world_affine(node) @ np.diag([0.5, 0.5, 0.5, 1])
    labels = volume_node(scene, Volume(array, affine, "labels"), "vtkMRMLLabelMapVolumeNode")
    slicer.util.arrayFromVolume(node)[0, 0, 0] = np.nan
    structures = structures_on(labels, node)
    assert np.array_equal(np.unique(structures.volume.array[:10]), [7])
    assert np.array_equal(np.unique(structures.volume.array[10:15]), [0])
    table = nodes.add_node(scene, "vtkMRMLTableNode", "statistics")
    fill_statistics(table, structures, node)
    columns = {table.GetColumnName(n): n for n in range(table.GetNumberOfColumns())}

    def column(title):
        return [table.GetTable().GetValue(row, columns[title]).ToDouble() for row in range(2)]

    assert column("Voxels") == [10 * 21 * 22 - 1, 5 * 21 * 22]
    assert column("Folded voxels") == [12, 1]
    assert column("Smallest determinant") == pytest.approx([-0.7, 0])


def test_the_folding_segmentation_says_which_voxels_fold(scene):
    fixed, node, determinant = folded_map(scene)
    mask = determinant <= 0
    mask[18, 2, 2] = True
    segmentation = scene.AddNewNodeByClass("vtkMRMLSegmentationNode", "folding")
    world = Volume(mask, nodes.world_affine(node))
    folding.folding_to_segmentation(world, segmentation, fixed)
    found = folds.find_folds(node, segmentation)
    assert sum(fold.voxels for fold in found) == mask.sum()
    assert np.array_equal(labels_from_node(segmentation, fixed).array > 0, mask)


def test_a_voxel_painted_outside_the_image_hides_no_fold(scene):
    fixed, node, determinant = folded_map(scene)
    affine = nodes.world_affine(node)
    segmentation = scene.AddNewNodeByClass("vtkMRMLSegmentationNode", "folding")
    larger = np.zeros(np.add(determinant.shape, 4), bool)
    larger[2:-2, 2:-2, 2:-2] = determinant <= 0
    larger[0, 0, 0] = True
    shifted = affine.copy()
    shifted[:3, 3] -= affine[:3, :3] @ [2, 2, 2]
    folding.folding_to_segmentation(Volume(larger, shifted), segmentation, fixed)
    found = folds.find_folds(node, segmentation)
    assert sum(fold.voxels for fold in found) == (determinant <= 0).sum()


def test_folds_between_voxels_are_a_segment_of_their_own(scene):
    fixed, node, determinant = folded_map(scene)
    affine = nodes.world_affine(node)
    between = np.zeros(determinant.shape, bool)
    between[8, 8, 8:10] = True
    segmentation = scene.AddNewNodeByClass("vtkMRMLSegmentationNode", "folding")
    folding.folding_to_segmentation(Volume(determinant <= 0, affine), segmentation, fixed, Volume(between, affine))
    found = folds.find_folds(node, segmentation)
    assert [(fold.voxels, fold.between) for fold in found] == [(12, False), (1, False), (1, False), (2, True)]
    # Each is outlined in black by the second display node.
    outline = segmentation.GetNthDisplayNode(1)
    for segment in segmentation.GetSegmentation().GetSegmentIDs():
        assert list(outline.GetSegmentOverrideColor(segment)) == [0, 0, 0]
    folding.folding_to_segmentation(Volume(determinant <= 0, affine), segmentation, fixed)
    assert segmentation.GetNumberOfDisplayNodes() == 2


def test_no_folds_give_an_empty_list_and_an_empty_segment(scene):
    fixed, node, determinant = folded_map(scene)
    slicer.util.arrayFromVolume(node)[:] = 1
    segmentation = scene.AddNewNodeByClass("vtkMRMLSegmentationNode", "folding")
    folding.folding_to_segmentation(Volume(determinant > 9, nodes.world_affine(node)), segmentation, fixed)
    assert folds.find_folds(node, segmentation) == []
    assert segmentation.GetSegmentation().GetNumberOfSegments() == 1


def link(jacobian, **linked):
    """Make the map `jacobian` and the nodes `linked` one result."""
    jacobian.SetAttribute(nodes.ATTRIBUTE_PREFIX + "role", "jacobian")
    for role, node in linked.items():
        jacobian.SetNodeReferenceID(nodes.ATTRIBUTE_PREFIX + role, node.GetID())


def test_going_to_a_fold_centers_the_slices_comes_close_and_rings_it(scene):
    _, node, _ = folded_map(scene)
    link(node)
    slices = [scene.AddNewNodeByClass("vtkMRMLSliceNode", name) for name in ("Red", "Green")]
    slices[1].SetOrientationToCoronal()
    view = FoldingView(scene)
    view.show(node)
    for number, fold in enumerate(view.folds):
        for slice_node in slices:
            slice_node.SetFieldOfView(400, 200, 1)
        view.go_to(number)
        (marker,) = nodes.nodes_of_class(scene, "vtkMRMLModelNode")
        bounds = np.array(marker.GetPolyData().GetBounds()).reshape(3, 2)
        assert np.allclose(bounds.mean(axis=1), fold.position, atol=0.1)
        # The ring lies around the fold, not over it.
        assert np.ptp(bounds, axis=1).min() > 1.2 * (6 * fold.volume_mm3 / math.pi) ** (1 / 3)
        for slice_node in slices:
            matrix = slicer.util.arrayFromVTKMatrix(slice_node.GetSliceToRAS())
            assert np.allclose(matrix[:3, 3], fold.position)
            width, height, _ = slice_node.GetFieldOfView()
            assert width == pytest.approx(2 * height)
            assert np.ptp(bounds, axis=1).max() < height < 200
    view.show(None)
    assert scene.GetFirstNodeByName(MARKER_NAME) is None


def shown_color(node, determinant):
    """The color Slicer's own display pipeline gives a voxel of the map."""
    slicer.util.arrayFromVolume(node)[:] = determinant
    node.GetImageData().GetPointData().GetScalars().Modified()
    node.GetImageData().Modified()
    display = node.GetDisplayNode()
    display.GetImageDataConnection().GetProducer().Update()
    image = display.GetImageDataConnection().GetProducer().GetOutputDataObject(0)
    return np.array([image.GetScalarComponentAsDouble(1, 1, 1, channel) for channel in range(3)]) / 255


@pytest.mark.parametrize("largest", [1.25, 2.0, 4.0])
def test_only_folded_voxels_have_the_fold_color(scene, largest):
    _, node, _ = folded_map(scene)
    jacobian_colors.color_jacobian(node)
    jacobian_colors.set_range(scene, largest)
    assert jacobian_colors.current_range(scene) == (largest, False)
    fold = np.array(FOLD_COLOR)
    for determinant in (-5, -0.3, -1e-4, 0):
        assert np.abs(shown_color(node, determinant) - fold).max() < 0.01
    for determinant in (2e-3, 0.02, 0.5, 1, 2, 4, 50):
        assert np.abs(shown_color(node, determinant) - fold).max() > 0.2
    # Logarithmic, and of the one table that the overview has, too.
    for determinant, color in (
        (largest**-1.05, SMALLER_TO_LARGER[0]),
        (largest**-0.5, SMALLER_TO_LARGER[1]),
        (largest**0.5, SMALLER_TO_LARGER[3]),
        (largest, SMALLER_TO_LARGER[4]),
    ):
        assert np.abs(shown_color(node, determinant) - color).max() < 0.04


def test_the_map_is_transparent_where_nothing_changes(scene):
    for largest in (1.25, 4.0):
        colors = jacobian_colors.level_colors(largest)
        lower, upper = jacobian_colors.window(largest)
        alpha = {
            value: colors[int((value - lower) * 255 / (upper - lower)), 3]
            for value in (largest**-0.2, largest**-0.05, 1, largest**0.05, largest**0.2)
        }
        assert list(alpha.values()) == [1, 0, 0, 0, 1]
        assert set(colors[:, 3]) == {0, 1}


def test_what_nearly_folds_is_marked_where_that_is_wanted(scene):
    _, node, _ = folded_map(scene)
    jacobian_colors.color_jacobian(node)
    jacobian_colors.set_range(scene, 4.0, True)
    assert np.abs(shown_color(node, 0.05) - NEARLY_COLOR).max() < 0.01
    assert np.abs(shown_color(node, 0.13) - NEARLY_COLOR).max() > 0.3
    assert np.abs(shown_color(node, 0) - FOLD_COLOR).max() < 0.01


def test_the_legend_is_logarithmic_and_says_what_the_colors_mean(scene):
    _, node, _ = folded_map(scene)
    for _ in range(2):
        jacobian_colors.color_jacobian(node)
    (legend,) = nodes.nodes_of_class(scene, "vtkMRMLColorLegendDisplayNode")
    table = legend.GetPrimaryDisplayNode().GetColorNode()
    names = [table.GetColorName(index).strip() for index in range(table.GetNumberOfColors())]
    assert [name for name in names if name] == ["folded", "¼  smaller in moving", "½", "1", "2", "4  larger in moving"]
    at = [names.index(name) for name in names if name][1:]
    assert np.ptp(np.diff(at)) == 0
    assert legend.GetTitleText() == "volume in moving / in fixed"
    assert node.GetNumberOfDisplayNodes() == 3


def test_the_table_holds_the_figures_of_the_report(scene):
    figures = {"min": -0.7, "max": 1.0, "percentile_1": 0.4, "percentile_99": 1.2, "folded_voxels": 14}
    node = nodes.add_node(scene, "vtkMRMLTableNode", "folding")
    folding.fill_table(node, figures, {**figures, "folded_voxels": 3}, "brain")
    folding.fill_table(node, figures, {**figures, "folded_voxels": 3}, "brain")
    assert node.GetNumberOfColumns() == 3
    rows = {
        node.GetTable().GetValue(r, 0).ToString(): [node.GetTable().GetValue(r, c).ToDouble() for c in (1, 2)]
        for r in range(node.GetNumberOfRows())
    }
    assert rows["Smallest determinant"] == [-0.7, -0.7]
    assert rows["Folded voxels"] == [14, 3]
    assert node.GetTable().GetColumn(2).GetName() == "In brain"


def test_the_map_and_the_grid_reach_all_slice_views(scene):
    fixed, jacobian, _ = folded_map(scene)
    transform = scene.AddNewNodeByClass("vtkMRMLGridTransformNode")
    composites = [scene.AddNewNodeByClass("vtkMRMLSliceCompositeNode") for _ in range(3)]
    link(jacobian, fixed=fixed, transform=transform)
    compare = CompareView(scene)
    compare.choose(jacobian)
    assert (compare.role, compare.can_show("warped")) == ("", False)
    compare.show("jacobian", 0.4)
    assert compare.role == "jacobian"
    assert {c.GetBackgroundVolumeID() for c in composites} == {fixed.GetID()}
    assert {c.GetForegroundVolumeID() for c in composites} == {jacobian.GetID()}
    assert {c.GetForegroundOpacity() for c in composites} == {0.4}
    view = FoldingView(scene)
    view.show(jacobian)
    assert not view.grid_visible
    view.show_grid(True)
    display = transform.GetDisplayNode()
    assert display.GetVisibility2D()
    assert display.GetVisualizationMode() == slicer.vtkMRMLTransformDisplayNode.VIS_MODE_GRID
    view.show_grid(False)
    assert not display.GetVisibility()


@pytest.mark.parametrize("kind", ["vtkMRMLGridTransformNode", "vtkMRMLTransformNode"])
def test_the_grid_of_another_result_is_hidden_whatever_transform_node_it_is(scene, kind):
    transforms_of_results, maps = [], []
    for _ in range(2):
        fixed, jacobian, determinant = folded_map(scene)
        transform = scene.AddNewNodeByClass(kind)
        affine = nodes.world_affine(jacobian)
        transforms.deformation_to_node(bump(determinant.shape, affine), affine, np.eye(4), transform)
        transform.SetAttribute(nodes.ATTRIBUTE_PREFIX + "role", "transform")
        link(jacobian, fixed=fixed, transform=transform)
        transforms_of_results.append(transform)
        maps.append(jacobian)
    view = FoldingView(scene)
    view.show(maps[0])
    view.show_grid(True)
    view.show(maps[1])
    assert [transform.GetDisplayNode().GetVisibility() for transform in transforms_of_results] == [0, 1]


def test_the_views_are_where_they_were_when_the_result_is_left_unless_they_were_moved(scene):
    fixed, jacobian, _ = folded_map(scene)
    scene.AddNewNodeByClass("vtkMRMLSliceCompositeNode")
    link(jacobian, fixed=fixed)
    views = [scene.AddNewNodeByClass("vtkMRMLSliceNode", name) for name in ("Red", "Green")]
    for view in views:
        view.SetFieldOfView(30, 20, 1)
        view.SetXYZOrigin(3, 2, 0)
        view.JumpSliceByCentering(1, 2, 3)
    places = [picture_place(view) for view in views]

    def fit():
        for view in views:
            view.SetFieldOfView(200, 150, 1)
            view.SetXYZOrigin(0, 0, 0)
            view.JumpSliceByCentering(10, 20, 30)

    compare = CompareView(scene)
    compare.choose(jacobian)
    compare.show("jacobian", 0.5, fit)
    assert picture_place(views[0]) != places[0]
    # Another result, fitted again, changes nothing of what the user's own view was.
    compare.show("jacobian", 0.5, fit)
    views[1].JumpSliceByCentering(-5, 0, 0)
    moved = picture_place(views[1])
    compare.show("")
    assert picture_place(views[0]) == places[0]
    assert picture_place(views[1]) == moved
    # Layers that the user chose end the comparison as well; where the views are then is where they go back to.
    compare.show("jacobian", 0.5, fit)
    composite = scene.GetFirstNodeByClass("vtkMRMLSliceCompositeNode")
    composite.SetForegroundVolumeID(None)
    chosen = picture_place(views[0])
    compare.show("jacobian", 0.5, fit)
    compare.show("")
    assert picture_place(views[0]) == chosen != places[0]


def picture_place(view):
    to_ras = [round(view.GetXYToRAS().GetElement(row, column), 9) for row in range(4) for column in range(4)]
    return view.GetFieldOfView(), to_ras


def loss(similarity, regularity):
    return {"index": 0, "similarity": similarity, "regularity": regularity}


def test_the_loss_plot_grows_by_the_steps(scene):
    plot = LossPlot(scene, "moving to fixed")
    plot.show([], total=50)
    series = [plot.chart.GetNthPlotSeriesNode(number) for number in range(2)]
    # The next level numbers its steps from zero again.
    steps = [loss(0.9, 0.0), loss(0.8, 2e-3), loss(0.7, 2e-3)]
    plot.show(steps[:1], total=50)
    assert {each.GetLineStyle() for each in series} == {series[0].LineStyleNone}
    plot.show(steps[:2], total=50)
    assert {each.GetLineStyle() for each in series} == {series[0].LineStyleSolid}
    plot.show(steps, total=50)
    table = plot.table.GetTable()
    assert [table.GetValueByName(row, "Step").ToDouble() for row in range(table.GetNumberOfRows())] == [0, 1, 2]
    assert table.GetValueByName(1, "Regularity loss").ToDouble() == pytest.approx(2e-3)
    assert math.isnan(table.GetValueByName(0, "Regularity loss").ToDouble())
    assert plot.chart.GetNumberOfPlotSeriesNodes() == 2


def test_the_axes_of_the_loss_plot_hold_all_steps(scene):
    """A plot view does not fit them to a table that grows."""
    plot = LossPlot(scene, "moving to fixed")
    steps = []
    for similarity, regularity in ((0.9, 0.0), (0.8, 2e-3), (0.01, 0.5)):
        steps.append(loss(similarity, regularity))
        plot.show(steps, total=20)
        assert not plot.chart.GetXAxisRangeAuto()
        assert not plot.chart.GetYAxisRangeAuto()
        assert plot.chart.GetXAxisRange() == (0, 19)
        low, high = plot.chart.GetYAxisRange()
        assert 0 < low < min(value for value in (similarity, regularity) if value > 0)
        assert high > 0.9


def test_the_histogram_counts_the_voxels(scene):
    determinant = folded_map(scene)[2]
    determinant[19, 20, :5] = np.nan
    chart = add_histogram(scene, "map", determinant)
    table = chart.GetNthPlotSeriesNode(0).GetTableNode().GetTable()
    rows = [[table.GetValue(row, column).ToDouble() for column in (0, 1)] for row in range(table.GetNumberOfRows())]
    folded = sum(count for place, count in rows if place <= 0 and count >= 1)
    assert folded == (determinant < 0).sum()
    assert max(rows, key=lambda row: row[1])[0] == pytest.approx(1, abs=0.02)


def test_a_saved_scene_holds_how_its_results_were_made(scene, tmp_path):
    report = {"settings": {"steps": 50, "note": 'a;b: "c" <d>\n'}, "similarity": 0.25}
    affine = affine_of((2, 2, 2), rotation(3, 4, 5), (0, 0, 0))
    displacement = bump((10, 11, 12), affine)
    transform = scene.AddNewNodeByClass("vtkMRMLGridTransformNode", "T")
    transforms.deformation_to_node(displacement, affine, np.eye(4), transform)
    nodes.remember(transform, report=report)
    _, jacobian, determinant = folded_map(scene)
    jacobian_colors.color_jacobian(jacobian)
    assert slicer_save(scene, tmp_path)

    again = slicer.vtkMRMLScene()
    again.SetURL(str(tmp_path / "scene.mrml"))
    again.Import()
    node = again.GetFirstNodeByName("T")
    assert nodes.recall(node, "report") == report
    sampled, _ = transforms.deformation_from_node(node, (10, 11, 12), affine)
    assert np.abs(sampled - displacement).max() < 1e-4
    loaded = again.GetFirstNodeByName("jacobian")
    assert np.array_equal(slicer.util.arrayFromVolume(loaded), determinant)
    assert np.abs(shown_color(loaded, -0.5) - FOLD_COLOR).max() < 0.01
    assert loaded.GetDisplayNode().GetColorNode().GetName() == jacobian_colors.COLOR_TABLE_NAME


def slicer_save(scene, folder):
    """Save every storable node, then the scene, as Slicer's Save dialog does."""
    scene.SetRootDirectory(str(folder))
    scene.SetURL(str(folder / "scene.mrml"))
    written = True
    for node in [scene.GetNthNode(n) for n in range(scene.GetNumberOfNodes())]:
        if not node.IsA("vtkMRMLStorableNode") or not node.GetSaveWithScene():
            continue
        node.AddDefaultStorageNode()
        storage = node.GetStorageNode()
        if storage is None:
            continue
        name = node.GetName().replace(" ", "_")
        storage.SetFileName(str(folder / f"{name}.{storage.GetDefaultWriteFileExtension()}"))
        written = bool(storage.WriteData(node)) and written
    return written and bool(scene.Commit())
