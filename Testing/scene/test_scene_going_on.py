"""A result of the scene goes on: by the real worker, in slicer-core's real scene, and with a stand-in."""

import numpy as np
import pytest
from scene_tools import QUICK, ScriptedWorker, add, add_pair, image, sessions

from GradProjIOLib.errors import InputError
from GradProjIOLib.geometry.volume import Volume
from GradProjIOLib.scene import nodes as mrml
from GradProjIOLib.scene.going_on import ResultToGoOn
from GradProjIOLib.scene.inputs import Inputs
from GradProjIOLib.scene.session import State
from GradProjIOLib.scene.transforms import deformation_from_result

REFINED = {"model": "none", "refine_steps": 4, "device": "cpu"}


@pytest.fixture
def session(worker, folder):
    yield from sessions(worker)


@pytest.fixture
def scripted(folder):
    yield from sessions(ScriptedWorker())


def displacement(nodes):
    return deformation_from_result(nodes["transform"])[0]


def report_of(nodes):
    return mrml.recall(nodes["jacobian"], "report")


def test_a_refined_result_is_filled_anew_and_matches_better(session):
    scene = session.scene
    fixed, moving = add_pair(scene)
    mask = add(
        scene, Volume(np.ones((17, 18, 20), np.uint8), image("fixed").affine, "mask"), "vtkMRMLLabelMapVolumeNode"
    )
    first = session.run(Inputs(fixed, moving, fixed_mask=mask), REFINED)
    before, count = report_of(first), scene.GetNumberOfNodes()
    found = session.run_on(first["warped"], 6)
    after = report_of(found)
    assert {role: node.GetID() for role, node in found.items()} == {role: node.GetID() for role, node in first.items()}
    assert scene.GetNumberOfNodes() == count
    assert after["similarity"] < before["similarity"]
    assert after["similarity_before"] == pytest.approx(before["similarity_before"])
    assert after["continued_after"] == [len(before["steps"])]
    assert len(session.steps) == session.total == 6
    assert "fixed_mask" in after["inputs"]
    assert "jacobian_in_mask" in after
    assert session.status().startswith("Done: ")


def test_a_network_goes_on_exactly_while_the_worker_keeps_its_state(session):
    inputs = Inputs(*add_pair(session.scene))
    whole = displacement(session.run(inputs, QUICK | {"steps": 4}))
    half = session.run(inputs, QUICK | {"steps": 2})
    found = session.run_on(half["jacobian"], 2)
    assert np.array_equal(displacement(found), whole)
    assert session.progress() == "Network, step 4 of 4"
    assert report_of(found)["warnings"] == report_of(half)["warnings"]
    # Another registration in between, and the state is gone.
    session.run(inputs, REFINED | {"refine_steps": 1})
    again = report_of(session.run_on(found["jacobian"], 2))
    assert [step["stage"] for step in again["steps"]][:5] == ["network"] * 4 + ["refinement"]
    assert "went on by refinement" in session.status()


def test_canceling_offers_what_was_reached(session):
    first = session.run(Inputs(*add_pair(session.scene)), REFINED)
    before = displacement(first).copy()
    session.go_on(first["jacobian"], 300)
    while session.active:
        session.poll()
        if session.steps and session.state is State.RUNNING:
            session.cancel()
    assert session.state is State.OFFERED
    assert np.array_equal(displacement(first), before)
    session.keep()
    assert not np.array_equal(displacement(first), before)
    assert report_of(first)["stopped"] == "by request"
    assert session.status().startswith(f"Stopped after {len(session.steps)} of 300 steps: ")


def test_a_deformation_to_start_from_is_taken_again_from_its_node(session):
    scene = session.scene
    fixed, moving = add_pair(scene)
    bent = session.run(Inputs(fixed, moving), REFINED | {"refine_steps": 2})["transform"]
    second = session.run(Inputs(fixed, moving, initial_transform=bent), REFINED)
    before = report_of(second)
    assert before["initial_transform"] is None
    after = report_of(session.run_on(second["transform"], 6))
    assert after["similarity"] < before["similarity"]
    scene.RemoveNode(bent)
    with pytest.raises(InputError, match="The initial transform of this result is not in the scene any more"):
        ResultToGoOn(second["transform"]).check()


class TestRefusals:
    def test_no_result(self, scripted):
        with pytest.raises(InputError, match="no result with both transforms"):
            scripted.go_on(None, 3)
        fixed, _ = add_pair(scripted.scene)
        scripted.attempt(scripted.go_on, fixed, 3)
        assert "no result with both transforms" in scripted.status()

    def test_an_image_that_was_removed_or_moved(self, scripted):
        fixed, moving = add_pair(scripted.scene)
        result = scripted.run(Inputs(fixed, moving), {})["jacobian"]
        moving.SetOrigin(5, 0, 0)
        with pytest.raises(RuntimeError, match="moving has been moved since the registration; put it back"):
            scripted.run_on(result, 3)
        moving.SetOrigin(0, 0, 0)
        assert scripted.run_on(result, 3)
        scripted.scene.RemoveNode(moving)
        with pytest.raises(InputError, match="The moving image of this result is not in the scene any more"):
            scripted.go_on(result, 3)

    def test_a_transform_that_became_something_else(self, scripted):
        nodes = scripted.run(Inputs(*add_pair(scripted.scene)), {})
        parent = scripted.scene.AddNewNodeByClass("vtkMRMLLinearTransformNode", "parent")
        nodes["transform"].SetAndObserveTransformNodeID(parent.GetID())
        with pytest.raises(InputError, match="is not as the registration left it"):
            scripted.go_on(nodes["jacobian"], 3)
        assert scripted.state is State.IDLE

    def test_labels_that_were_removed(self, scripted):
        scene = scripted.scene
        fixed, moving = add_pair(scene)
        labels = Volume((image("moving").array > 100).astype(np.uint8), image("moving").affine, "labels")
        node = add(scene, labels, "vtkMRMLLabelMapVolumeNode")
        result = scripted.run(Inputs(fixed, moving, moving_labels=node), {})["jacobian"]
        assert "warped_labels" in scripted.run_on(result, 3)
        scene.RemoveNode(node)
        with pytest.raises(InputError, match="The moving labels of this result"):
            scripted.go_on(result, 3)
