"""Batches of tiny pairs with real processes, real files and real kills."""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jobs
import numpy as np
import pytest
from conftest import smooth_noise

from GradProjIOLib.batch import processes, run
from GradProjIOLib.batch.processes import check_device
from GradProjIOLib.batch.processes import compute as compute_in_processes
from GradProjIOLib.batch.registration import LABELS, NEEDED, Registration
from GradProjIOLib.batch.run import here
from GradProjIOLib.batch.tasks import DONE, FAILED, KEPT, OPEN, Outcome, Task
from GradProjIOLib.commands.main import main
from GradProjIOLib.errors import InputError
from GradProjIOLib.evaluation.cases import read_report
from GradProjIOLib.geometry.files import STAGING_PREFIX
from GradProjIOLib.geometry.image_files import read_volume, write_volume
from GradProjIOLib.geometry.pairs import Pair, read_pairs
from GradProjIOLib.geometry.volume import Volume
from GradProjIOLib.models import registry
from GradProjIOLib.settings import PRESETS, Settings

SHAPE = (20, 22, 24)
AFFINE = np.diag([2.0, 2.5, 3.0, 1.0])
QUICK = Settings(model="compact", refine_steps=0, steps=1, device="cpu")
PAIRS, UNREADABLE, WITH_NAN = 6, 2, 4
GOOD = [f"pair{number}" for number in range(PAIRS) if number not in (UNREADABLE, WITH_NAN)]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """The processes a test starts; weights that a developer may have must not matter."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("GRADPROJIO_CACHE", "/nonexistent/gradprojio")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """A folder with pairs of noise and a table of them; one file is no image, and one has a NaN."""
    folder = tmp_path_factory.mktemp("images")
    for number in range(PAIRS):
        for role, seed in (("fixed", 2 * number), ("moving", 2 * number + 1)):
            array = smooth_noise(SHAPE, seed)
            if role == "moving" and number == WITH_NAN:
                array[5, 5, 5] = np.nan
            write_volume(Volume(array, AFFINE), folder / f"{role}{number}.nrrd")
    (folder / f"fixed{UNREADABLE}.nrrd").write_bytes(b"not an image")
    labels = np.zeros(SHAPE, np.uint8)
    labels[5:15, 5:15, 5:15] = 1
    write_volume(Volume(labels, AFFINE), folder / "labels.nrrd")
    write_table(folder / "pairs.csv", [{"case": f"pair{n}", "fixed": f"fixed{n}.nrrd", "moving": f"moving{n}.nrrd"}
                                       for n in range(PAIRS)])  # fmt: skip
    return folder


def write_table(path: Path, rows: list[dict[str, str]], delimiter: str = ",") -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def pair(images: Path, number: int, settings: Settings = QUICK, **files: Path) -> Pair:
    return Pair(f"pair{number}", images / f"fixed{number}.nrrd", images / f"moving{number}.nrrd", settings, **files)


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory) -> Path:
    """The results of three pairs, computed with one model."""
    output = tmp_path_factory.mktemp("finished")
    registry._read_once.cache_clear()
    outcomes = run.run([pair(images, number) for number in (0, 1, 3)], output, here)
    assert [outcome.state for outcome in outcomes] == [DONE] * 3
    assert registry._read_once.cache_info().misses == 1
    return output


def command(table: Path, output: Path, *options: str) -> list[str]:
    """The command for a batch of one-step registrations."""
    quick = ("--model", "compact", "--refine-steps", "0", "--steps", "1", "--device", "cpu")
    return [sys.executable, "-m", "GradProjIOLib", "batch", str(table), "-o", str(output), *quick, *options]


def folders(output: Path) -> list[str]:
    return sorted(path.name for path in output.iterdir() if path.is_dir() and not path.name.startswith("."))


def is_whole(folder: Path) -> bool:
    """Whether all files are there and can be read to the end."""
    for name in ("warped.nii.gz", "jacobian.nii.gz", "folding.nii.gz"):
        read_volume(folder / name)
    return all((folder / name).is_file() for name in NEEDED) and bool(read_report(folder)["steps"])


def stamps(output: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in output.glob("*/*")}


def outcomes_by_case(outcomes: list[Outcome]) -> dict[str, Outcome]:
    return {outcome.case: outcome for outcome in outcomes}


def wait_until(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not come true"
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    """The processes that `pid` has started and that still run, without the helpers of Python's and loky's queues."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rsplit(")", 1)[1].split()[:2]
            command = (path.parent / "cmdline").read_text()
        except OSError:
            continue
        if int(parent) == pid and state != "Z" and "resource_tracker" not in command:
            found.append(int(path.parent.name))
    return found


