"""Registrations from nodes to nodes by the real worker, in slicer-core's real scene."""

import json
import os
import random
import signal
import time

import numpy as np
import pytest
import slicer
import torch
from scene_tools import (
    OBLIQUE,
    QUICK,
    ScriptedWorker,
    add,
    add_pair,
    exchange_folders,
    image,
    is_alive,
    new_worker,
    right_angled,
    sessions,
    wait_until,
)
from scipy import ndimage

from GradProjIOLib.errors import InputError
from GradProjIOLib.geometry.lattice import apply_matrix, lattice_points
from GradProjIOLib.geometry.volume import Volume
from GradProjIOLib.scene import folding
from GradProjIOLib.scene import nodes as mrml
from GradProjIOLib.scene.folds import find_folds
from GradProjIOLib.scene.inputs import Inputs
from GradProjIOLib.scene.labels import add_segment, labels_from_node
from GradProjIOLib.scene.nodes import linked
from GradProjIOLib.scene.session import SceneRegistration, State, Tone
from GradProjIOLib.scene.transforms import deformation_from_node
from GradProjIOLib.worker import protocol


@pytest.fixture
def session(worker, folder):
    yield from sessions(worker)


def parent_node(scene):
    node = scene.AddNewNodeByClass("vtkMRMLLinearTransformNode", "table position")
    matrix = right_angled(np.array([[0.9, 0.3, 0.1, 8], [-0.3, 0.95, 0, -5], [0, 0.1, 1, 6], [0, 0, 0, 1.0]]))
    matrix[:3, :3] /= np.linalg.norm(matrix[:3, :3], axis=0)
    node.SetMatrixTransformToParent(slicer.util.vtkMatrixFromArray(matrix))
    return node


def box_mask(scene, volume, name="brain"):
    array = np.zeros(volume.shape, np.uint8)
    array[4:-4, 4:-4, 4:-4] = 1
    return add(scene, Volume(array, volume.affine, name), "vtkMRMLLabelMapVolumeNode")


def test_moving_under_the_transform_equals_the_registered_volume(session, folder, tmp_path):
    """Oblique, anisotropic, each below its own parent; the two paths differ only by interpolation."""
    from GradProjIOLib.models import registry

    scene = session.scene
    fixed_volume = image("fixed", affine=right_angled(OBLIQUE))
    other = right_angled(OBLIQUE[:, [1, 0, 2, 3]] * [1.1, -0.9, 1.0, 1.0])
    shape = (18, 20, 19)
    middle = (fixed_volume.affine @ [9.5, 8.5, 8.0, 1])[:3]
    other[:3, 3] = middle - other[:3, :3] @ [9.0, 9.5, 8.5]
    moving_volume = image("moving", shift=2.5, shape=shape, affine=other)
    fixed = add(scene, fixed_volume, parent=parent_node(scene))
    moving = add(scene, moving_volume, parent=parent_node(scene))
    # From the identity, so that how far things move, and with it how much they are blurred, is not up to training.
    weights = tmp_path / "weights.pt"
    torch.save(registry.build(registry.find("compact")).state_dict(), weights)
    settings = QUICK | {"steps": 6, "weights": str(weights), "learning_rate": 1e-3}
    nodes = session.run(Inputs(fixed, moving), settings)

    warped = mrml.volume_from_node(nodes["warped"])
    assert np.allclose(warped.affine, fixed_volume.affine)
    # The moving image, read once where MRML's transform says, is the registered volume.
    mapped = lattice_points(warped.shape, warped.affine) + nodes_displacement(nodes["transform"], warped)
    placed = mrml.volume_from_node(moving)
    indices = apply_matrix(np.linalg.inv(placed.affine), mapped)
    read = ndimage.map_coordinates(placed.array, np.moveaxis(indices[..., ::-1], -1, 0), order=1, mode="nearest")
    covered = ((indices >= 0) & (indices <= np.array(placed.shape[::-1]) - 1)).all(axis=-1)
    assert covered.mean() > 0.5
    assert np.abs(read - warped.array)[covered].max() < 1e-4 * np.ptp(warped.array)

    moving.HardenTransform()
    moving.SetAndObserveTransformNodeID(nodes["transform"].GetID())
    hardened = mrml.volume_from_node(moving)
    from GradProjIOLib.spatial.deformation import Deformation

    still = Deformation.from_linear(np.eye(4), (2, 2, 2), np.diag([1, 1, 1, 1.0]))
    shown = still.warp(hardened, warped).array
    inside = (slice(4, -4),) * 3
    difference = np.abs(shown - warped.array)[inside]
    # Drawing the moving image once more blurs it; that alone costs this much.
    blur = np.abs(still.warp(moving_volume, hardened).array - hardened.array).max()
    assert difference.mean() < 0.02 * np.ptp(warped.array)
    assert difference.max() < 0.1 * np.ptp(warped.array) + blur
    moved = np.abs(nodes_displacement(nodes["transform"], fixed_volume)).max()
    assert moved > 0.5

    # Registering did change something, and in the right direction.
    before = np.abs(still.warp(moving_volume, fixed_volume).array - fixed_volume.array)[inside].mean()
    assert np.abs(warped.array - fixed_volume.array)[inside].mean() < before


