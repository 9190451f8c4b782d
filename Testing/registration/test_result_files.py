"""The folder with the results of a registration: what is in it, and what is said of the files it came from."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from GradProjIOLib.geometry.image_files import read_volume, write_volume
from GradProjIOLib.geometry.volume import Volume
from GradProjIOLib.registration.register import register
from GradProjIOLib.report import overview
from GradProjIOLib.settings import Settings

DIRECT = Settings(model="compact", method="direct", device="cpu", lattice=(16, 16, 16))


@pytest.fixture
def result(fixed_volume, moving_volume):
    return register(fixed_volume, moving_volume, DIRECT)


def labels_of(volume: Volume) -> Volume:
    return replace(volume, array=(volume.array > 100).astype(np.uint8))


def test_files_of_an_earlier_result_that_this_one_does_not_have_are_removed(result, moving_volume, tmp_path):
    result.write(tmp_path, labels_of(moving_volume))
    (tmp_path / "thumbnail.png").write_bytes(b"of the earlier result")
    (tmp_path / "notes.txt").write_text("mine")
    result.write(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(
        ["folding.nii.gz", "inverse_transform.h5", "jacobian.nii.gz", "notes.txt", "overview.png", "report.json",
         "transform.h5", "warped.nii.gz"]
    )  # fmt: skip


def test_a_picture_that_cannot_be_drawn_is_a_warning(result, tmp_path, monkeypatch):
    def fail(*arguments, **keywords):
        raise RuntimeError("no fonts")

    monkeypatch.setattr(overview, "draw_overview", fail)
    for _ in range(2):
        result.write(tmp_path / "result")
        report = json.loads((tmp_path / "result" / "report.json").read_text())
        assert report["warnings"].count("A picture of the result could not be drawn (no fonts).") == 1
    assert (tmp_path / "result" / "warped.nii.gz").exists()
    assert not (tmp_path / "result" / "overview.png").exists()


@pytest.mark.parametrize("backend", ["module://does_not_exist", "nonsense"])
def test_a_window_system_that_is_not_there_costs_nothing(fixed_volume, moving_volume, tmp_path, backend):
    """A notebook sets MPLBACKEND for the commands that are started from it."""
    for name, volume in (("fixed", fixed_volume), ("moving", moving_volume)):
        write_volume(volume, tmp_path / f"{name}.nii.gz")
    command = ["register", "fixed.nii.gz", "moving.nii.gz", "-o", "out", "--method", "direct", "--model", "compact",
               "--device", "cpu", "--lattice", "16", "16", "16"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "GradProjIOLib", *command],
        cwd=tmp_path,
        env=os.environ | {"MPLBACKEND": backend},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "overview.png").exists()


def test_a_file_with_the_name_of_a_volume_is_not_taken_for_its_own(fixed_volume, moving_volume, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fixed").write_text("something else")
    described = register(fixed_volume, moving_volume, DIRECT).report["inputs"]["fixed"]
    assert described["path"] is None
    assert described["sha256"] == hashlib.sha256(fixed_volume.array).hexdigest()


def test_changed_voxels_do_not_have_the_checksum_of_the_file(fixed_volume, moving_volume, tmp_path):
    path = tmp_path / "fixed.nii.gz"
    write_volume(fixed_volume, path)
    read = read_volume(path)
    described = register(read, moving_volume, DIRECT).report["inputs"]["fixed"]
    assert described["path"] == str(path)
    assert described["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    changed = replace(read, array=read.array[:, ::-1])
    described = register(changed, moving_volume, DIRECT).report["inputs"]["fixed"]
    assert described["path"] is None
    assert described["sha256"] == hashlib.sha256(np.ascontiguousarray(changed.array)).hexdigest()


def test_masks_can_be_registered_and_are_warned_of(fixed_volume, moving_volume):
    masks = [replace(labels_of(volume), name=f"mask {n}") for n, volume in enumerate((fixed_volume, moving_volume))]
    warnings = register(*masks, DIRECT).report["warnings"]
    assert [sum(f"mask {n} looks like a label map" in warning for warning in warnings) for n in (0, 1)] == [1, 1]


def test_a_report_names_the_labels_that_were_warped_with_it(result, tmp_path):
    labels = [Volume((result.moving.array > level).astype(np.uint8), result.moving.affine, f"labels {level}")
              for level in (0, 1)]  # fmt: skip
    for name, given in (("first", labels[0]), ("second", labels[1]), ("none", None)):
        result.write(tmp_path / name, given)
    written = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("first", "second", "none")]
    named = [report["inputs"].get("moving_labels", {}).get("name") for report in written]
    assert named == ["labels 0", "labels 1", None]