def test_bad_pairs_are_reported_and_the_others_done_once(images, tmp_path, capsys):
    output = tmp_path / "out"
    arguments = command(images / "pairs.csv", output)[3:]
    assert main(arguments) == 1
    said = capsys.readouterr().err
    assert f"pair{UNREADABLE}: " in said
    assert f"fixed{UNREADABLE}.nrrd cannot be read" in said
    assert "NaN" in said
    assert said.index("NaN") < said.index("is done")  # all were checked before the first one started
    assert folders(output) == GOOD
    assert all(is_whole(output / case) for case in GOOD)

    before = stamps(output)
    assert main(arguments) == 1
    assert "0 registered, 4 were done before, 2 failed" in capsys.readouterr().out
    assert stamps(output) == before

    shutil.rmtree(output / "pair1")
    (output / "pair3" / "warped.nii.gz").unlink()
    before = stamps(output)
    assert main(arguments) == 1
    assert "2 registered, 2 were done before, 2 failed" in capsys.readouterr().out
    assert {case for case in GOOD if is_whole(output / case)} == set(GOOD)
    after = stamps(output)
    assert {path.parent.name for path in before if after[path] != before[path]} == {"pair3"}


def test_the_results_are_those_of_register(images, tmp_path):
    wanted = [pair(images, 0, moving_labels=images / "labels.nrrd", fixed_mask=images / "labels.nrrd")]
    assert [outcome.state for outcome in run.run(wanted, tmp_path, here)] == [DONE]
    arguments = ["register", str(wanted[0].fixed), str(wanted[0].moving), "-o", str(tmp_path / "alone"), "--quiet",
                 "--moving-labels", str(images / "labels.nrrd"), "--fixed-mask", str(images / "labels.nrrd"),
                 "--model", "compact", "--refine-steps", "0", "--steps", "1", "--device", "cpu"]  # fmt: skip
    assert main(arguments) == 0
    alone, batched = tmp_path / "alone", tmp_path / "pair0"
    # A batch does not keep the optimizer's state, which is four times as large as the network.
    expected = {path.name for path in alone.iterdir()} - {"optimizer_state.pt"} | {"thumbnail.png"}
    assert {path.name for path in batched.iterdir()} == expected
    for name in ("warped.nii.gz", LABELS, "jacobian.nii.gz"):
        assert np.array_equal(read_volume(batched / name).array, read_volume(alone / name).array)


def test_what_changed_is_done_anew_and_nothing_else(images, tmp_path):
    copies = tmp_path / "images"
    shutil.copytree(images, copies)
    output = tmp_path / "out"

    def states(settings: Settings = QUICK) -> list[str]:
        pairs = [pair(copies, 0, settings), pair(copies, 1)]
        return [outcome.state for outcome in run.run(pairs, output, here)]

    assert states() == [DONE, DONE]
    assert states() == [KEPT, KEPT]
    assert states(Settings(model="compact", refine_steps=0, steps=1, device="auto", memory="lean")) == [KEPT, KEPT]
    (output / "pair0" / "notes.txt").write_text("of the user")
    assert states(Settings(model="compact", refine_steps=0, steps=2, device="cpu")) == [DONE, KEPT]
    assert len(read_report(output / "pair0")["steps"]) == 2
    assert (output / "pair0" / "notes.txt").read_text() == "of the user"
    shutil.copy(images / "moving5.nrrd", copies / "moving1.nrrd")
    assert states(Settings(model="compact", refine_steps=0, steps=2, device="cpu")) == [KEPT, DONE]
    assert list(output.glob(STAGING_PREFIX + "*")) == []


