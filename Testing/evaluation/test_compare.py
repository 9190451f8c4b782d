"""`gradprojio compare` on small pairs: the table, what settings share, and what a killed run leaves behind."""

import csv
import json
import os
import signal
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from scipy import ndimage

from GradProjIOLib.batch import trajectory
from GradProjIOLib.commands import main
from GradProjIOLib.engine.optimization import InstanceOptimizer
from GradProjIOLib.errors import InputError
from GradProjIOLib.evaluation import comparison, metrics
from GradProjIOLib.geometry.image_files import read_labels, read_volume, write_volume
from GradProjIOLib.geometry.volume import Volume
from GradProjIOLib.registration.register import register
from GradProjIOLib.settings import Settings

pytest.importorskip("SimpleITK")
SHAPE = (22, 24, 20)
AFFINE = np.diag([2.0, 2.0, 2.5, 1.0])
METHODS = "direct,vanilla:2,projected:2,vanilla:4,projected:4"
# With this learning rate the gradients conflict from the third step on.
SETTINGS = ["--model", "compact", "--lattice", "16", "16", "16", "--device", "cpu", "--learning-rate", "1e-4"]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Results are compared bit for bit, also between processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def smooth(seed: int, channels: int, width: float) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=(channels, *SHAPE))
    return np.stack([ndimage.gaussian_filter(channel, width) for channel in noise])


def write_pairs(folder):
    """A table of two pairs: blobs, and the same blobs moved by a smooth field."""
    lines = ["case,fixed,moving,fixed_labels,moving_labels"]
    for case in ("one", "two"):
        seed = len(case) + ord(case[0])
        labels = smooth(seed, 4, 3).argmax(axis=0)
        image = 40 * labels + 10 * smooth(seed + 1, 1, 1)[0] / 0.1
        shift = smooth(seed + 2, 3, 4)
        points = np.indices(SHAPE) + 1.5 * shift / shift.std()
        for side, at in (("fixed", np.indices(SHAPE)), ("moving", points)):
            warped = ndimage.map_coordinates(image, at, order=1, mode="nearest").astype(np.float32)
            warped_labels = ndimage.map_coordinates(labels, at, order=0, mode="nearest").astype(np.uint8)
            write_volume(Volume(warped, AFFINE), folder / f"{case}_{side}.nii.gz")
            write_volume(Volume(warped_labels, AFFINE), folder / f"{case}_{side}_labels.nii.gz")
        files = [f"{case}_{name}.nii.gz" for name in ("fixed", "moving", "fixed_labels", "moving_labels")]
        lines.append(",".join([case, *files]))
    path = folder / "pairs.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def pairs(tmp_path):
    return write_pairs(tmp_path)


@pytest.fixture(scope="module")
def compared(tmp_path_factory, one_thread):
    """The folder of two pairs and, in `out`, of their comparison."""
    folder = tmp_path_factory.mktemp("compared")
    assert run(write_pairs(folder), folder / "out") == 0
    return folder


def run(pairs, output, *more, methods=METHODS) -> int:
    return main.main(["compare", str(pairs), "-o", str(output), "--methods", methods, "--every", "1",
                     *SETTINGS, *map(str, more)])  # fmt: skip


def rows_of(output, *, without=("seconds",)):
    rows = json.loads((output / "results.json").read_text())["cases"]
    return [{key: value for key, value in row.items() if key not in without} for row in rows]


def test_table_is_that_of_single_registrations(compared):
    """Every row is what `register` with that method and number of steps gives, bit for bit."""
    output = compared / "out"
    rows = {(row["case"], row["group"]): row for row in rows_of(output)}
    assert len(rows) == 10
    fixed, moving = (read_volume(compared / f"one_{side}.nii.gz") for side in ("fixed", "moving"))
    labels = [read_labels(compared / f"one_{side}_labels.nii.gz") for side in ("fixed", "moving")]
    for method, steps in (("direct", 0), ("vanilla", 2), ("projected", 2), ("vanilla", 4), ("projected", 4)):
        settings = Settings(
            model="compact",
            refine_steps=0,
            lattice=(16, 16, 16),
            method=method,
            steps=steps,
            device="cpu",
            learning_rate=1e-4,
        )
        forward = register(fixed, moving, settings).forward
        expected = metrics.evaluate_labels(forward, *labels)
        row = rows["one", f"{method}:{steps}" if steps else "direct"]
        assert (row["dice"], row["hd95_mm"]) == (expected["dice"], expected["hd95_mm"])
        assert row["ndv_percent"] == metrics.evaluate_folding(forward, fixed)["ndv_percent"]
    assert rows["one", "vanilla:4"]["std_log_jacobian"] != rows["one", "projected:4"]["std_log_jacobian"]
    text = (output / "table.txt").read_text()
    assert "projected:4" in text
    assert "p (Wilcoxon)" in text
    with open(output / "results.csv", newline="") as file:
        assert sum(line["case"] in ("one", "two") for line in csv.DictReader(file)) == 10
    for name in ("curves.png", "table.txt"):
        assert (output / name).stat().st_size > 100
    assert {path.name for path in output.glob("*/*")} == {"vanilla.json", "projected.json"}