def nodes_displacement(node, volume):
    from GradProjIOLib.spatial.deformation import Deformation

    points = lattice_points(volume.shape, volume.affine)
    return Deformation(*deformation_of(node, volume)).map_points(points) - points


def deformation_of(node, volume):
    displacement, matrix = deformation_from_node(node, volume.shape, volume.affine)
    return displacement, volume.affine, matrix


def test_map_segmentation_table_and_report_agree_also_in_the_mask(session):
    fixed, moving = add_pair(session.scene)
    mask = box_mask(session.scene, image("fixed"))
    # Much too large steps without smoothness: this folds.
    settings = QUICK | {"steps": 4, "learning_rate": 3e-2, "regularity_weight": 0.0}
    nodes = session.run(Inputs(fixed, moving, fixed_mask=mask), settings)
    report = mrml.recall(nodes["jacobian"], "report")
    figures, masked = report["jacobian"], report["jacobian_in_mask"]
    determinant = slicer.util.arrayFromVolume(nodes["jacobian"])
    folded = labels_from_node(nodes["folding"], fixed).array == 1
    assert figures["folded_voxels"] == folded.sum() > 10
    assert figures["min"] == pytest.approx(determinant.min())
    assert figures["max"] == pytest.approx(determinant.max())
    assert figures["percentile_1"] == pytest.approx(np.percentile(determinant, 1))
    inside = slicer.util.arrayFromVolume(mask) > 0
    assert masked["folded_voxels"] == (folded & inside).sum()
    assert masked["min"] == pytest.approx(determinant[inside].min())
    table = nodes["table"].GetTable()
    shown = {table.GetValue(row, 0).ToString(): row for row in range(table.GetNumberOfRows())}
    assert table.GetValue(shown["Folded voxels"], 1).ToDouble() == folded.sum()
    assert table.GetValue(shown["Folded voxels"], 2).ToDouble() == masked["folded_voxels"]
    assert table.GetColumn(2).GetName() == "In brain"
    folds = [fold for fold in find_folds(nodes["jacobian"], nodes["folding"]) if not fold.between]
    assert sum(fold.voxels for fold in folds) == folded.sum()
    assert len(folds) == figures["folded_regions"]


def test_nodes_hold_what_the_command_writes(session, tmp_path):
    from GradProjIOLib.commands import main
    from GradProjIOLib.geometry.image_files import read_volume, write_volume
    from GradProjIOLib.models import registry
    from GradProjIOLib.spatial.deformation import Deformation

    fixed, moving = add_pair(session.scene)
    weights = tmp_path / "weights.pt"
    torch.save(registry.build(registry.find("compact")).state_dict(), weights)
    nodes = session.run(Inputs(fixed, moving), QUICK | {"weights": str(weights)})
    paths = [tmp_path / f"{node.GetName()}.nrrd" for node in (fixed, moving)]
    for node, path in zip((fixed, moving), paths, strict=True):
        write_volume(mrml.volume_from_node(node), path)
    torch.set_num_threads(1)
    command = ["register", *map(str, paths), "-o", str(tmp_path / "out")]
    command += ["--model", "compact", "--weights", str(weights)]
    assert main.main([*command, "--steps", "2", "--refine-steps", "0", "--device", "cpu", "--quiet"]) == 0
    for role in ("warped", "jacobian"):
        written = read_volume(tmp_path / "out" / f"{role}.nii.gz").array
        shown = slicer.util.arrayFromVolume(nodes[role])
        assert np.abs(shown - written).max() < 1e-5 * np.ptp(written)
    for role, name in (("transform", "transform"), ("inverse", "inverse_transform")):
        written = Deformation.read(tmp_path / "out" / f"{name}.h5")
        shown, matrix = deformation_from_node(nodes[role], written.shape, written.affine)
        assert np.abs(shown - written.displacement).max() < 1e-3
        assert np.allclose(matrix, written.matrix)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    ours = mrml.recall(nodes["transform"], "report")
    assert report["jacobian"] == pytest.approx(ours["jacobian"])
    assert report["settings"] == ours["settings"]