def test_a_failure_leaves_the_previous_result(images, finished, tmp_path, monkeypatch):
    output = shutil.copytree(finished, tmp_path / "out")
    before = stamps(output)
    # Fails when all but the report is written.
    monkeypatch.setattr("GradProjIOLib.registration.result.json_text", lambda *arguments, **options: 1 / 0)
    (outcome,) = run.run([pair(images, 0, Settings(model="compact", refine_steps=0, steps=0))], output, here)
    assert (outcome.state, outcome.kind) == (FAILED, "internal")
    assert "ZeroDivisionError" in outcome.details
    assert stamps(output) == before


def test_a_picture_that_cannot_be_drawn_costs_nothing(images, tmp_path, monkeypatch):
    monkeypatch.setattr("GradProjIOLib.report.thumbnail.write_thumbnail", lambda *arguments: 1 / 0)
    assert [outcome.state for outcome in run.run([pair(images, 0)], tmp_path, here)] == [DONE]
    assert any("could not be drawn" in warning for warning in read_report(tmp_path / "pair0")["warnings"])
    assert [outcome.state for outcome in run.run([pair(images, 0)], tmp_path, here)] == [KEPT]


def test_no_file_of_an_outdated_result_stays(images, tmp_path):
    pairs = [pair(images, 0)]
    run.run(pairs, tmp_path, here)
    (tmp_path / "pair0" / "initial_transform.h5").write_text("of the earlier result")
    run.run([pair(images, 0, Settings(model="compact", refine_steps=0, steps=0))], tmp_path, here)
    assert not (tmp_path / "pair0" / "initial_transform.h5").exists()


