"""Landmark files, written by Slicer's own storage nodes where it has some."""

import json

import numpy as np
import pytest

from GradProjIOLib.errors import InputError
from GradProjIOLib.geometry.landmarks import read_landmarks

POINTS = np.array([[1.25, -2.5, 30.0], [-40.0, 5.5, -6.75], [7.0, 8.0, 9.0]])
NAMES = ["AC", 'PC, "posterior"', "falx"]
AFFINE = np.array([[-2.0, 0, 0, 90], [0, 0, 1.5, -126], [0, 1, 0, -72], [0, 0, 0, 1]])


@pytest.fixture
def write_with_slicer(tmp_path):
    """Save POINTS, and one point that is not placed, with Slicer's storage node of the given class."""
    slicer = pytest.importorskip("slicer")

    def write(storage_class: str, name: str, coordinate_system: int):
        scene = slicer.vtkMRMLScene()
        node = scene.AddNewNodeByClass("vtkMRMLMarkupsFiducialNode")
        for label, point in zip(NAMES, POINTS, strict=True):
            node.AddControlPoint(point.tolist(), label)
        node.AddControlPoint([0.0, 0.0, 0.0], "not placed")
        node.UnsetNthControlPointPosition(len(NAMES))
        storage = getattr(slicer, storage_class)()
        scene.AddNode(storage)
        storage.SetFileName(str(tmp_path / name))
        storage.SetCoordinateSystem(coordinate_system)
        assert storage.WriteData(node)
        return tmp_path / name

    return write


@pytest.mark.parametrize("coordinate_system", [0, 1], ids=["RAS", "LPS"])
@pytest.mark.parametrize(
    ("storage_class", "name"),
    [
        ("vtkMRMLMarkupsJsonStorageNode", "points.mrk.json"),
        ("vtkMRMLMarkupsFiducialStorageNode", "points.fcsv"),
    ],
)
def test_files_of_slicer(write_with_slicer, storage_class, name, coordinate_system):
    found = read_landmarks(write_with_slicer(storage_class, name, coordinate_system))
    assert found.names == NAMES
    np.testing.assert_allclose(found.points, POINTS, atol=1e-9)


def test_old_fiducials(tmp_path):
    path = tmp_path / "old.fcsv"
    header = "# Markups fiducial file version = 4.4\n# CoordinateSystem = 1\n"
    path.write_text(header + "1,-1.25,2.5,30,0,0,0,1,1,1,0,AC,,\n")
    np.testing.assert_allclose(read_landmarks(path).points, POINTS[:1])
    path.write_text("AC,1.25,-2.5,30,1,1\n")
    found = read_landmarks(path)
    assert found.names == ["AC"]
    np.testing.assert_allclose(found.points, POINTS[:1])


def test_table_in_each_frame(tmp_path):
    path = tmp_path / "points.csv"
    indices = (POINTS - AFFINE[:3, 3]) @ np.linalg.inv(AFFINE[:3, :3]).T
    for frame, numbers in (("RAS", POINTS), ("LPS", POINTS * [-1, -1, 1]), ("voxels", indices)):
        header = "label,i,j,k" if frame == "voxels" else "label,x,y,z"
        lines = [f"P{n},{a},{b},{c}" for n, (a, b, c) in enumerate(numbers.tolist())]
        path.write_text("\n".join([header, *lines]) + "\n")
        found = read_landmarks(path, frame, AFFINE)
        assert found.names == ["P0", "P1", "P2"]
        np.testing.assert_allclose(found.points, POINTS, atol=1e-9)


def test_table_with_tolerances(tmp_path):
    path = tmp_path / "points.csv"
    path.write_text("x,y,z,name,Tolerance\n1,2,3,a,0.5\n4,5,6,b,\n7,8,9,c\n")
    found = read_landmarks(path, "RAS")
    np.testing.assert_array_equal(found.tolerances, [0.5, np.nan, np.nan])
    assert found.names == ["a", "b", "c"]


def test_table_without_header(tmp_path):
    path = tmp_path / "points.csv"
    path.write_text("1.25,-2.5,30\n-40,5.5,-6.75\n\n")
    found = read_landmarks(path, "RAS")
    assert found.names == ["1", "2"]
    np.testing.assert_allclose(found.points, POINTS[:2])


@pytest.mark.parametrize(
    ("name", "text", "frame", "expected"),
    [
        ("points.csv", "x,y,z\n1,2,3\n", None, "does not say in which coordinates"),
        ("points.csv", "x,y,z\n1,2,3\n", "voxels", "of which image is unknown"),
        ("points.csv", "a,b,c\n1,2,3\n", "RAS", "name three of them"),
        ("points.csv", "x,y,z\n1,2\n", "RAS", "cannot be read as landmarks"),
        ("points.csv", "x,y,z\n1,2,nan\n", "RAS", "position is no number"),
        ("points.csv", "x,y,z,tolerance\n1,2,3,0\n", "RAS", "one positive number"),
        ("points.csv", "x,y,z,tolerance_mm\n1,2,3,inf\n", "RAS", "one positive number"),
        ("points.csv", "x,y,z\n", "RAS", "holds no landmark"),
        ("points.csv", "", "RAS", "holds no landmark"),
        ("points.mrk.json", "{}", None, "cannot be read as landmarks"),
        ("points.mrk.json", "not json", None, "cannot be read as landmarks"),
        ("points.mrk.json", json.dumps({"markups": [{}, {}]}), None, "2 point lists"),
        ("points.mrk.json", json.dumps({"markups": [{"coordinateUnits": "cm"}]}), None, "not in mm"),
        ("points.txt", "1 2 3", "RAS", "no landmark file"),
    ],
)
def test_message_says_what_to_do(tmp_path, name, text, frame, expected):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(InputError, match=expected):
        read_landmarks(path, frame)


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        read_landmarks(tmp_path / "points.csv", "RAS")