def test_settings_share_steps(pairs, tmp_path, monkeypatch):
    """Five settings of one pair take four vanilla and four projected steps and one direct result, no more."""
    taken = []
    step = InstanceOptimizer._step

    def counted(self, index):
        taken.append((self.method, index))
        return step(self, index)

    monkeypatch.setattr(InstanceOptimizer, "_step", counted)
    one_pair = tmp_path / "one.csv"
    one_pair.write_text("\n".join(pairs.read_text().splitlines()[:2]))
    assert run(one_pair, tmp_path / "out") == 0
    assert taken == [(method, index) for method in ("vanilla", "projected") for index in range(4)]
    assert run(one_pair, tmp_path / "out") == 0
    assert len(taken) == 8
    assert run(one_pair, tmp_path / "out", methods="direct,vanilla:1,projected:3") == 0
    assert len(taken) == 8 + 1 + 3  # measured less at these steps before, so that they are taken anew
    assert run(one_pair, tmp_path / "out", methods="direct,vanilla:1,vanilla:2,projected:3,projected:0+1") == 0
    assert taken[12:14] == [("vanilla", 0), ("vanilla", 1)]
    assert {method for method, _ in taken[14:]} == {"projected"}
    assert len(taken) == 14 + 3  # a step at each level of the refinement


def test_leaner_mode_begins_anew(compared, tmp_path, monkeypatch):
    """Where memory runs out, the registration begins anew in its lean mode, and is measured anew."""
    step = InstanceOptimizer._step
    failures = []

    def short_of_memory(self, index):
        if index == 3 and not failures:
            failures.append(self.method)
            raise torch.OutOfMemoryError("no memory")
        return step(self, index)

    monkeypatch.setattr(InstanceOptimizer, "_step", short_of_memory)
    table = tmp_path / "one.csv"
    lines = (compared / "pairs.csv").read_text().splitlines()[:2]
    table.write_text("\n".join(lines).replace("one_", f"{compared}/one_"))
    assert run(table, tmp_path / "out") == 0
    assert failures == ["vanilla"]
    assert len(json.loads((tmp_path / "out" / "one" / "vanilla.json").read_text())["steps"]) == 4
    assert rows_of(tmp_path / "out") == [row for row in rows_of(compared / "out") if row["case"] == "one"]