def test_only_what_is_wanted_is_made_and_chosen_nodes_are_filled(session):
    fixed, moving = add_pair(session.scene)
    target = session.scene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", "my output")
    nodes = session.run(Inputs(fixed, moving), QUICK, {"warped": target, "transform": None})
    assert set(nodes) == {"warped", "transform"}
    assert nodes["warped"] is target
    assert target.GetImageData().GetDimensions() == fixed.GetImageData().GetDimensions()
    assert linked(target, "transform") is nodes["transform"]
    assert linked(target, "fixed") is fixed


def test_segmentations_are_carried_over_with_their_names(session):
    fixed, moving = add_pair(session.scene)
    segmentation = session.scene.AddNewNodeByClass("vtkMRMLSegmentationNode", "organs")
    volume = image("moving")
    array = np.zeros(volume.shape, np.uint8)
    array[6:12, 6:12, 6:14] = 1
    add_segment(segmentation, Volume(array, volume.affine, "liver"), (0.8, 0.2, 0.1))
    nodes = session.run(Inputs(fixed, moving, moving_labels=segmentation), QUICK)
    carried = nodes["warped_labels"]
    assert carried.GetSegmentation().GetNthSegment(0).GetName() == "liver"
    overlap = labels_from_node(carried, fixed).array > 0
    assert overlap.sum() > 0.5 * array.sum()


def test_an_initial_transform_becomes_part_of_the_result(session):
    scene = session.scene
    fixed_volume, moved = image("fixed"), image("moving")
    matrix = np.eye(4)
    matrix[:3, 3] = [12, -9, 6]
    far = Volume(moved.array, matrix @ moved.affine, "moving")
    fixed, moving = add(scene, fixed_volume), add(scene, far)
    initial = scene.AddNewNodeByClass("vtkMRMLLinearTransformNode", "by hand")
    initial.SetMatrixTransformToParent(slicer.util.vtkMatrixFromArray(np.linalg.inv(matrix)))
    near = session.run(Inputs(fixed, add(scene, moved)), QUICK | {"steps": 0})
    nodes = session.run(Inputs(fixed, moving, initial_transform=initial), QUICK | {"steps": 0})
    shown, expected = (nodes_displacement(found["transform"], fixed_volume) for found in (nodes, near))
    assert np.allclose(shown, expected + matrix[:3, 3], atol=0.05)
    moving.SetAndObserveTransformNodeID(initial.GetID())
    with pytest.raises(InputError, match="by hand"):
        session.start(Inputs(fixed, moving, initial_transform=initial), QUICK)


def bad_nodes(scene, broken):
    """A fixed node with something wrong, which is called "my scan"."""
    good = image("my scan")
    array, affine = good.array.copy(), good.affine
    if broken == "NaN":
        array[5, 5, 5] = np.nan
    elif broken == "infinity":
        array[5, 5, 5] = np.inf
    elif broken == "constant":
        array[:] = 7
    elif broken == "tiny":
        array = array[:4]
    elif broken == "labels":
        array = np.zeros(good.shape, np.int16)
        array[4:9, 4:9, 4:9], array[9:14, 4:14, 4:14] = 1, 2
    node = add(scene, Volume(array, affine, "my scan"))
    if broken == "singular":
        directions = np.eye(4)
        directions[:3, 1] = directions[:3, 0]
        node.SetIJKToRASMatrix(slicer.util.vtkMatrixFromArray(directions))
    return node


@pytest.mark.parametrize("broken", ["NaN", "infinity", "constant", "tiny", "singular"])
def test_a_bad_node_ends_in_a_sentence_that_names_it(session, broken):
    _, moving = add_pair(session.scene)
    nodes = session.scene.GetNumberOfNodes()
    session.attempt(session.start, Inputs(bad_nodes(session.scene, broken), moving), QUICK)
    session.wait()
    assert "my scan" in session.message
    assert "Traceback" not in session.message
    assert session.results == {}
    assert session.scene.GetNumberOfNodes() == nodes + 2  # the bad node and its display