def test_a_batch_killed_while_it_replaces_a_result_leaves_a_whole_one_or_none(images, finished, tmp_path, monkeypatch):
    output = shutil.copytree(finished, tmp_path / "out")
    replaced = []

    def killed(source, target):
        replaced.append(target)
        if Path(target) == output / "pair0":
            raise KeyboardInterrupt
        os.rename(source, target)

    monkeypatch.setattr("GradProjIOLib.batch.registration.os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        run.run([pair(images, 0, Settings(model="compact", refine_steps=0, steps=0))], output, here)
    assert output / "pair0" in map(Path, replaced)
    assert not (output / "pair0").exists()


def test_folders_of_others_are_left_alone(images, tmp_path):
    (tmp_path / "pair0").mkdir()
    (tmp_path / "pair0" / "thesis.txt").write_text("all of it")
    (outcome,) = run.run([pair(images, 0)], tmp_path, here)
    assert outcome.state == FAILED
    assert str(tmp_path / "pair0") in outcome.message
    assert [path.name for path in (tmp_path / "pair0").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("compute", [here, compute_in_processes])
def test_pairs_that_cannot_work_are_found_before_any_computing(images, tmp_path, monkeypatch, compute):
    far = tmp_path / "far.nrrd"
    write_volume(Volume(smooth_noise(SHAPE, 3), AFFINE + np.array([[0, 0, 0, 900]] + [[0] * 4] * 3)), far)
    (tmp_path / "broken.h5").write_bytes(b"nothing")
    bad = {
        "missing": Pair("missing", images / "nowhere.nrrd", images / "moving0.nrrd", QUICK),
        "far": Pair("far", images / "fixed0.nrrd", far, QUICK),
        "weights": Pair("weights", images / "fixed0.nrrd", images / "moving0.nrrd", Settings(model="unigradicon")),
        "device": Pair("device", images / "fixed0.nrrd", images / "moving0.nrrd", Settings(device="cuda:99")),
        "transform": Pair("transform", images / "fixed0.nrrd", images / "moving0.nrrd", QUICK,
                          initial_transform=tmp_path / "broken.h5"),
    }  # fmt: skip

    def never(*arguments):
        raise AssertionError("nothing should be computed")

    monkeypatch.setattr(run, "do", never)
    monkeypatch.setattr(processes._Process, "start", never)
    found = outcomes_by_case(run.run(list(bad.values()), tmp_path / "out", compute))
    words = {"missing": "nowhere.nrrd", "far": "do not overlap",
             "weights": "weights of unigradicon", "device": "cuda:99", "transform": "broken.h5"}  # fmt: skip
    for case, word in words.items():
        assert (found[case].state, found[case].kind) == (FAILED, "input"), found[case].details
        assert word in found[case].message


def test_a_table_may_hold_any_option_of_register(images, tmp_path):
    rows = [
        {"Fixed": "fixed0.nrrd", "moving": "moving0.nrrd", "steps": "7", "lattice": "16 18 20", "moving-labels": "",
         "learning_rate": "1e-4", "align": "rigid", "weights": "my.pt"},
        {"Fixed": "fixed0.nrrd", "moving": "moving0.nrrd", "moving-labels": "labels.nrrd"},
        {"Fixed": "fixed1.nrrd", "moving": "moving1.nrrd", "steps": "-4"},
        {"Fixed": "fixed1.nrrd", "moving": "", "steps": "4"},
        {"Fixed": "fixed2.nrrd", "moving": "moving1.nrrd", "steps": "many"},
    ]  # fmt: skip
    common = {"steps": 3, "similarity": "mind"}
    (first, second), unusable = read_pairs(write_table(images / "options.csv", rows, delimiter=";"), common)
    assert first.settings == Settings(steps=7, similarity="mind", lattice=(16, 18, 20),
                                      learning_rate=1e-4, align="rigid", weights=str(images / "my.pt"))  # fmt: skip
    assert first.files == {"fixed": images / "fixed0.nrrd", "moving": images / "moving0.nrrd"}
    assert second.settings == Settings(**common)
    assert second.moving_labels == images / "labels.nrrd"
    assert first.case.startswith("moving0_to_fixed0_")
    assert first.case != second.case
    assert [word in message for message, word in zip(unusable.values(), ("-4", "moving", "many"), strict=True)]
    reordered, _ = read_pairs(write_table(images / "options.csv", rows[::-1], "\t"), common)
    assert {pair.case for pair in reordered} == {first.case, second.case}


def test_a_preset_in_a_table_gives_what_neither_the_row_nor_the_common_options_say(images):
    rows = [
        {"fixed": "fixed0.nrrd", "moving": "moving0.nrrd", "preset": "paper"},
        {"fixed": "fixed1.nrrd", "moving": "moving1.nrrd", "preset": "paper", "steps": "7"},
        {"fixed": "fixed2.nrrd", "moving": "moving1.nrrd", "preset": ""},
        {"fixed": "fixed2.nrrd", "moving": "moving0.nrrd", "preset": "papre"},
    ]
    common = {"preset": "quick", "projection": "similarity"}
    pairs, unusable = read_pairs(write_table(images / "presets.csv", rows), common)
    assert [pair.settings for pair in pairs] == [
        Settings(steps=50, refine_steps=0, projection="similarity"),
        Settings(steps=7, refine_steps=0, projection="similarity"),
        Settings(**PRESETS["quick"], projection="similarity"),
    ]
    assert ["did you mean paper?" in message for message in unusable.values()] == [True]
    with pytest.raises(InputError, match="'slow' is not known"):
        read_pairs(images / "presets.csv", {"preset": "slow"})


def test_a_batch_without_a_model_says_which_one_it_takes(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("GRADPROJIO_CACHE", str(tmp_path))
    table = write_table(tmp_path / "pairs.csv", [{"fixed": "a.nrrd", "moving": "b.nrrd", "model": ""}])
    assert main(["batch", str(table), "-o", str(tmp_path / "out"), "--workers", "1"]) == 1
    assert "where no model is chosen" in capsys.readouterr().err
    table = write_table(tmp_path / "pairs.csv", [{"fixed": "a.nrrd", "moving": "b.nrrd", "model": "none"}])
    assert main(["batch", str(table), "-o", str(tmp_path / "out"), "--workers", "1"]) == 1
    assert "where no model is chosen" not in capsys.readouterr().err


def test_a_batch_without_a_network(images, tmp_path):
    """The model none has no weights, whose checksum a result could depend on."""
    settings = Settings(model="none", refine_steps=1, device="cpu")
    (outcome,) = run.run([pair(images, 0, settings)], tmp_path, here)
    assert outcome.state == DONE, outcome.message
    assert [outcome.state for outcome in run.run([pair(images, 0, settings)], tmp_path, here)] == [KEPT]


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("fixed,moving,stepps\na,b,3\n", "did you mean steps?"),
        ("fixed,steps\na,3\n", "moving"),
        ("fixed,moving\n", "no row"),
        ("case,fixed,moving\nx,a,b\nX,c,d\n", "twice"),
        ("fixed,moving\na,b,c\n", "more columns"),
    ],
)
def test_a_useless_table_is_refused_in_one_sentence(tmp_path, capsys, content, word):
    (tmp_path / "pairs.csv").write_text(content)
    assert main(command(tmp_path / "pairs.csv", tmp_path / "out")[3:]) == 2
    said = capsys.readouterr().err
    assert word in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_summary_shows_the_worst_first(images, finished, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    pairs = [pair(images, number) for number in (0, 1, 3)]
    for case, folded in (("pair1", 900), ("pair3", 5)):
        report = read_report(tmp_path / case)
        report["jacobian"] |= {"ndv_percent": folded / 100, "folded_voxels": folded}
        (tmp_path / case / "report.json").write_text(json.dumps(report))
    run.run(pairs, tmp_path, here, failed={"lost": "the file <x> & more"})
    with open(tmp_path / "summary.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["case"] for row in rows] == ["lost", "pair1", "pair3", "pair0"]
    assert rows[1]["folded_voxels"] == "900"
    page = (tmp_path / "index.html").read_text()
    places = [page.index(f">{case}<") for case in ("lost", "pair1", "pair3", "pair0")]
    assert places == sorted(places)
    assert "the file &lt;x&gt; &amp; more" in page
    assert "3 pairs registered, 1 failed" in page
    from matplotlib.image import imread

    height, width, _ = imread(tmp_path / "pair1" / "thumbnail.png").shape
    assert height == 128
    assert width == round(128 * 3 * 24 * 2.0 / (22 * 2.5))


def test_one_batch_at_a_time_works_in_a_folder(images, tmp_path):
    def another(tasks):
        with pytest.raises(InputError, match="at work"):
            run.run([pair(images, 1)], tmp_path, here)
        return iter([Outcome("pair0", FAILED)])

    def nothing(tasks):
        return iter([])

    # A generator, as all of them are.
    assert run.run([pair(images, 0)], tmp_path, lambda tasks: (item for item in another(tasks)))[0].state == FAILED
    assert run.run([pair(images, 1)], tmp_path, lambda tasks: (item for item in nothing(tasks)))[0].state == OPEN


def test_a_killed_process_costs_nothing_but_time(images, tmp_path):
    pairs = [pair(images, number) for number in (0, 1, 3)]
    killed = []

    def compute(tasks):
        for outcome in compute_in_processes(tasks, workers=1):
            if not killed:
                # The second is computed now.
                killed.extend(children(os.getpid()))
                for pid in killed:
                    os.kill(pid, signal.SIGKILL)
            yield outcome

    found = run.run(pairs, tmp_path, compute)
    assert len(killed) == 1
    assert [outcome.state for outcome in found] == [DONE] * 3
    assert all(is_whole(tmp_path / f"pair{number}") for number in (0, 1, 3))
    assert children(os.getpid()) == []


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("deadly", [{0}, {3}, {1, 2}, {0, 1, 2, 3, 4, 5, 6}])
def test_only_pairs_that_bring_their_process_down_are_lost(images, tmp_path, workers, deadly):
    job = jobs.Abort({f"pair{number}" for number in deadly})
    fixed, moving = images / "fixed0.nrrd", images / "moving0.nrrd"
    tasks = [Task(job, Pair(f"pair{n}", fixed, moving), tmp_path, {}) for n in range(7)]
    found = outcomes_by_case(list(compute_in_processes(tasks, workers)))
    assert {case for case, outcome in found.items() if outcome.state == FAILED} == {f"pair{n}" for n in deadly}
    assert len(found) == 7
    assert all("SIGABRT" in found[f"pair{number}"].details for number in deadly)
    assert children(os.getpid()) == []


def test_the_threads_of_a_process_are_set_before_it_starts(images, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(processes, "cpu_count", lambda: 6)
    task = Task(jobs.Say("environment"), pair(images, 0), tmp_path, {})
    assert [outcome.message for outcome in compute_in_processes([task], 2)] == ["3"]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert [outcome.message for outcome in compute_in_processes([task], 2)] == ["5"]


def start(images: Path, output: Path, *options: str) -> subprocess.Popen:
    """The command in a process group of its own, as a shell starts it."""
    return subprocess.Popen(
        command(images / "pairs.csv", output, *options), start_new_session=True, stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip


def test_each_graphics_card_has_a_process_of_its_own(images, tmp_path, monkeypatch):
    monkeypatch.setattr("GradProjIOLib.batch.processes.graphics_cards", lambda: 2)
    check_device("cuda:1")
    with pytest.raises(InputError, match="cuda:2"):
        check_device("cuda:2")
    devices = ["auto", "cuda", "cpu", "cuda:1", "auto", "auto"]
    fixed, moving = images / "fixed0.nrrd", images / "moving0.nrrd"
    tasks = [
        Task(jobs.Say("device"), Pair(f"pair{number}", fixed, moving, Settings(device=device)), tmp_path, {})
        for number, device in enumerate(devices)
    ]
    found = outcomes_by_case(list(compute_in_processes(tasks)))
    used = [found[f"pair{number}"].message for number in range(len(tasks))]
    assert used[2:4] == ["cpu", "cuda:1"]
    assert set(used[:2]) == {"cuda:0", "cuda:1"}
    assert set(used[4:]) <= {"cuda:0", "cuda:1"}


def check_whole(output: Path) -> list[str]:
    """The pairs that are there, all of them whole."""
    done = folders(output) if output.exists() else []
    assert all(is_whole(output / case) for case in done)
    return done


def finish_batch(images: Path, output: Path) -> None:
    """Start the command once more and let it end."""
    assert start(images, output).wait(240) == 1
    assert check_whole(output) == GOOD
    assert list(output.glob(STAGING_PREFIX + "*")) == []


def test_what_was_killed_or_interrupted_leaves_whole_folders_and_goes_on(images, tmp_path):
    process = start(images, tmp_path, "--workers", "1")
    wait_until(lambda: folders(tmp_path))
    (worker,) = children(process.pid)
    process.kill()
    process.communicate()
    wait_until(lambda: not Path(f"/proc/{worker}").exists())
    done = check_whole(tmp_path)

    process = start(images, tmp_path)
    wait_until(lambda: len(folders(tmp_path)) > len(done) or process.poll() is not None)
    workers = children(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "Traceback" not in said
    done = check_whole(tmp_path)
    assert f"interrupted with {len(done)} pairs done" in said
    assert list(tmp_path.glob(STAGING_PREFIX + "*")) == []
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    assert "not done yet" in (tmp_path / "index.html").read_text()

    finish_batch(images, tmp_path)


@pytest.mark.slow
def test_ten_kills_at_random_moments(images, tmp_path):
    begin = time.monotonic()
    finish_batch(images, tmp_path / "first")
    duration = time.monotonic() - begin
    chance = random.Random(7)
    output, moments = tmp_path / "out", []
    for turn in range(10):
        if output.exists() and folders(output) == GOOD:
            shutil.rmtree(output)
        process = start(images, output, "--workers", "2")
        moment = chance.uniform(0.1, 1) * duration
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            # The whole group at times, at times only the command: then its workers must notice.
            os.killpg(process.pid, signal.SIGKILL) if turn % 2 else process.kill()
        process.communicate()
        moments.append((round(moment, 1), process.returncode, len(check_whole(output))))
    print(f"seconds of {duration:.1f}, status, pairs that are whole then:", moments)
    finish_batch(images, output)


class Cluster:
    """A Dask scheduler and workers on this computer, as processes."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "scheduler.json"
        self.processes = [self._start("scheduler", "--port", "0", "--no-dashboard")]
        wait_until(self.file.exists)

    def _start(self, kind: str, *options: str) -> subprocess.Popen:
        words = [sys.executable, "-m", "dask", kind, "--host", "127.0.0.1", "--scheduler-file", str(self.file)]
        return subprocess.Popen([*words, *options], stderr=subprocess.DEVNULL, cwd=self.file.parent)

    def add_worker(self, *options: str) -> subprocess.Popen:
        worker = self._start("worker", "--nthreads", "2", "--no-nanny", "--no-dashboard", *options)
        self.processes.append(worker)
        return worker

    def close(self) -> None:
        # Workers first: one that has lost its scheduler may wait for it to come back.
        for process in reversed(self.processes):
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture
def cluster(tmp_path):
    pytest.importorskip("distributed")
    cluster = Cluster(tmp_path)
    yield cluster
    cluster.close()


def test_a_cluster_that_loses_a_worker_loses_no_pair(images, tmp_path, cluster):
    from GradProjIOLib.batch.cluster import compute

    resources = ("--resources", "GPU=1")
    doomed = cluster.add_worker(*resources, "--name", "doomed")
    cluster.add_worker(*resources, "--name", "other")
    steps = Settings(model="compact", refine_steps=0, steps=2, device="auto")
    pairs = [pair(images, number, steps) for number in (0, 1, 3, 5)]
    reported = []

    def kill(outcome: Outcome) -> None:
        if not reported:
            doomed.kill()
        reported.append(outcome.case)

    found = run.run(pairs, tmp_path / "out", lambda tasks: compute(tasks, str(cluster.file)), kill)
    assert doomed.wait(5) == -signal.SIGKILL
    assert [outcome.state for outcome in found] == [DONE] * 4
    assert sorted(reported) == sorted(GOOD)
    assert all(is_whole(tmp_path / "out" / case) for case in GOOD)
    assert list((tmp_path / "out").glob(STAGING_PREFIX + "*")) == []


def test_a_scheduler_that_is_not_there_is_reported(images, tmp_path, monkeypatch, capsys):
    pytest.importorskip("distributed")
    monkeypatch.setattr("GradProjIOLib.batch.cluster.CONNECTION_SECONDS", 1)
    arguments = command(images / "pairs.csv", tmp_path / "out", "--scheduler", "tcp://127.0.0.1:9")[3:]
    assert main(arguments) == 2
    assert "no Dask scheduler at tcp://127.0.0.1:9" in capsys.readouterr().err


def test_a_result_is_done_only_when_nothing_is_missing(images, finished, tmp_path):
    folder = shutil.copytree(finished / "pair0", tmp_path / "pair0")
    wanted = read_report(folder)["request"]

    def is_done(fingerprint) -> bool:
        job = Registration()
        return job.is_done(Task(job, pair(images, 0), tmp_path, fingerprint))

    assert is_done(wanted)
    assert not is_done(wanted | {"weights": "another"})
    assert not is_done(wanted | {"files": wanted["files"] | {"moving_labels": "one"}})
    for name in NEEDED[:-1]:
        (folder / name).rename(tmp_path / name)
        assert not is_done(wanted)
        (tmp_path / name).rename(folder / name)
    (folder / "report.json").write_text("{")
    assert not is_done(wanted)
    (folder / "report.json").unlink()
    with pytest.raises(InputError, match="no result"):
        is_done(wanted)