def test_killed_comparison_goes_on(pairs, tmp_path, capsys):
    """A process that is killed in the middle leaves the runs that ended; the next call ends at the same."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    methods = "direct,vanilla:1,projected:8"
    command = [sys.executable, "-m", "GradProjIOLib", "compare", str(pairs), "-o", str(killed), "--methods",
               methods, "--every", "1", *SETTINGS]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert any("one: projected, step 3 of 8" in line for line in process.stderr)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert [path.name for path in (killed / "one").glob("[!.]*")] == ["vanilla.json"]
    assert not (killed / "two").exists()
    pairs.write_text("\n".join(pairs.read_text().splitlines()[:2]))
    capsys.readouterr()
    assert run(pairs, killed, methods=methods) == 0
    said = capsys.readouterr().err
    assert "one: projected, step 1 of 8, Dice" in said
    assert "one: vanilla, step" not in said
    assert run(pairs, whole, methods=methods) == 0
    assert rows_of(killed) == rows_of(whole)
    first, second = (json.loads((folder / "one" / "projected.json").read_text())["steps"] for folder in (whole, killed))
    timeless = {"seconds": 0, "remaining_seconds": 0}
    assert [step | timeless for step in first] == [step | timeless for step in second]
    assert any(step["projected"] != "none" for step in first[3:])
    assert {path.name for path in (killed / "one").iterdir()} == {"vanilla.json", "projected.json"}


def test_broken_pair_does_not_stop_the_others(pairs, tmp_path, capsys):
    (tmp_path / "one_moving.nii.gz").write_bytes(b"broken")
    assert run(pairs, tmp_path / "out", methods="direct,projected:1") == 2
    assert {row["case"] for row in rows_of(tmp_path / "out")} == {"two"}
    failed = json.loads((tmp_path / "out" / "results.json").read_text())["failed"]
    assert [failure["case"] for failure in failed] == ["one"]
    assert "one_moving.nii.gz" in capsys.readouterr().err


def test_pair_that_fails_for_another_reason(pairs, tmp_path, monkeypatch, capsys):
    """An error of the program itself is reported with the pair and gives another exit status."""
    measure = trajectory.measure

    def fails(deformation, inputs, *arguments):
        if "one_fixed" in inputs["fixed"].name:
            raise RuntimeError("no luck")
        return measure(deformation, inputs, *arguments)

    monkeypatch.setattr(trajectory, "measure", fails)
    assert run(pairs, tmp_path / "out", methods="direct") == 1
    assert {row["case"] for row in rows_of(tmp_path / "out")} == {"two"}
    assert "one: RuntimeError: no luck" in capsys.readouterr().err


def test_other_settings_do_not_mix(pairs, tmp_path, capsys):
    assert run(pairs, tmp_path / "out", methods="direct") == 0
    assert run(pairs, tmp_path / "out", "--seed", "1", methods="direct") == 2
    assert "other inputs or settings (seed)" in capsys.readouterr().err


def test_curves_hold_what_was_measured(compared):
    compared_settings = comparison.Comparison(comparison.parse_settings(METHODS), every=1)
    records = [compared_settings.records(compared / "out", case) for case in ("one", "two")]
    dice, folding, cosine, conflicts = compared_settings.panels(records)
    rows = {(row["case"], row["group"]): row for row in rows_of(compared / "out")}
    vanilla = dice.curves[0]
    assert list(vanilla.x) == [0, 1, 2, 3, 4]
    assert vanilla.cases[1][4] == rows["two", "vanilla:4"]["dice"]
    assert [values[0] for values in vanilla.cases] == [rows[case, "direct"]["dice"] for case in ("one", "two")]
    assert folding.curves[1].cases[0][2] == rows["one", "projected:2"]["ndv_percent"]
    assert [curve.name for curve in cosine.curves] == ["projected"]
    known = np.array(cosine.curves[0].cases[0])
    np.testing.assert_allclose(conflicts.curves[0].cases[0], np.cumsum(known < 0) / np.arange(1, 5))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "vanilla",
        "vanilla:0",
        "projected:-1",
        "direct:5",
        "newton:3",
        "direct,direct",
        "vanilla:x",
        "projected:0+0",
        "projected:5+",
        "direct+5",
        "projected:+5",
        "projected:5+0,projected:5",
    ],
)
def test_methods_that_make_no_sense(text):
    with pytest.raises(InputError):
        comparison.parse_settings(text)


def test_papers_settings():
    assert [str(setting) for setting in comparison.parse_settings(comparison.PAPER)] == comparison.PAPER.split(",")
    assert comparison.DEFAULT.startswith(comparison.PAPER)
    assert comparison.Setting.parse("projected:50+60") == comparison.Setting("projected", 50, 60)


def test_refined_settings_are_further_rows(compared, tmp_path, monkeypatch):
    """They are what `register` gives; the other rows are not refined; a second call computes nothing."""
    taken = []
    step = InstanceOptimizer._step

    def counted(self, index):
        taken.append((self.method, type(self.objective.model).__name__))
        return step(self, index)

    table = tmp_path / "one.csv"
    lines = (compared / "pairs.csv").read_text().splitlines()[:2]
    table.write_text("\n".join(lines).replace("one_", f"{compared}/one_"))
    more = f"{METHODS},projected:2+1,vanilla:0+1"
    with monkeypatch.context() as patch:
        patch.setattr(InstanceOptimizer, "_step", counted)
        assert run(table, tmp_path / "out", methods=more) == 0
        levels = 3
        assert Counter(taken) == {
            ("vanilla", "Cascade"): 4,
            ("projected", "Cascade"): 4 + 2,
            ("projected", "Displacements"): levels,
            ("vanilla", "Displacements"): levels,
        }
        assert run(table, tmp_path / "out", methods=more) == 0
        assert len(taken) == 10 + 2 * levels
    rows = rows_of(tmp_path / "out")
    plain = [row for row in rows if "+" not in row["group"]]
    assert plain == [row for row in rows_of(compared / "out") if row["case"] == "one"]
    refined = {row["group"]: row for row in rows if "+" in row["group"]}
    settings = Settings(model="compact", lattice=(16, 16, 16), steps=2, refine_steps=1, device="cpu",
                        learning_rate=1e-4)  # fmt: skip
    images = [read_volume(compared / f"one_{side}.nii.gz") for side in ("fixed", "moving")]
    labels = [read_labels(compared / f"one_{side}_labels.nii.gz") for side in ("fixed", "moving")]
    expected = metrics.evaluate_labels(register(*images, settings).forward, *labels)
    row = refined["projected:2+1"]
    assert (row["dice"], row["hd95_mm"]) == (expected["dice"], expected["hd95_mm"])
    text = (tmp_path / "out" / "table.txt").read_text()
    assert "vanilla:0+1" in text
    assert (tmp_path / "out" / "curves.png").exists()


def test_without_a_network_only_refinements_are_compared(compared, tmp_path, capsys):
    table = tmp_path / "one.csv"
    lines = (compared / "pairs.csv").read_text().splitlines()[:2]
    table.write_text("\n".join(lines).replace("one_", f"{compared}/one_"))
    command = ["compare", str(table), "-o", str(tmp_path / "out"), "--model", "none", "--device", "cpu"]
    assert main.main([*command, "--methods", "projected:0+1,vanilla:0+1"]) == 0
    assert [row["group"] for row in rows_of(tmp_path / "out")] == ["projected:0+1", "vanilla:0+1"]
    capsys.readouterr()
    assert main.main([*command, "--methods", "direct,projected:0+1"]) == 2
    assert "has no network to optimize" in capsys.readouterr().err


def test_steps_on_a_network_have_one_where_a_refinement_would_take_none(compared, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADPROJIO_CACHE", str(tmp_path))
    table = tmp_path / "one.csv"
    lines = (compared / "pairs.csv").read_text().splitlines()[:2]
    table.write_text("\n".join(lines).replace("one_", f"{compared}/one_"))
    command = ["compare", str(table), "-o", str(tmp_path / "out"), "--similarity", "mind", "--device", "cpu"]
    assert main.main([*command, "--methods", "direct,projected:1", "--quiet"]) == 0
    assert {row["group"] for row in rows_of(tmp_path / "out")} == {"direct", "projected:1"}


def test_pairs_that_make_no_sense(tmp_path, capsys):
    path = tmp_path / "pairs.csv"
    header = "case,fixed,moving,fixed_labels,moving_labels\n"
    for rows, words in (
        ("../up,f,m,fl,ml\n", "cannot be the name of a folder"),
        (".hidden,f,m,fl,ml\n", "cannot be the name of a folder"),
        ("a,f,m,fl,ml\nA,f,m,fl,ml\n", "the case 'a' twice"),
        ("a,f,m,,ml\n", "no file for fixed labels"),
    ):
        path.write_text(header + rows)
        assert run(path, tmp_path / "out", methods="direct") == 2
        assert words in capsys.readouterr().err
    path.write_text("fixed,moving\na,b\n")
    assert run(path, tmp_path / "out", methods="direct") == 2
    assert "lacks the column fixed_labels" in capsys.readouterr().err


def test_pairs_in_processes_give_the_same_table(compared, tmp_path, monkeypatch):
    """With --workers the pairs are computed in processes of their own, and a table may have semicolons."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    table = tmp_path / "pairs.csv"
    text = (compared / "pairs.csv").read_text().replace(",", ";")
    table.write_text(text.replace("one_", f"{compared}/one_").replace("two_", f"{compared}/two_"))
    assert run(table, tmp_path / "out", "--workers", "2") == 0
    assert rows_of(tmp_path / "out") == rows_of(compared / "out")