def test_an_image_that_looks_like_labels_is_registered_with_a_warning(session):
    _, moving = add_pair(session.scene)
    session.run(Inputs(bad_nodes(session.scene, "labels"), moving), QUICK)
    assert "my scan looks like a label map" in session.message


def test_unknown_settings_and_devices_give_a_sentence(session):
    fixed, moving = add_pair(session.scene)
    for settings, word in (({"device": "cuda:7"}, "cuda:7"), ({"steps": -1}, "-1"), ({"speed": 3}, "speed")):
        session.attempt(session.start, Inputs(fixed, moving), QUICK | settings)
        session.wait()
        assert word in session.message


def start_computing(session, steps=200):
    fixed, moving = add_pair(session.scene)
    session.start(Inputs(fixed, moving), QUICK | {"steps": steps})
    wait_until(lambda: session.steps, session.poll)
    return fixed, moving


def test_cancel_ends_within_a_step_and_the_result_so_far_can_be_kept(session):
    start_computing(session)
    done = len(session.steps)
    session.cancel()
    assert session.state is State.CANCELING
    wait_until(lambda: session.state is State.OFFERED, session.poll)
    assert len(session.steps) <= done + 3  # those not reported yet, and the one under way
    assert session.results == {}
    session.keep()
    assert {"transform", "warped", "jacobian"} <= set(session.results)
    report = mrml.recall(session.results["transform"], "report")
    assert report["stopped"] == "by request"
    assert len(report["steps"]) == len(session.steps)


def test_a_discarded_result_leaves_nothing(session, folder):
    start_computing(session)
    nodes = session.scene.GetNumberOfNodes()
    session.cancel()
    wait_until(lambda: session.state is State.OFFERED, session.poll)
    session.discard()
    assert session.scene.GetNumberOfNodes() == nodes
    assert exchange_folders(folder) == []
    assert session.client.running


def test_a_second_cancel_ends_it_at_once(session):
    start_computing(session)
    pid = session.client.pid
    session.cancel()
    session.cancel()
    assert session.state is State.IDLE
    assert not is_alive(pid)


def test_a_killed_worker_is_reported_and_the_next_run_works(session):
    fixed, moving = start_computing(session)
    os.kill(session.client.pid, signal.SIGKILL)
    wait_until(lambda: not session.active, session.poll)
    assert "ended unexpectedly" in session.message
    assert session.run(Inputs(fixed, moving), QUICK)["transform"] is not None


def test_nodes_that_vanish_during_the_run_do_no_harm(session):
    fixed, moving = add_pair(session.scene)
    target = session.scene.AddNewNodeByClass("vtkMRMLGridTransformNode", "chosen")
    session.start(Inputs(fixed, moving), QUICK, {"transform": target, "warped": None, "jacobian": None})
    for node in (fixed, moving, target):
        session.scene.RemoveNode(node)
    session.wait()
    assert session.results["transform"].GetName() == "Transform moving to fixed"
    assert session.results["warped"].GetImageData() is not None


def test_a_second_run_uses_the_same_process(session):
    fixed, moving = add_pair(session.scene)
    session.run(Inputs(fixed, moving), QUICK)
    pid = session.client.pid
    session.run(Inputs(fixed, moving), QUICK)
    assert session.client.pid == pid


def test_starting_copies_each_volume_once_and_waits_for_nothing(session, monkeypatch):
    """So the panel is responsive again as soon as the volumes are copied."""
    nodes, written, write = add_pair(session.scene), [], protocol.write_volume

    def recorded(volume, *arguments):
        written.append(volume.array)
        return write(volume, *arguments)

    monkeypatch.setattr(protocol, "write_volume", recorded)
    session.start(Inputs(*nodes), QUICK)
    assert session.state is State.STARTING
    assert len(written) == 2
    for array, node in zip(written, nodes, strict=True):
        assert np.shares_memory(array, slicer.util.arrayFromVolume(node))
    session.stop_now()


def test_missing_weights_are_a_question_not_a_failure(session):
    fixed, moving = add_pair(session.scene)
    session.start(Inputs(fixed, moving), QUICK | {"model": "unigradicon"})
    session.wait()
    assert "283 MB" in session.question
    assert "/nonexistent/gradprojio" in session.question


