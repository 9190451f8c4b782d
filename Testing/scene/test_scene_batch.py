"""Many pairs from Slicer's console: real MRML nodes, a real worker, the module under PySide6."""

from __future__ import annotations

import json
import time

import pytest

slicer_application = pytest.importorskip("slicer_application")

import slicer
from PySide6 import QtCore, QtWidgets
from scene_tools import ENVIRONMENT, QUICK, add, add_pair, image, sessions, wait_until

from GradProjIOLib.errors import InputError
from GradProjIOLib.geometry.image_files import write_volume
from GradProjIOLib.scene.batch import FolderBatch, NodeBatch, pairs_of
from GradProjIOLib.settings import PRESETS

ONE_STEP = QUICK | {"steps": 1}


@pytest.fixture
def session(worker, folder):
    yield from sessions(worker)


def files(folder, count=3):
    """Image files in a folder, slightly different from each other."""
    folder.mkdir()
    paths = [folder / f"scan{number}.nrrd" for number in range(count)]
    for number, path in enumerate(paths):
        write_volume(image(path.name, shift=float(number)), path)
    return paths


def test_nodes_and_files_become_nodes_and_one_failure_stops_nothing(session, tmp_path):
    fixed, moving = add_pair(session.scene)
    paths = files(tmp_path / "scans", 2)
    batch = NodeBatch(session, [(fixed, moving), (fixed, tmp_path / "missing.nrrd"), tuple(paths)], ONE_STEP)
    seen = set()
    results = batch.wait(lambda: seen.add(batch.status()))
    assert [bool(result.message) for result in results] == [False, True, False]
    assert "missing.nrrd" in results[1].message
    assert results[0].nodes["warped"].GetName() == "Registered moving to fixed"
    assert results[2].nodes["transform"].GetName() == "Transform scan1 to scan0"
    assert results[0].nodes["transform"] is not results[2].nodes["transform"]
    assert "1 of 3 pairs registered, 1 failed; scan1 to scan0" in seen
    assert batch.status() == "2 of 3 pairs registered, 1 failed"


