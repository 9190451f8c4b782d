"""The messages between an application and its worker."""

import json

import numpy as np
import pytest
from conftest import oblique_affine

from GradProjIOLib.errors import InputError
from GradProjIOLib.geometry.labels import Labels
from GradProjIOLib.geometry.landmarks import Landmarks
from GradProjIOLib.geometry.volume import Volume
from GradProjIOLib.worker import protocol
from GradProjIOLib.worker.protocol import EvaluateRequest, RegisterRequest


def sent(message):
    """A message as it arrives on the other side of a pipe."""
    return json.loads(json.dumps(message))


def test_requests_arrive_as_they_were_sent(tmp_path, fixed_volume):
    record = protocol.write_volume(fixed_volume, tmp_path, "fixed")
    pair = {"fixed": record, "moving": record}
    labels = {"fixed_labels": record, "moving_labels": record}
    requests = (
        RegisterRequest("folder", pair | {"initial_transform": {"matrix": [[1.0]]}}, {"steps": 3}),
        RegisterRequest("folder", pair | labels, guiding_labels=[1, "disc"]),
        RegisterRequest("folder", pair, earlier={"steps": 3, "report": {"steps": []}, "transform": record}),
        EvaluateRequest("folder", record, record, labels=[record, record], points=[]),
    )
    for number, request in enumerate(requests):
        message = {**protocol.to_message(request), "id": number}
        assert protocol.from_message(sent(message)) == request
    with pytest.raises(KeyError, match="dance"):
        protocol.from_message({"request": "dance", "id": 1})
    with pytest.raises(TypeError, match="speed"):
        protocol.from_message({"request": "register", "id": 1, "folder": "", "inputs": {}, "speed": 3})


def test_volumes_fields_and_points_arrive_as_they_were_sent(tmp_path, fixed_volume):
    volume = protocol.read(sent(protocol.write_volume(fixed_volume, tmp_path, "fixed")))
    assert np.array_equal(volume.array, fixed_volume.array)
    assert np.array_equal(volume.affine, fixed_volume.affine)
    assert volume.name == fixed_volume.name
    displacement = np.random.default_rng(0).normal(size=(4, 5, 6, 3)).astype(np.float32)
    turned = oblique_affine((1, 1, 1), (5, 6, 7), (1, 2, 3))
    record = protocol.write_field(displacement, fixed_volume.affine, turned, tmp_path, "field")
    found, affine, matrix = protocol.read(sent(record))
    assert np.array_equal(matrix, turned)
    assert np.array_equal(found, displacement)
    assert np.array_equal(affine, fixed_volume.affine)
    labels = Labels(Volume(np.eye(3, dtype=np.uint8)[None], np.eye(4), "map"), {1: "disc"})
    back = protocol.read(sent(protocol.write_labels(labels, tmp_path, "labels")))
    assert back.names == labels.names
    assert np.array_equal(back.volume.array, labels.volume.array)
    assert np.array_equal(protocol.read(sent({"matrix": turned.tolist()})), turned)
    points = Landmarks(["one", "two"], np.array([[1.0, 2, 3], [4, 5, 6]]), "list")
    arrived = protocol.read(sent(protocol.write_points(points)))
    assert np.array_equal(arrived.points, points.points)
    assert (arrived.names, arrived.source) == (points.names, points.source)


def test_a_folder_that_cannot_be_written_gives_a_sentence(tmp_path, fixed_volume):
    with pytest.raises(InputError, match="free some space"):
        protocol.write_volume(fixed_volume, tmp_path / "missing", "fixed")


def test_only_folders_for_arrays_are_removed(tmp_path):
    folder = protocol.new_folder()
    protocol.remove_folder(tmp_path)
    protocol.remove_folder(folder)
    assert tmp_path.exists()
    assert not folder.exists()
