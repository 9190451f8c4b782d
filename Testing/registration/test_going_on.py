"""A registration that goes on: exactly on a network, and in refinement from its fields, which keep their detail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

import GradProjIOLib as gp
from GradProjIOLib.commands.main import main
from GradProjIOLib.errors import InputError
from GradProjIOLib.geometry.image_files import read_labels, write_volume
from GradProjIOLib.geometry.lattice import apply_matrix
from GradProjIOLib.registration.going_on import Earlier, prepare
from GradProjIOLib.registration.landmarks import LandmarkPairs
from GradProjIOLib.registration.preprocessing import Guides
from GradProjIOLib.registration.refinement import from_level
from GradProjIOLib.registration.register import register
from GradProjIOLib.registration.report import CHANGES_VOLUMES
from GradProjIOLib.spatial.deformation import Deformation
from GradProjIOLib.synthetic import phantom

REFINED = {"model": "none", "device": "cpu", "refine_steps": 12, "samples": 30_000}
NETWORK = {"model": "compact", "device": "cpu", "refine_steps": 0, "lattice": (16, 16, 16), "projection": "random"}


@pytest.fixture(scope="module")
def heads():
    return phantom.make_pair(3, (40, 46, 42), spacing=4.0)


@pytest.fixture(scope="module")
def refined(heads):
    return register(heads.fixed, heads.moving, **REFINED)


@pytest.fixture(scope="module")
def files(heads, tmp_path_factory):
    """The images as files, in a folder of their own."""
    folder = tmp_path_factory.mktemp("images")
    for name, volume in (("fixed", heads.fixed), ("moving", heads.moving)):
        write_volume(volume, folder / f"{name}.nii.gz")
    return folder


@pytest.fixture(scope="module")
def written(files):
    """The folder of a refined result."""
    register(files / "fixed.nii.gz", files / "moving.nii.gz", **REFINED).write(files / "refined")
    return files / "refined"


def landmarks(pair, count=4):
    index = np.random.default_rng(1).uniform([12, 14, 12], [28, 30, 28], (count, 3))
    points = apply_matrix(pair.fixed.affine, index)
    return points, pair.deformation.map_points(points)


def losses(report):
    return [
        (step["index"], step["similarity"], step["regularity"], step["cosine"], step["projected"])
        for step in report["steps"]
    ]


def in_another_process(*arguments, cwd):
    """Run the command with the threads that this process has."""
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        [sys.executable, "-m", "GradProjIOLib", "register", *map(str, arguments)],
        cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


class TestNetwork:
    @pytest.mark.parametrize("method", ["projected", "vanilla"])
    def test_twice_three_steps_are_six_bit_for_bit(self, heads, method):
        whole = register(heads.fixed, heads.moving, method=method, steps=6, **NETWORK)
        half = register(heads.fixed, heads.moving, method=method, steps=3, **NETWORK)
        found = half.go_on(3)
        assert losses(found.report) == losses(whole.report)
        assert np.array_equal(found.forward.displacement, whole.forward.displacement)
        assert np.array_equal(found.inverse.displacement, whole.inverse.displacement)
        assert found.settings == whole.settings
        for name in ("similarity", "similarity_before", "regularity", "jacobian", "start", "model"):
            assert found.report[name] == whole.report[name]
        assert found.report["continued_after"] == [3]
        assert len(half.report["steps"]) == 3
        again = found.go_on(1).report
        assert again["continued_after"] == [3, 6]
        assert [step["index"] for step in again["steps"]] == list(range(7))

    def test_also_in_another_process_from_the_folder(self, files):
        images = files / "fixed.nii.gz", files / "moving.nii.gz"
        for name, steps in (("whole", 6), ("half", 3)):
            register(*images, steps=steps, **NETWORK).write(files / name)
        in_another_process("--from", "half", "-o", "half", "--steps", 3, "--quiet", cwd=files)
        reports = [json.loads((files / name / "report.json").read_text()) for name in ("whole", "half")]
        assert losses(reports[0]) == losses(reports[1])
        for name in ("transform.h5", "inverse_transform.h5"):
            whole, half = (Deformation.read(files / folder / name) for folder in ("whole", "half"))
            assert np.array_equal(whole.displacement, half.displacement)
        states = [
            torch.load(files / folder / "optimizer_state.pt", weights_only=True)["parameters"]
            for folder in ("whole", "half")
        ]
        assert all(map(torch.equal, *states))
        stored = files / "half" / "optimizer_state.pt"
        earlier = torch.load(stored, weights_only=True) | {"adam": {"mean": [], "steps": []}}
        for content in (b"something else", earlier):
            stored.write_bytes(content) if isinstance(content, bytes) else torch.save(content, stored)
            with pytest.raises(InputError, match=r"optimizer_state.pt cannot be read"):
                gp.load_result(files / "half")

    def test_what_was_canceled_takes_the_steps_that_were_left_and_is_refined_as_planned(self, heads):
        settings = NETWORK | {"refine_steps": 2, "samples": 5000}
        whole = register(heads.fixed, heads.moving, steps=4, **settings)
        part = register(heads.fixed, heads.moving, steps=4, **settings, on_step=lambda step: step.index < 1)
        assert part.report["stopped"] == "by request"
        found = part.go_on()
        assert found.report["stopped"] == "finished"
        assert losses(found.report) == losses(whole.report)
        assert np.array_equal(found.forward.displacement, whole.forward.displacement)
        assert found.reached.optimizer is None

    def test_a_finished_one_can_be_refined(self, heads):
        half = register(heads.fixed, heads.moving, steps=2, **NETWORK)
        found = half.go_on(refine_steps=3, samples=10_000)
        assert [step["stage"] for step in found.report["steps"]] == ["network"] * 2 + ["refinement"] * 9
        assert found.report["similarity"] < half.report["similarity_before"]
        assert found.report["model"] == half.report["model"]
        assert found.reached.optimizer is None

    def test_without_its_state_it_can_only_be_refined(self, heads):
        half = register(heads.fixed, heads.moving, steps=1, **NETWORK)
        half = replace(half, reached=replace(half.reached, optimizer=None))
        with pytest.raises(InputError, match="only by refinement"):
            half.go_on(1)
        assert len(half.go_on(refine_steps=1, samples=5000).report["steps"]) == 4


class TestRefinement:
    def test_more_steps_on_the_finest_level_match_better(self, refined):
        found = refined.go_on(8)
        assert found.report["similarity"] < refined.report["similarity"]
        assert found.report["similarity_before"] == refined.report["similarity_before"]
        new = found.report["steps"][len(refined.report["steps"]) :]
        assert [step["level"] for step in new] == [2] * 8
        assert found.report["steps"][: -len(new)] == refined.report["steps"]
        assert found.report["continued_after"] == [36]
        assert found.report["seconds"] > refined.report["seconds"]
        assert new[-1]["remaining_seconds"] == 0
        assert found.report["levels"] == refined.report["levels"]

    def test_as_many_as_before_unless_said(self, refined):
        assert len(refined.go_on().report["steps"]) == 36 + 12

    def test_what_was_loaded_goes_on_as_what_is_in_memory(self, refined, written):
        """Only the field moving → fixed differs: it is the inverse of the other."""
        loaded = gp.load_result(written)
        assert loaded.reached.fields is None
        found, expected = loaded.go_on(8), refined.go_on(8)
        off = np.linalg.norm(found.forward.displacement - expected.forward.displacement, axis=-1)
        spacing = np.linalg.norm(expected.forward.affine[:3, :3], axis=0).min()
        assert off.mean() < 0.1 * spacing
        assert found.report["similarity"] == pytest.approx(expected.report["similarity"], rel=0.05)
        assert found.report["similarity"] < refined.report["similarity"]

    @pytest.mark.parametrize("bent", [False, True])
    def test_the_fields_of_a_loaded_result_are_those_that_were_reached(self, heads, files, tmp_path, bent):
        """On an oblique lattice, and about an initial transform."""
        matrix = np.eye(4)
        matrix[:3, 3] = 3, -2, 1
        turn = np.deg2rad(4)
        matrix[:2, :2] = [[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]
        moved = replace(heads.moving, affine=matrix @ heads.moving.affine)
        write_volume(moved, tmp_path / "moving.nii.gz")
        corners = heads.fixed.affine @ np.diag([*(n - 1 for n in reversed(heads.fixed.shape)), 1])
        field = np.zeros((2, 2, 2, 3))
        field[1] = 2.0
        initial = Deformation(field, corners, matrix) if bent else matrix
        result = register(files / "fixed.nii.gz", tmp_path / "moving.nii.gz", initial_transform=initial, **REFINED)
        result.write(tmp_path / "result")
        assert (tmp_path / "result" / "initial_transform.h5").exists() == bent
        run = prepare(gp.load_result(tmp_path / "result"), 1, Guides())
        found = run.earlier.fields(run).samples
        expected = result.reached.fields.samples
        middle = (..., *(slice(2, -2),) * 3)
        assert (found - expected)[0].abs().max() < 0.01
        assert (found - expected)[1][middle].abs().mean() < 0.1 < expected[1][middle].abs().mean()

    def test_added_landmarks_act_and_what_is_fine_stays(self, heads, refined):
        """The images alone are well registered, and a coarse level alone would lose that."""
        points, partners = landmarks(heads)
        found = refined.go_on(8, fixed_points=points, moving_points=partners)
        new = found.report["steps"][36:]
        assert [step["level"] for step in new] == [0] * 8 + [1] * 8 + [2] * 8
        distances = [(pair["before_mm"], pair["after_mm"]) for pair in found.report["landmarks"]]
        before = np.linalg.norm(refined.forward.map_points(points) - partners, axis=1).mean()
        assert np.mean([after for _, after in distances]) < before
        assert found.report["similarity"] < 1.2 * refined.report["similarity"]
        # They go on guiding, and only the finest level is run then.
        again = found.go_on(2)
        assert len(again.report["landmarks"]) == 4
        assert [step["level"] for step in again.report["steps"][-2:]] == [2, 2]
        assert again.report["steps"][-1]["landmarks"] is not None

    def test_a_coarse_level_adds_its_change_to_the_fine_fields(self, heads, refined):
        points, partners = landmarks(heads)
        run = prepare(refined, 4, Guides(landmarks=LandmarkPairs.of(points, partners)))
        found = run.result(lambda step: step.index < 3, None, False)
        # Stopped in the coarsest level.
        assert {step["level"] for step in found.report["steps"][36:]} == {0}
        before, after = refined.reached.fields, found.reached.fields
        assert after.shape == before.shape
        change = (after.samples - before.samples).numpy()
        assert np.abs(change).max() > 0.05
        # It is smooth, in contrast to the fields.
        bends = [np.square(np.diff(field, 2)).mean() for field in (change, before.samples.numpy())]
        assert bends[0] < 0.05 * bends[1]

    def test_one_that_was_stopped_early_does_the_levels_that_are_left(self, heads):
        part = register(heads.fixed, heads.moving, **REFINED, on_step=lambda step: step.level < 1)
        assert [step["level"] for step in part.report["steps"]] == [0] * 12 + [1]
        found = part.go_on(5, on_step=lambda step: step.remaining_seconds >= 0)
        assert [step["level"] for step in found.report["steps"][13:]] == [1] * 5 + [2] * 5
        assert found.report["similarity"] < part.report["similarity"]

    def test_a_finer_resolution_is_a_further_level(self, refined):
        found = refined.go_on(2, samples=60_000)
        assert len(found.report["levels"]) > len(refined.report["levels"])
        assert found.report["levels"][:3] == refined.report["levels"]
        levels = [step["level"] for step in found.report["steps"][36:]]
        assert found.report["levels"][levels[-1]] == found.report["levels"][-1]
        coarser = refined.go_on(2, samples=5000)
        assert coarser.reached.fields.shape == refined.reached.fields.shape

    def test_the_image_need_not_be_stored_in_the_order_in_which_it_is_registered(self, heads):
        turned = replace(heads.fixed, array=np.ascontiguousarray(heads.fixed.array.transpose(1, 0, 2)),
                         affine=heads.fixed.affine[:, [0, 2, 1, 3]])  # fmt: skip
        short = REFINED | {"refine_steps": 3}
        straight, other = (register(image, heads.moving, **short).go_on(2) for image in (heads.fixed, turned))
        assert other.report["levels"] == [[level[1], level[0], level[2]] for level in straight.report["levels"]]
        assert other.report["similarity"] == pytest.approx(straight.report["similarity"], rel=1e-3)


def test_levels_at_least_as_fine():
    levels = {(8, 8, 8): 5, (16, 16, 16): 5, (32, 32, 32): 5}
    assert from_level(levels, (16, 16, 16)) == {(16, 16, 16): 5, (32, 32, 32): 5}
    assert from_level(levels, (64, 64, 64)) == {(32, 32, 32): 5}
    assert from_level({}, (8, 8, 8)) == {}


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"model": "compact"}, "model cannot change"),
            ({"preset": "quick"}, "preset cannot change"),
            ({"lattice": (16, 16, 16)}, "lattice cannot change"),
            ({"method": "direct"}, "takes no steps"),
            ({"steps": 0}, "no steps to go on with"),
            ({"steps": -1}, "refine steps is -1"),
            ({"steps": 3, "refine_steps": 3}, "either the steps or the refine steps"),
            ({"smaples": 3}, "did you mean samples"),
            ({"fixed_points": [[0.0, 0, 0]]}, "in pairs"),
        ],
    )
    def test_what_makes_no_sense(self, refined, changes, words):
        with pytest.raises(InputError, match=words):
            refined.go_on(**changes)

    def test_a_folder_without_a_result(self, tmp_path):
        with pytest.raises(InputError, match="holds no result"):
            gp.load_result(tmp_path)

    def test_images_that_moved_or_changed(self, heads, files, written, tmp_path):
        images = {name: tmp_path / f"{name}.nii.gz" for name in ("fixed", "moving")}
        for name, path in images.items():
            path.write_bytes((files / f"{name}.nii.gz").read_bytes())
        register(*images.values(), **REFINED | {"refine_steps": 1}).write(tmp_path / "result")
        moved = tmp_path / "elsewhere.nii.gz"
        images["moving"].rename(moved)
        with pytest.raises(InputError, match=r"moving image of .*result is not at .*moving.nii.gz any more"):
            gp.load_result(tmp_path / "result")
        assert gp.load_result(tmp_path / "result", moving=moved).report["continued_after"] == []
        with pytest.raises(InputError, match="not on the lattice of the moving image"):
            gp.load_result(tmp_path / "result", moving=replace(heads.moving, array=heads.moving.array[1:]))
        write_volume(replace(heads.moving, array=heads.moving.array + 1), images["moving"])
        with pytest.raises(InputError, match=r"moving.nii.gz has changed since"):
            gp.load_result(tmp_path / "result")

    def test_images_that_were_no_files(self, refined, heads, tmp_path):
        refined.write(tmp_path / "result")
        with pytest.raises(InputError, match="was no file; give the image itself"):
            gp.load_result(tmp_path / "result")
        loaded = gp.load_result(tmp_path / "result", fixed=heads.fixed, moving=heads.moving)
        assert Earlier(loaded, False, False).lattice == refined.report["levels"][-1]


class TestCommand:
    def test_it_goes_on_in_the_same_folder_with_other_settings_and_landmarks(self, heads, written, tmp_path):
        result = tmp_path / "refined"
        result.mkdir()
        for path in written.iterdir():
            (result / path.name).write_bytes(path.read_bytes())
        for name, points in zip(("fixed", "moving"), landmarks(heads), strict=True):
            rows = "\n".join(",".join(map(str, point)) for point in points.tolist())
            (tmp_path / f"{name}.csv").write_text(f"x,y,z\n{rows}\n")
        said = in_another_process(
            "--from", result, "-o", result, "--refine-steps", 2, "--regularity-weight", 1,
            "--fixed-points", "fixed.csv", "--moving-points", "moving.csv", cwd=tmp_path,
        )  # fmt: skip
        report = json.loads((result / "report.json").read_text())
        assert report["continued_after"] == [36]
        assert len(report["steps"]) == 36 + 6
        assert report["settings"]["regularity_weight"] == 1
        assert "42 refinement steps" in said
        # The folder has the landmarks, too.
        assert len(gp.load_result(result).go_on(1).report["landmarks"]) == 4

    def test_labels_that_were_warped_are_warped_again(self, files, heads, tmp_path, monkeypatch, capsys):
        labels, result = tmp_path / "labels.nii.gz", tmp_path / "result"
        write_volume(heads.moving_labels, labels)
        monkeypatch.chdir(files)
        small = ["--model", "none", "--device", "cpu", "--quiet", "--samples", "20000"]
        assert main(["register", "fixed.nii.gz", "moving.nii.gz", "-o", str(result), "--refine-steps", "1", *small,
                     "--moving-labels", str(labels)]) == 0  # fmt: skip
        again = ["register", "--from", str(result), "-o", str(result), "--refine-steps", "20", "--quiet"]
        before = read_labels(result / "warped_labels.nii.gz").array
        assert main(again) == 0
        found = gp.load_result(result)
        warped = read_labels(result / "warped_labels.nii.gz").array
        assert np.array_equal(warped, found.forward.warp(heads.moving_labels, heads.fixed, "nearest").array)
        assert not np.array_equal(warped, before)
        # They guide nothing.
        assert found.reached.guides.labels is None
        labels.unlink()
        assert main(again) == 0
        assert "labels.nii.gz is gone or has changed" in capsys.readouterr().err
        assert not (result / "warped_labels.nii.gz").exists()

    def test_what_is_said_of_volumes_is_about_the_last_result(self, heads):
        wild = register(heads.fixed, heads.moving, **REFINED | {"refine_steps": 2})
        wild.report["warnings"] = [f"{CHANGES_VOLUMES}: 20 times", "Another warning."]
        assert wild.go_on(1).report["warnings"] == ["Another warning."]

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["--from", "missing", "-o", "out"], "missing holds no result"),
            (["--from", "{result}", "-o", "out", "--initial-transform", "a.h5"], "give only one"),
            (["--from", "{result}", "-o", "out", "--model", "compact"], "model cannot change"),
            (["--from", "{result}", "-o", "out", "{result}/warped.nii.gz", "{result}/nothing.nii.gz"], "nothing.nii"),
            (["-o", "out"], "FIXED, MOVING"),
        ],
    )
    def test_it_refuses_in_one_line(self, written, arguments, words, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        assert main(["register", *(word.format(result=written) for word in arguments)]) == 2
        said = capsys.readouterr().err
        assert words in said
        assert said.count("\n") == 1
        assert not list(tmp_path.iterdir())