@pytest.fixture
def environment(folder, monkeypatch):
    """What the process of a batch gets. `folder` holds that no temporary files are left."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


def test_with_a_folder_there_are_only_files_and_what_is_done_is_kept(environment, tmp_path):
    scene = slicer.vtkMRMLScene()
    fixed, moving = add_pair(scene)
    paths = files(tmp_path / "scans", 2)
    nodes = scene.GetNumberOfNodes()
    pairs = [(fixed, moving), tuple(paths), (fixed, moving), (fixed, tmp_path / "missing.nrrd")]
    batch = FolderBatch(pairs, ONE_STEP, tmp_path / "out")
    results = {result.folder.name: result for result in batch.wait() if result.folder}
    assert set(results) == {"moving to fixed", "scan1 to scan0", "moving to fixed 2"}
    (failed,) = batch.failed
    assert "missing.nrrd" in failed.message
    assert (failed.fixed, failed.moving) == ("fixed", "missing")
    assert batch.status() == "3 of 4 pairs registered, 1 failed"
    assert scene.GetNumberOfNodes() == nodes
    for result in results.values():
        assert {"warped.nii.gz", "transform.h5", "jacobian.nii.gz"} <= {path.name for path in result.folder.iterdir()}
    report = tmp_path / "out" / "scan1 to scan0" / "report.json"
    assert json.loads(report.read_text())["inputs"]["fixed"]["path"] == str(paths[0])
    assert "3 pairs registered, 1 failed" in (tmp_path / "out" / "index.html").read_text()

    before = report.stat().st_mtime_ns
    again = FolderBatch(pairs, ONE_STEP, tmp_path / "out")
    assert len([result for result in again.wait() if result.folder]) == 3
    assert report.stat().st_mtime_ns == before


def test_a_preset_is_a_setting_like_others(environment, session, tmp_path):
    """It gives the settings that the call does not name."""
    pair = tuple(files(tmp_path / "scans", 2))
    settings = {"preset": "quick", "model": "none", "device": "cpu", "samples": 1000}
    (result,) = FolderBatch([pair], settings, tmp_path / "out").wait()
    assert not result.message
    in_files = json.loads((result.folder / "report.json").read_text())["settings"]
    (result,) = NodeBatch(session, [pair], settings).wait()
    in_scene = json.loads(result.nodes["transform"].GetAttribute("GradProjIO.report"))["settings"]
    for found in (in_files, in_scene):
        assert (found["refine_steps"], found["samples"]) == (PRESETS["quick"]["refine_steps"], 1000)


def test_bad_settings_are_refused_before_anything_starts(session, tmp_path):
    pair = add_pair(session.scene)
    with pytest.raises(InputError, match="speed"):
        FolderBatch([pair], ONE_STEP | {"speed": 3}, tmp_path / "out")
    with pytest.raises(InputError, match="speed"):
        NodeBatch(session, [pair], ONE_STEP | {"speed": 3})
    assert not (tmp_path / "out").exists()


def test_cancel_ends_at_once_and_leaves_nothing_half(session):
    pair = add_pair(session.scene)
    nodes = session.scene.GetNumberOfNodes()
    batch = NodeBatch(session, [pair, pair], QUICK | {"steps": 200})
    wait_until(lambda: "Network, step" in batch.status(), batch.poll)
    batch.cancel()
    assert not batch.poll()
    assert [result.message for result in batch.results] == ["Canceled."]
    assert session.scene.GetNumberOfNodes() == nodes


def test_cancel_of_files_leaves_nothing_half(environment, tmp_path):
    paths = files(tmp_path / "scans", 3)
    pairs = [(paths[0], paths[1]), (paths[0], paths[2])]
    batch = FolderBatch(pairs, QUICK | {"steps": 100000}, tmp_path / "out")
    # The process has begun to work in the folder.
    wait_until((tmp_path / "out" / ".lock").exists, batch.poll)
    batch.cancel()
    assert [result.message for result in batch.wait()] == ["Canceled."] * 2
    assert not batch.active
    assert [path for path in (tmp_path / "out").iterdir() if path.is_dir()] == []


def test_a_folder_an_item_and_a_sequence_are_registered_to_one(session, tmp_path):
    scene = session.scene
    paths = files(tmp_path / "scans")
    (tmp_path / "scans" / "notes.txt").write_text("no image")
    assert pairs_of(tmp_path / "scans", paths[1], scene) == [(paths[1], paths[0]), (paths[1], paths[2])]

    hierarchy = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(scene)
    study = hierarchy.CreateFolderItem(hierarchy.GetSceneItemID(), "study")
    visit = hierarchy.CreateFolderItem(study, "visit")
    atlas, first, second = (add(scene, image(name)) for name in ("atlas", "first", "second"))
    labels = add(scene, image("labels"), "vtkMRMLLabelMapVolumeNode")
    for node, parent in ((first, study), (second, visit), (labels, study)):
        hierarchy.CreateItem(parent, node)
    found = pairs_of(study, atlas, scene)
    assert {fixed for fixed, _ in found} == {atlas}
    assert {moving for _, moving in found} == {first, second}

    sequence = scene.AddNewNodeByClass("vtkMRMLSequenceNode", "breath")
    for number in range(3):
        sequence.SetDataNodeAtValue(add(slicer.vtkMRMLScene(), image(f"frame {number}", float(number))), str(number))
    frames = pairs_of(sequence, 0, scene)
    assert [moving.GetName() for _, moving in frames] == ["breath time 1", "breath time 2"]
    assert frames[0][0].GetName() == "breath time 0"
    assert slicer.util.arrayFromVolume(frames[1][1]).max() > 0

    for source, fixed in (([], None), (tmp_path / "scans", None), ([(1, 2, 3)], None), ([atlas], atlas)):
        with pytest.raises(InputError):
            pairs_of(source, fixed, scene)
    with pytest.raises(InputError, match="nowhere"):
        pairs_of(tmp_path / "nowhere", atlas, scene)


@pytest.fixture
def logic(folder, monkeypatch):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    slicer_application.start(slicer.vtkMRMLScene())
    return slicer_application.load_module().GradProjIOLogic()


def test_the_console_waits_without_a_window(logic, monkeypatch, capsys):
    monkeypatch.setattr(slicer.util, "mainWindow", lambda: None)
    fixed, moving = add_pair(slicer.mrmlScene)
    batch = logic.registerMany([(fixed, moving)], model="compact", steps=1, refineSteps=0, device="cpu")
    assert batch.results[0].nodes["transform"].GetName() == "Transform moving to fixed"
    assert "1 of 1 pairs registered" in capsys.readouterr().err
    assert not logic.session.client.running


def test_the_console_does_not_wait_where_there_is_a_window(logic, monkeypatch):
    window = QtWidgets.QMainWindow()
    monkeypatch.setattr(slicer.util, "mainWindow", lambda: window)
    fixed, moving = add_pair(slicer.mrmlScene)
    client = logic.session.client
    batch = logic.registerMany([moving], fixed=fixed, model="compact", steps=1, refineSteps=0, device="cpu")
    assert batch.results == []
    # As the console does, which keeps only what it was given.
    del logic
    end = QtCore.QDeadlineTimer(60000)
    while batch.active and not end.hasExpired():
        QtCore.QCoreApplication.processEvents()
        time.sleep(0.01)
    assert batch.results[0].nodes["transform"].GetName() == "Transform moving to fixed"
    assert window.statusBar().currentMessage() == "1 of 1 pairs registered"
    assert not client.running
