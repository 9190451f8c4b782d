"""What the worker process does for a request, without a process."""

import gc
import json
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scene_tools import is_alive, wait_until

from GradProjIOLib.geometry.labels import Labels
from GradProjIOLib.geometry.landmarks import Landmarks
from GradProjIOLib.geometry.volume import Volume
from GradProjIOLib.models import weights
from GradProjIOLib.spatial import jacobian
from GradProjIOLib.spatial.deformation import Deformation
from GradProjIOLib.synthetic.phantom import make_pair
from GradProjIOLib.worker import answers, protocol
from GradProjIOLib.worker.client import WorkerClient
from GradProjIOLib.worker.protocol import RegisterRequest


class Recorder:
    """Stands for the connection to the application: keeps the events."""

    def __init__(self):
        self.events, self.canceled, self.folder, self.kept = [], set(), None, None

    def send(self, event, **content):
        self.events.append({"event": event, **content})


def fetched(model="unigradicon", canceled=()):
    connection = Recorder()
    connection.canceled = set(canceled)
    answers.answer({"request": "download", "id": 3, "model": model}, connection)
    return connection.events


def test_weights_are_fetched_with_progress_or_until_canceled(monkeypatch):
    def download(name, url, on_progress):
        assert url.startswith("https://")
        if on_progress(50, 283) is False:
            raise weights.DownloadCancelled

    monkeypatch.setattr(weights, "download", download)
    assert fetched() == [
        {"event": "download", "id": 3, "received": 50, "total": 283},
        {"event": "downloaded", "id": 3},
    ]
    assert fetched(canceled=[3])[-1] == {"event": "canceled", "id": 3}


def test_what_cannot_be_fetched_is_said_in_a_sentence():
    (event,) = fetched("compact")
    assert (event["event"], event["kind"]) == ("failed", "input")
    assert "nothing to download for the model compact" in event["message"]


def test_the_application_learns_which_models_are_there(monkeypatch, tmp_path):
    monkeypatch.setenv("GRADPROJIO_CACHE", str(tmp_path))
    found = answers.published_models()
    assert set(found) == {"unigradicon", "multigradicon"}
    assert not any(model["there"] for model in found.values())
    assert 3 < found["unigradicon"]["memory"] / 2**30 < 12


@pytest.mark.parametrize("amplitude", [0.6, 0.1])
def test_folds_between_voxels_are_those_that_only_the_volume_shows(amplitude):
    """The checkerboard of Docs/metrics.md: no folded voxel by central differences, and folded all over."""
    shape = (14, 15, 16)
    sign = 1 - 2 * (np.indices(shape).sum(axis=0) % 2)
    displacement = np.zeros((*shape, 3), np.float32)
    displacement[..., 0] = amplitude * sign
    fixed = Volume(np.zeros(shape, np.float32), np.eye(4), "fixed")
    registration = types.SimpleNamespace(fixed=fixed, forward=Deformation(displacement, np.eye(4)))
    mask = jacobian.folding(registration.forward).mask
    between = answers.folded_between(registration, Volume(mask, np.eye(4), "folding"))
    inner = between.array[3:-3, 3:-3, 3:-3]
    assert not mask[3:-3, 3:-3, 3:-3].any()
    assert inner.all() if amplitude > 0.5 else not between.array.any()
    # What folds by the determinant as well, and its neighbors, are not counted twice.
    mask[:] = False
    mask[7, 7, 7] = True
    near = answers.folded_between(registration, Volume(mask, np.eye(4), "folding")).array[6:9, 6:9, 6:9]
    assert not near.any()


def label_records(pair, name, value, folder):
    """Those of one structure in both label maps."""
    sides = {"fixed_labels": pair.fixed_labels, "moving_labels": pair.moving_labels}
    return {
        role: protocol.write_labels(Labels(one, {value: name}), folder, f"{role} {name}") for role, one in sides.items()
    }


def guided():
    """A pair, a request with landmarks and labels, and the event that ends it; its folder is still there."""
    pair = make_pair(3, (28, 32, 26), 6.0)
    value = int(np.unique(pair.fixed_labels.array)[1])
    folder = protocol.new_folder()
    sides = ("fixed", "moving")
    points = np.argwhere(pair.fixed_labels.array == value)[::500, ::-1] @ pair.fixed.affine[:3, :3].T
    points += pair.fixed.affine[:3, 3]
    inputs = {side: protocol.write_volume(getattr(pair, side), folder, side) for side in sides}
    inputs |= label_records(pair, "cortex", value, folder)
    for side, positions in zip(sides, (points, pair.deformation.map_points(points)), strict=True):
        names = [str(number) for number in range(len(points))]
        inputs[f"{side}_points"] = protocol.write_points(Landmarks(names, positions, f"{side} list"))
    settings = {"model": "none", "refine_steps": 4, "samples": 5000, "device": "cpu"}
    request = RegisterRequest(str(folder), inputs, settings)
    connection = Recorder()
    answers.answer(protocol.to_message(request) | {"id": 1}, connection)
    assert connection.events[-1]["event"] == "done", connection.events[-1]
    return pair, request, connection.events


def test_landmarks_and_labels_of_a_request_guide():
    _, request, events = guided()
    protocol.remove_folder(request.folder)
    done = events[-1]
    assert [one["name"] for one in done["report"]["labels"]] == ["cortex"]
    assert len(done["report"]["landmarks"]) == len(request.inputs["fixed_points"]["names"])
    assert protocol.WARPED_LABELS not in done["result"]
    steps = [event for event in events if event["event"] == "step"]
    assert all(step["labels"] > 0 and step["landmarks"] > 0 for step in steps)


def test_a_guided_result_goes_on_with_the_same_guides_or_with_others():
    pair, request, events = guided()
    done = events[-1]
    records = {role: done["result"][role] for role in (protocol.TRANSFORM, protocol.INVERSE)}
    earlier = {"steps": 2, "report": json.loads(json.dumps(done["report"])), **records}
    points = {name: request.inputs[name] for name in ("fixed_points", "moving_points")}
    others = {name: record for name, record in request.inputs.items() if name not in points}
    fewer = {
        side: {name: value[:2] if name != "source" else value for name, value in record.items()}
        for side, record in points.items()
    }
    value = int(np.unique(pair.fixed_labels.array)[2])
    structure = label_records(pair, "white matter", value, Path(request.folder))
    levels = len(done["report"]["levels"])
    for new, expected in (({}, [0] * (levels - 1) + [2]), (fewer, [2] * levels), (structure, [2] * levels)):
        connection = Recorder()
        again = replace(request, inputs=others | new, settings={}, earlier=earlier)
        answers.answer(protocol.to_message(again) | {"id": 2}, connection)
        started, *_, ended = connection.events
        assert ended["event"] == "done", ended
        assert (started["total"], started["levels"]) == (sum(expected), expected)
        assert [one["name"] for one in ended["report"]["labels"]] == ["white matter" if new is structure else "cortex"]
        assert [ended["report"]["inputs"][name]["name"] for name in points] == ["fixed list", "moving list"]
        assert len(ended["report"]["landmarks"]) == (2 if new is fewer else len(points["fixed_points"]["names"]))
    protocol.remove_folder(request.folder)


def test_a_client_that_is_forgotten_leaves_no_process():
    client = WorkerClient()
    client.start()
    pid = client._process.pid
    assert is_alive(pid)
    del client
    gc.collect()
    wait_until(lambda: not is_alive(pid), lambda: None, seconds=20)
