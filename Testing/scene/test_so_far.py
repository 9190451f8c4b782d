"""The result so far in the scene while a registration runs: by the real worker, in slicer-core's real scene."""

import numpy as np
import pytest
import slicer
from scene_tools import add_pair, image, sessions, wait_until
from scipy.spatial.transform import Rotation

from GradProjIOLib.geometry.lattice import lattice_points
from GradProjIOLib.registration.register import register
from GradProjIOLib.scene import nodes as mrml
from GradProjIOLib.scene.inputs import Inputs
from GradProjIOLib.scene.transforms import deformation_from_result
from GradProjIOLib.spatial.deformation import Deformation
from GradProjIOLib.worker.so_far import MOST_SAMPLES, coarse

REFINED = {"model": "none", "refine_steps": 25, "device": "cpu"}


@pytest.fixture
def session(worker, folder, monkeypatch):
    monkeypatch.setattr("GradProjIOLib.scene.session.SECONDS", 0.0)
    yield from sessions(worker)


def turned(scene):
    node = scene.AddNewNodeByClass("vtkMRMLLinearTransformNode", "parent")
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_euler("xyz", (20, -10, 35), degrees=True).as_matrix()
    matrix[:3, 3] = 4, -3, 6
    node.SetMatrixTransformToParent(slicer.util.vtkMatrixFromArray(matrix))
    return node


@pytest.mark.parametrize("oblique", [False, True])
def test_the_views_show_what_is_reached_and_the_run_is_the_same(session, oblique):
    scene = session.scene
    fixed, moving = add_pair(scene)
    if oblique:
        for node in (fixed, moving):
            node.SetAndObserveTransformNodeID(turned(scene).GetID())
    count = scene.GetNumberOfNodes()
    session.start(Inputs(fixed, moving), REFINED, so_far=True)
    found = []

    def look():
        session.poll()
        if session.active and session.so_far.node is not None:
            transform = mrml.linked(session.so_far.node, "transform")
            found.append((session.so_far.node, deformation_from_result(transform)))

    wait_until(lambda: not session.active, look)
    nodes = {node for node, _ in found}
    different = {field[0].tobytes() for _, field in found}
    assert len(nodes) == 1
    assert len(different) > 1
    (node,) = nodes
    # Not a copy of the voxels, and it lies under the transform where the moving image lies in the world.
    assert node.GetImageData() is moving.GetImageData()
    np.testing.assert_allclose(mrml.local_affine(node), mrml.world_affine(moving), atol=1e-9)
    assert not node.GetSaveWithScene()
    last = Deformation(*found[-1][1])
    final = Deformation(*deformation_from_result(session.results["transform"]))
    first = Deformation(*found[0][1])
    inside = lattice_points((5, 5, 5), mrml.world_affine(fixed) @ np.diag([3, 3, 3, 1])).reshape(-1, 3)
    off = [np.linalg.norm(one.map_points(inside) - final.map_points(inside), axis=1).mean() for one in (first, last)]
    assert off[1] < off[0]
    session.forget_so_far()
    added = scene.GetNumberOfNodes() - count
    with_it = mrml.recall(session.results["transform"], "report")["similarity"]
    without = mrml.recall(session.run(Inputs(fixed, moving), REFINED)["transform"], "report")["similarity"]
    assert with_it == without
    # Nothing is left of it, compared with the run without; the colors were made once.
    colors = set(mrml.nodes_of_class(scene, "vtkMRMLColorNode"))
    assert added - len(colors) == scene.GetNumberOfNodes() - count - added


def test_a_canceled_run_ends_it(session):
    scene = session.scene
    session.start(Inputs(*add_pair(scene)), REFINED | {"refine_steps": 300}, so_far=True)
    wait_until(lambda: session.so_far.node is not None, session.poll)
    session.cancel()
    wait_until(lambda: not session.active, session.poll)
    seen = scene.GetNumberOfNodes()
    session.forget_so_far()
    assert scene.GetNumberOfNodes() < seen
    session.keep()
    assert session.results


def test_who_removes_it_has_peace(session):
    scene = session.scene
    session.start(Inputs(*add_pair(scene)), REFINED | {"refine_steps": 40}, so_far=True)
    wait_until(lambda: session.so_far.node is not None, session.poll)
    scene.RemoveNode(session.so_far.node)
    session.wait()
    assert session.results
    assert session.so_far.node is None


def test_going_on_leaves_the_result_alone_on_its_way(session):
    scene = session.scene
    result = session.run(Inputs(*add_pair(scene)), REFINED | {"refine_steps": 3})
    before = deformation_from_result(result["transform"])[0].copy()
    session.go_on(result["transform"], 100, so_far=True)
    wait_until(lambda: session.so_far.node is not None, session.poll)
    np.testing.assert_array_equal(deformation_from_result(result["transform"])[0], before)
    session.stop_now()


def test_few_samples_are_sent_and_they_lie_where_they_lay():
    rng = np.random.default_rng(0)
    affine = np.diag([1.5, 1.5, 2.0, 1.0])
    fine = Deformation(rng.normal(size=(90, 80, 70, 3)).astype(np.float32), affine)
    few = coarse(fine)
    assert few.displacement[..., 0].size <= MOST_SAMPLES
    points = lattice_points(few.shape, few.affine).reshape(-1, 3)
    np.testing.assert_allclose(few.map_points(points), fine.map_points(points), atol=1e-4)
    assert coarse(few).shape == few.shape


def test_each_stage_and_level_says_that_it_starts():
    pair = image("fixed"), image("moving", shift=2.0)
    started = []
    settings = {"model": "compact", "steps": 1, "refine_steps": 2, "device": "cpu", "lattice": (16, 16, 16)}
    found = register(*pair, **settings, on_start=lambda running: started.append(running.forward()))
    assert len(started) == 1 + len(found.report["levels"])
    # Each begins where the one before has ended.
    longest = [float(np.abs(one.displacement).max()) for one in started]
    assert longest[1] != longest[2]