class ClientWithGivenEvents(ScriptedWorker):
    """A client without a process: its events are those that the test gives it."""

    def __init__(self, *events):
        super().__init__()
        self.events, self.canceled = [{"event": "started", "id": 1, "total": 13, "levels": [4, 4]}, *events], []

    def submit(self, request):
        self.request = request
        return 1

    def poll(self):
        events, self.events = self.events, []
        return events

    def cancel(self, number):
        self.canceled.append(number)


def test_a_download_shows_its_progress_and_can_be_canceled(folder):
    client = ClientWithGivenEvents({"event": "download", "id": 1, "received": 50_000_000, "total": 283_000_000})
    session = SceneRegistration(slicer.vtkMRMLScene(), client)
    session.start(Inputs(*add_pair(session.scene)), QUICK, allow_download=True)
    session.poll()
    assert client.request["allow_download"]
    assert session.status() == "Downloading the model: 50 of 283 MB."
    session.cancel()
    assert client.canceled == [1]
    client.events = [{"event": "canceled", "id": 1}]
    session.poll()
    assert session.state is State.IDLE
    assert "before there was a result" in session.status()


def test_the_status_says_stage_level_step_and_the_time_left(folder):
    step = {"event": "step", "id": 1, "index": 2, "similarity": 0.5, "regularity": 0.01, "cosine": -0.1}
    step |= {"conflicts": ["similarity–regularity"]}
    client = ClientWithGivenEvents(step | {"stage": "network", "level": 0, "remaining_seconds": 90.0})
    session = SceneRegistration(slicer.vtkMRMLScene(), client)
    session.start(Inputs(*add_pair(session.scene)), QUICK)
    assert session.progress() == ""
    session.poll()
    assert session.progress() == "Network, step 3 of 5"
    assert session.status().startswith("Network, step 3 of 5. Similarity loss 0.5000, regularity loss 0.01;")
    assert session.status().endswith("About 2 min left.")
    client.events = [step | {"stage": "refinement", "level": 1, "index": 0, "remaining_seconds": 4.0}]
    session.poll()
    assert session.progress() == "Refinement, level 2 of 2, step 1 of 4"
    assert session.status().endswith("the gradients conflicted in 2 of 2 steps. About 4 s left.")
    session.stop_now()


def test_the_last_status_has_the_similarity_before_and_after(session):
    session.run(Inputs(*add_pair(session.scene)), QUICK | {"refine_steps": 1})
    report = mrml.recall(session.results["transform"], "report")
    assert report["start"] == "network"
    assert f"loss {report['similarity_before']:.4f} → {report['similarity']:.4f} " in session.status()
    assert report["similarity"] < report["similarity_before"]


def test_the_last_status_says_that_the_networks_deformation_was_not_used(session):
    same = (add(session.scene, image(name)) for name in ("fixed", "moving"))
    session.run(Inputs(*same), QUICK | {"refine_steps": 1})
    assert mrml.recall(session.results["transform"], "report")["start"] == "zero"
    assert "the refinement began without it" in session.status()


@pytest.fixture
def scripted(folder):
    """A session whose worker is a stand-in with a result at hand."""
    scene = slicer.vtkMRMLScene()
    scene.RegisterNodeClass(slicer.vtkMRMLColorLegendDisplayNode())
    session = SceneRegistration(scene, ScriptedWorker())
    yield session
    session.close()
    scene.Clear(True)


def test_a_result_that_cannot_be_placed_leaves_nothing_and_ends_the_run(scripted, monkeypatch):
    fixed, moving = add_pair(scripted.scene)
    mask = box_mask(scripted.scene, image("fixed"))
    first = scripted.run(Inputs(fixed, moving, moving_labels=mask), QUICK)
    kept = slicer.util.arrayFromVolume(first["warped"]).copy()
    nodes = scripted.scene.GetNumberOfNodes()
    scripted.client.change = lambda array: array * 0 + 1
    monkeypatch.setattr(folding, "fill_table", lambda *arguments: {}["no such figure"])
    with pytest.raises(RuntimeError, match="could not be put into the scene"):
        scripted.run(
            Inputs(fixed, moving, moving_labels=mask),
            QUICK,
            {role: first.get(role) for role in ("warped", "inverse", "warped_labels", "jacobian")}
            | {"transform": None},
        )
    assert (scripted.state, scripted.tone) == (State.IDLE, Tone.ERROR)
    assert scripted.scene.GetNumberOfNodes() == nodes
    assert np.array_equal(slicer.util.arrayFromVolume(first["warped"]), kept)
    assert first["warped_labels"].GetSegmentation().GetNumberOfSegments() == 1
    assert first["table"].GetNumberOfRows() > 0


def test_a_result_that_was_stopped_says_so_and_what_folds_is_a_warning(scripted):
    fixed, moving = add_pair(scripted.scene)
    scripted.client.total = 300
    scripted.start(Inputs(fixed, moving), QUICK)
    scripted.poll()
    scripted.cancel()
    scripted.poll()
    scripted.keep()
    assert scripted.message.startswith("Stopped after 1 of 300 steps: similarity loss")
    assert scripted.tone is Tone.PLAIN
    scripted.client.folded = 5
    scripted.run(Inputs(fixed, moving), QUICK)
    assert scripted.message.startswith("Done: ")
    assert "folding: 5 voxels" in scripted.message
    assert scripted.tone is Tone.WARNING


def test_a_run_says_runtime_error_for_whatever_is_wrong(scripted):
    fixed, moving = add_pair(scripted.scene)
    flat = add(scripted.scene, Volume(np.zeros((1, 9, 9), np.float32), np.eye(4), "flat"))
    with pytest.raises(RuntimeError, match="flat is flat"):
        scripted.run(Inputs(flat, moving), QUICK)
    with pytest.raises(RuntimeError, match="did you mean warped"):
        scripted.run(Inputs(fixed, moving), QUICK, {"warpd": None})


def test_a_question_is_asked_once(scripted):
    scripted.client.weights_missing = True
    scripted.start(Inputs(*add_pair(scripted.scene)), QUICK)
    scripted.wait()
    assert scripted.take_question() == "Download?"
    assert scripted.take_question() == ""


def test_closing_while_it_computes_leaves_no_process_and_no_file(folder):
    session = SceneRegistration(slicer.vtkMRMLScene(), new_worker())
    start_computing(session)
    pid = session.client.pid
    session.close()
    assert not is_alive(pid)
    assert exchange_folders(folder) == []


def test_the_worker_ends_with_its_parent_and_takes_its_files_along(folder):
    """The parent is killed without a chance to clean up, in the middle of a step."""
    import subprocess
    import sys
    from pathlib import Path

    code = """
import sys, tempfile, time
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/scene"]
tempfile.tempdir = sys.argv[2]
import slicer
from test_scene_registration import *
session = SceneRegistration(slicer.vtkMRMLScene(), new_worker())
start_computing(session)
print(session.client.pid, flush=True)
signal.pause()
"""
    arguments = [sys.executable, "-c", code, str(Path(__file__).parents[1]), str(folder)]
    parent = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    assert exchange_folders(folder) != []
    parent.kill()
    parent.wait()
    parent.stdout.close()
    wait_until(lambda: not is_alive(pid), lambda: None)
    assert exchange_folders(folder) == []


def test_an_unused_worker_ends(folder):
    worker = new_worker()
    worker._command[1:] = ["-c", "from GradProjIOLib.worker.server import main; main(idle_seconds=0.2)"]
    worker.start()
    wait_until(lambda: not worker.running, worker.poll)
    assert worker._process is None or worker._process.returncode == 0
    worker.close()


@pytest.mark.slow
def test_fifty_cancels_at_random_moments_leave_nothing(folder):
    session = SceneRegistration(slicer.vtkMRMLScene(), new_worker())
    fixed, moving = add_pair(session.scene)
    nodes, pids, chance = session.scene.GetNumberOfNodes(), set(), random.Random(5)
    for _ in range(50):
        session.start_worker()
        session.start(Inputs(fixed, moving), QUICK | {"steps": 100})
        if chance.random() < 0.7:
            wait_until(lambda: session.steps, session.poll)
        end = time.perf_counter() + chance.choice([0.1, 0.3, 1.0]) * chance.random()
        wait_until(lambda end=end: time.perf_counter() > end, session.poll)
        pids.add(session.client.pid)
        session.cancel()
        wait_until(lambda: not session.active, session.poll)
        session.discard()
        assert exchange_folders(folder) == []
        assert session.scene.GetNumberOfNodes() == nodes
    assert session.run(Inputs(fixed, moving), QUICK)["transform"] is not None
    pids.add(session.client.pid)
    session.close()
    assert not any(is_alive(pid) for pid in pids - {None})
