"""The command as a user meets it: real files, real processes, exit status, one line on standard error."""

import fcntl
import json
import os
import pty
import resource
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from GradProjIOLib.commands.main import main
from GradProjIOLib.geometry.image_files import read_volume, write_volume
from GradProjIOLib.geometry.lattice import lattice_points
from GradProjIOLib.geometry.volume import Volume
from GradProjIOLib.spatial.deformation import Deformation
from GradProjIOLib.synthetic import phantom

QUICK = ["--model", "compact", "--method", "direct", "--device", "cpu", "--quiet"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": ""}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A folder with a small pair of heads and labels."""
    folder = tmp_path_factory.mktemp("pair")
    heads = phantom.make_pair(0, (28, 32, 28), spacing=6.8, with_skull=False)
    for name in ("fixed", "moving", "fixed_labels", "moving_labels"):
        write_volume(getattr(heads, name), folder / f"{name}.nii.gz")
    return folder


def command(*arguments, **options):
    return subprocess.run([sys.executable, "-m", "GradProjIOLib", *map(str, arguments)], text=True,
                          capture_output=True, env=ENVIRONMENT, timeout=120, check=False, **options)  # fmt: skip


def register_arguments(pair, output, *more):
    return ["register", pair / "fixed.nii.gz", pair / "moving.nii.gz", "-o", output, *QUICK, *more]


def run(*arguments):
    return main([str(argument) for argument in arguments])


class TestRegister:
    def test_the_whole_way(self, pair, tmp_path):
        found = command("register", pair / "fixed.nii.gz", pair / "moving.nii.gz", "-o", tmp_path / "out",
                        "--model", "compact", "--steps", 2, "--refine-steps", 0, "--device", "cpu",
                        "--moving-labels", pair / "moving_labels.nii.gz")  # fmt: skip
        assert found.returncode == 0, found.stderr
        assert "compact, projected, 2 IO steps on cpu in" in found.stdout
        assert "folded voxels" in found.stdout
        assert (tmp_path / "out" / "warped_labels.nii.gz").exists()
        report = json.loads((tmp_path / "out" / "report.json").read_text())
        assert report["inputs"]["fixed"]["path"] == str((pair / "fixed.nii.gz").resolve())
        assert len(report["inputs"]["moving"]["sha256"]) == 64

    def test_quiet_says_nothing(self, pair, tmp_path):
        found = command(*register_arguments(pair, tmp_path / "out"))
        assert (found.returncode, found.stdout, found.stderr) == (0, "", "")

    def test_same_seed_same_result(self, pair, tmp_path):
        reports = []
        for name in ("first", "second"):
            arguments = register_arguments(
                pair, tmp_path / name, "--method", "projected", "--steps", 3, "--refine-steps", 0, "--seed", 4
            )
            assert command(*arguments).returncode == 0
            reports.append(json.loads((tmp_path / name / "report.json").read_text()))
        first, second = ([(s["similarity"], s["regularity"], s["cosine"]) for s in r["steps"]] for r in reports)
        assert first == second
        images = [sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / name / "warped.nii.gz")))
                  for name in ("first", "second")]  # fmt: skip
        assert np.array_equal(*images)

    def test_other_formats(self, pair, tmp_path):
        for suffix in (".nrrd", ".mha"):
            path = tmp_path / f"fixed{suffix}"
            sitk.WriteImage(sitk.ReadImage(str(pair / "fixed.nii.gz")), str(path))
            arguments = ["register", path, pair / "moving.nii.gz", "-o", tmp_path / suffix[1:], *QUICK]
            assert run(*arguments) == 0

    @pytest.mark.parametrize("kind", ["rigid", "spline", "composite"])
    def test_an_initial_transform_of_any_kind_is_where_simpleitk_puts_it(self, pair, tmp_path, kind):
        rigid = sitk.Euler3DTransform((0, 0, 0), 0.05, 0, 0.02, (4, 2, -6))
        spline = sitk.BSplineTransformInitializer(sitk.ReadImage(str(pair / "fixed.nii.gz")), [5, 5, 5], 3)
        spline.SetParameters(np.random.default_rng(0).normal(0, 4, len(spline.GetParameters())).tolist())
        initial = {"rigid": rigid, "spline": spline, "composite": sitk.CompositeTransform([rigid, spline])}[kind]
        sitk.WriteTransform(initial, str(tmp_path / "initial.h5"))
        still = ["--model", "none", "--refine-steps", "0", "--device", "cpu", "--quiet"]
        images = pair / "fixed.nii.gz", pair / "moving.nii.gz"
        out = tmp_path / "out"
        assert run("register", *images, "-o", out, *still, "--initial-transform", tmp_path / "initial.h5") == 0
        fixed, moving = (sitk.ReadImage(str(path)) for path in images)
        expected, found = (
            sitk.GetArrayFromImage(sitk.Resample(moving, fixed, transform, sitk.sitkLinear, 0.0))
            for transform in (initial, sitk.ReadTransform(str(out / "transform.h5")))
        )
        written = sitk.GetArrayFromImage(sitk.ReadImage(str(out / "warped.nii.gz")))
        inner = (slice(2, -2),) * 3
        assert np.abs(found - expected)[inner].max() < 0.02 * np.ptp(expected)
        assert np.abs(written - expected)[inner].max() < 0.02 * np.ptp(expected)

    def test_names_in_any_script_with_an_ascii_locale(self, pair, tmp_path):
        folder = tmp_path / "größe 変形"
        folder.mkdir()
        images = [folder / f"{name} ж.nii.gz" for name in ("fixed", "moving")]
        for image in images:
            image.write_bytes((pair / f"{image.name.split()[0]}.nii.gz").read_bytes())
        labels = [folder / f"{name} ж.seg.nrrd" for name in ("fixed", "moving")]
        for path in labels:
            write_volume(read_volume(pair / f"{path.name.split()[0]}_labels.nii.gz"), path)
        ascii_only = {**ENVIRONMENT, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
        for more in (
            ["register", *images, "-o", folder / "out", "--model", "none", "--refine-steps", "1",
             "--fixed-labels", labels[0], "--moving-labels", labels[1]],
            ["warp", images[1], folder / "out" / "transform.h5", "-r", images[0], "-o", folder / "ж.nrrd"],
        ):  # fmt: skip
            found = subprocess.run([sys.executable, "-m", "GradProjIOLib", *map(str, more)], capture_output=True,
                                   env=ascii_only, timeout=120, check=False)  # fmt: skip
            assert found.returncode == 0, found.stderr
            assert b"Traceback" not in found.stderr
        assert (folder / "ж.nrrd").exists()
        assert (folder / "out" / "overview.png").exists()
        report = json.loads((folder / "out" / "report.json").read_text())
        assert report["inputs"]["fixed"]["path"] == str(images[0])


class TestOtherVerbs:
    def test_warp_and_jacobian_agree_with_register(self, pair, tmp_path, capsys):
        out = tmp_path / "out"
        assert run(*register_arguments(pair, out, "--method", "projected", "--steps", 2, "--refine-steps", 0,
                                       "--moving-labels", pair / "moving_labels.nii.gz")) == 0  # fmt: skip
        capsys.readouterr()
        for source, target, more in (("moving", "warped", []), ("moving_labels", "warped_labels", ["--labels"])):
            assert run("warp", pair / f"{source}.nii.gz", out / "transform.h5", "-r", pair / "fixed.nii.gz",
                       "-o", tmp_path / "again.nii.gz", *more) == 0  # fmt: skip
            again, first = (sitk.GetArrayFromImage(sitk.ReadImage(str(path))).astype(float)
                            for path in (tmp_path / "again.nii.gz", out / f"{target}.nii.gz"))  # fmt: skip
            np.testing.assert_allclose(again, first, atol=1e-2 * first.max())
        # The folder of a result stands for its transform.
        assert run("jacobian", out, "-r", pair / "fixed.nii.gz", "-o", tmp_path / "j.nii.gz",
                   "--folding", tmp_path / "f.nii.gz") == 0  # fmt: skip
        printed = json.loads(capsys.readouterr().out)
        assert printed == pytest.approx(json.loads((out / "report.json").read_text())["jacobian"], rel=1e-4, abs=1e-6)
        determinant = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "j.nii.gz")))
        assert determinant.min() == pytest.approx(printed["min"], rel=1e-4)

    def test_warping_labels_without_saying_so_is_noticed(self, pair, tmp_path, capsys):
        identity = tmp_path / "identity.tfm"
        sitk.WriteTransform(sitk.Euler3DTransform(), str(identity))
        moving, labels = pair / "moving.nii.gz", tmp_path / "labels.nii.gz"
        blocks = np.zeros(read_volume(moving).shape, np.uint8)
        blocks[4:, 4:, 4:], blocks[8:, 8:, 8:] = 1, 2
        write_volume(Volume(blocks, read_volume(moving).affine), labels)
        more = [identity, "-r", pair / "fixed.nii.gz", "-o", tmp_path / "warped.nii.gz"]
        for image, options, noticed in ((labels, [], True), (labels, ["--labels"], False), (moving, [], False)):
            assert run("warp", image, *more, *options) == 0
            assert ("looks like a label map" in capsys.readouterr().err) == noticed

    def test_a_series_whose_axes_are_straightened_is_noticed(self, pair, tmp_path, capsys):
        identity, path = tmp_path / "identity.tfm", tmp_path / "series.nii.gz"
        sitk.WriteTransform(sitk.Euler3DTransform(), str(identity))
        moving = read_volume(pair / "moving.nii.gz")
        skewed = moving.affine.copy()
        skewed[:3, 0] += 1e-3 * skewed[:3, 1]
        series = nibabel.Nifti1Image(np.stack([moving.array.T] * 2, axis=-1), skewed)
        series.set_sform(skewed, 1)
        series.set_qform(None, 0)
        nibabel.save(series, path)
        assert run("warp", path, identity, "-r", pair / "fixed.nii.gz", "-o", tmp_path / "warped.nii.gz") == 0
        note = f"note: The axes of {path} are not quite at right angles; the nearest ones that are were taken."
        assert capsys.readouterr().err.splitlines() == [note]

    def test_jacobian_measures_inside_a_mask(self, pair, tmp_path, capsys):
        """A transform that doubles the left half: the determinant is 8 there, and 1 elsewhere."""
        fixed = read_volume(pair / "fixed.nii.gz")
        displacement = lattice_points(fixed.shape, fixed.affine)
        displacement[..., 10:, :] = 0
        left = np.broadcast_to(np.arange(fixed.shape[2]) < 8, fixed.shape)
        Deformation(displacement, fixed.affine).write(tmp_path / "half.h5")
        for name, array in (("left", left), ("empty", left & False)):
            write_volume(Volume(array.astype(np.uint8), fixed.affine), tmp_path / f"{name}.nii.gz")
        arguments = ["jacobian", tmp_path / "half.h5", "-r", pair / "fixed.nii.gz", "--json", tmp_path / "figures.json"]
        assert run(*arguments, "--mask", tmp_path / "left.nii.gz") == 0
        inside = json.loads(capsys.readouterr().out)
        assert inside == json.loads((tmp_path / "figures.json").read_text())
        assert (inside["min"], inside["max"]) == pytest.approx((8, 8), rel=1e-3)
        assert run(*arguments) == 0
        assert json.loads(capsys.readouterr().out)["percentile_1"] < 2
        assert run(*arguments, "--mask", tmp_path / "empty.nii.gz") == 2
        assert "empty.nii.gz is empty on" in capsys.readouterr().err

    def test_jacobian_of_an_ants_warp_with_holes_its_logarithm_and_without_the_affine(self, pair, tmp_path, capsys):
        fixed = read_volume(pair / "fixed.nii.gz")
        doubled = lattice_points(fixed.shape, fixed.affine) * [-1, -1, 1]
        doubled[10:12, 10:12, 10:12] = np.finfo(np.float32).max
        field = sitk.GetImageFromArray(doubled, isVector=True)
        field.CopyInformation(sitk.ReadImage(str(pair / "fixed.nii.gz")))
        halved = sitk.ScaleTransform(3, (0.5, 1, 1))
        warp = sitk.DisplacementFieldTransform(field)
        sitk.WriteTransform(sitk.CompositeTransform([halved, warp]), str(tmp_path / "warp.h5"))
        maps = {"whole": [], "log": ["--log"], "without": ["--without-affine"], "both": ["--log", "--without-affine"]}
        expected = {"whole": 4, "log": np.log(4), "without": 8, "both": np.log(8)}
        for name, options in maps.items():
            path = tmp_path / f"{name}.nii.gz"
            assert run("jacobian", tmp_path / "warp.h5", "-r", pair / "fixed.nii.gz", "-o", path, *options) == 0
            figures = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
            image = sitk.ReadImage(str(path))
            values = sitk.GetArrayFromImage(image)
            hole = np.zeros(values.shape, dtype=bool)
            hole[10:12, 10:12, 10:12] = True
            np.testing.assert_allclose(values[~hole], expected[name], rtol=1e-3)
            assert (values[hole] == (0 if "--log" in options else 1)).all()
            note = image.GetMetaData("descrip")
            assert ("logarithm" in note, "without the affine" in note) == ("--log" in options, len(options) > 0
                                                                            and options[-1] != "--log")  # fmt: skip
        assert figures["undefined_voxels"] == 8
        assert figures["affine_determinant"] == pytest.approx(0.5)
        for key, value in (("min", 4), ("max", 4), ("without_affine_min", 8), ("mean_log", np.log(4))):
            assert figures[key] == pytest.approx(value, rel=1e-3)

    def test_models(self, capsys, monkeypatch, tmp_path):
        monkeypatch.setenv("GRADPROJIO_CACHE", str(tmp_path))
        assert run("models", "list") == 0
        listed = capsys.readouterr().out
        assert all(name in listed for name in ("unigradicon", "multigradicon", "compact"))
        assert run("models", "path", "unigradicon") == 2
        assert "gradprojio models download unigradicon" in capsys.readouterr().err
        assert run("models", "download", "compact") == 2

    def test_a_reader_that_has_gone_costs_no_traceback(self):
        reader, writer = os.pipe()
        os.close(reader)
        found = subprocess.run([sys.executable, "-m", "GradProjIOLib", "models", "list"], stdout=writer,
                               stderr=subprocess.PIPE, env=ENVIRONMENT, timeout=120, check=False)  # fmt: skip
        os.close(writer)
        assert (found.returncode, found.stderr) == (1, b"")

    def test_the_help_of_demo_tells_its_own_preset(self, capsys):
        with pytest.raises(SystemExit):
            run("demo", "--help")
        words = " ".join(capsys.readouterr().out.split())
        assert "(default: quick)" in words
        assert "0 or more (default: 30)" in words

    def test_demo(self, tmp_path):
        found = command("demo", "-o", tmp_path / "demo", "--size", 32, "--steps", 2, "--refine-steps", 2)
        assert found.returncode == 0, found.stderr
        assert "before  mean Dice" in found.stdout
        assert "compact, projected, 2 IO + 6 refinement steps on" in found.stdout
        assert "refinement from the network's deformation on" in found.stdout
        assert "mean distance to the known deformation" in found.stdout
        assert (tmp_path / "demo" / "overview.png").stat().st_size > 10_000


def image(array, **geometry):
    found = sitk.GetImageFromArray(array)
    for name, value in geometry.items():
        getattr(found, f"Set{name}")(value)
    return found


def smooth(shape=(16, 16, 16)):
    grid = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    return (100 * np.exp(-sum(axis**2 for axis in grid))).astype(np.float32)


BAD_IMAGES = {
    "2-D": (lambda: image(smooth()[0]), "2-D"),
    "4-D": (lambda: sitk.JoinSeries([image(smooth())] * 3), "4-D"),
    "vector": (lambda: sitk.Compose([image(smooth())] * 3), "3 components"),
    "NaN": (lambda: image(np.where(smooth() > 90, np.nan, smooth())), "NaN"),
    "infinity": (lambda: image(np.where(smooth() > 90, np.inf, smooth())), "infinity"),
    "constant": (lambda: image(np.full((16, 16, 16), 7, np.float32)), "same value"),
    "tiny": (lambda: image(smooth((16, 16, 4))), "too few"),
}


class TestBadInput:
    """One sentence on standard error that names the file, status 2, nothing written."""

    def refused(self, arguments, output, capsys, *names):
        status = run(*arguments)
        message = capsys.readouterr().err
        assert status == 2
        assert message.count("\n") == 1
        assert "Traceback" not in message
        assert all(str(name) in message for name in names), message
        assert not output.exists()

    @pytest.mark.parametrize("kind", BAD_IMAGES)
    @pytest.mark.parametrize("role", ["fixed", "moving"])
    def test_images_that_cannot_be_registered(self, pair, tmp_path, capsys, kind, role):
        make, word = BAD_IMAGES[kind]
        path = tmp_path / "bad.nrrd"
        sitk.WriteImage(make(), str(path))
        images = {"fixed": pair / "fixed.nii.gz", "moving": pair / "moving.nii.gz"} | {role: path}
        out = tmp_path / "out"
        self.refused(["register", images["fixed"], images["moving"], "-o", out, *QUICK], out, capsys, "bad.nrrd", word)

    def test_files_that_cannot_be_read(self, pair, tmp_path, capsys):
        out = tmp_path / "out"
        (tmp_path / "text.nii.gz").write_text("no image")
        (tmp_path / "cut.nii.gz").write_bytes((pair / "fixed.nii.gz").read_bytes()[:3000])
        (tmp_path / "image.jpeg").write_bytes(b"x")
        (tmp_path / "empty.mha").touch()
        for name in ("missing.nii", "text.nii.gz", "cut.nii.gz", "image.jpeg", "empty.mha", "."):
            arguments = ["register", tmp_path / name, pair / "moving.nii.gz", "-o", out, *QUICK]
            self.refused(arguments, out, capsys, tmp_path / name)

    def test_a_singular_affine(self, pair, tmp_path, capsys):
        path, out = tmp_path / "flat.nii", tmp_path / "out"
        sitk.WriteImage(sitk.ReadImage(str(pair / "fixed.nii.gz")), str(path))
        header = bytearray(path.read_bytes())
        header[252:256] = np.array([0, 1], np.int16).tobytes()  # the sform alone counts
        header[280:328] = np.zeros(12, np.float32).tobytes()
        path.write_bytes(header)
        self.refused(["register", path, pair / "moving.nii.gz", "-o", out, *QUICK], out, capsys, "flat.nii")

    @pytest.mark.parametrize(("more", "words"), [
        (["--steps", -5], ["steps", "-5"]),
        (["--device", "cuda:9"], ["cuda:9"]),
        (["--device", "abacus"], ["abacus"]),
        (["--weights", "nowhere.pt"], ["nowhere.pt"]),
        (["--model", "unigradicon"], ["unigradicon", "https://"]),
        (["--initial-transform", "nowhere.h5"], ["nowhere.h5"]),
        (["--fixed-mask", "nowhere.nii"], ["nowhere.nii"]),
        (["--moving-labels", "nowhere.nii"], ["nowhere.nii"]),
        (["--regularity-weight", -1], ["regularity weight"]),
        (["--lattice", 2, 2, 2], ["lattice"]),
        (["--seed", -1], ["seed", "-1"]),
    ])  # fmt: skip
    def test_options_that_make_no_sense(self, pair, tmp_path, capsys, monkeypatch, more, words):
        monkeypatch.setenv("GRADPROJIO_CACHE", str(tmp_path / "cache"))
        out = tmp_path / "out"
        self.refused(register_arguments(pair, out, *more), out, capsys, *words)

    def test_corrupt_weights(self, pair, tmp_path, capsys):
        (tmp_path / "weights.pt").write_bytes(os.urandom(4096))
        out = tmp_path / "out"
        self.refused(register_arguments(pair, out, "--weights", tmp_path / "weights.pt"), out, capsys, "weights.pt")

    def test_labels_that_are_an_image(self, pair, tmp_path, capsys):
        write_volume(Volume(smooth() + 0.3, np.eye(4)), tmp_path / "gray.nii.gz")
        out = tmp_path / "out"
        arguments = register_arguments(pair, out, "--moving-labels", tmp_path / "gray.nii.gz")
        self.refused(arguments, out, capsys, "gray.nii.gz", "label map")

    def test_an_output_that_is_a_file(self, pair, tmp_path, capsys):
        (tmp_path / "taken").write_text("mine")
        assert run(*register_arguments(pair, tmp_path / "taken")) == 2
        assert run(*register_arguments(pair, tmp_path / "taken" / "deeper")) == 2
        assert capsys.readouterr().err.count("\n") == 2
        assert (tmp_path / "taken").read_text() == "mine"

    def test_not_enough_memory(self, pair, tmp_path, capsys):
        out = tmp_path / "out"
        arguments = register_arguments(pair, out, "--lattice", 6000, 6000, 6000)
        self.refused(arguments, out, capsys, "not enough memory", "GB")


class Terminal:
    """A command whose standard error is a terminal, as for a user who watches it."""

    def __init__(self, *arguments):
        self.end, inside = pty.openpty()
        # Wide enough for the whole progress bar.
        fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("4H", 24, 200, 0, 0))
        self.process = subprocess.Popen([sys.executable, "-m", "GradProjIOLib", *map(str, arguments)], env=ENVIRONMENT,
                                        stdout=subprocess.PIPE, stderr=inside)  # fmt: skip
        os.close(inside)
        self.text = ""

    def read_until(self, word):
        """Read what is shown until ``word`` is there; None: until the command ends."""
        while word is None or word not in self.text:
            try:
                self.text += os.read(self.end, 65536).decode()
            except OSError:
                # This is how the end of a terminal reads on Linux.
                assert word is None, self.text
                return self.process.wait()
        return None


@pytest.fixture
def terminal():
    started = []

    def begin(*arguments):
        started.append(Terminal(*arguments))
        return started[-1]

    yield begin
    for one in started:
        one.process.kill()
        one.process.wait()
        one.process.stdout.close()
        os.close(one.end)


class TestInterruption:
    @pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -9)])
    def test_nothing_is_left(self, pair, tmp_path, terminal, sent, status):
        out = tmp_path / "results" / "out"
        watched = terminal("register", pair / "fixed.nii.gz", pair / "moving.nii.gz", "-o", out,
                           "--model", "compact", "--steps", 100_000, "--device", "cpu")  # fmt: skip
        watched.read_until("similarity")
        watched.process.send_signal(sent)
        assert watched.read_until(None) == status
        assert ("gradprojio: interrupted" in watched.text) == (sent != signal.SIGKILL)
        assert "Traceback" not in watched.text
        assert not list(tmp_path.iterdir())

    def test_an_interruption_of_the_imports_is_one_line_too(self, tmp_path, terminal):
        """They take seconds, in which a user notices that the command was wrong."""
        watched = terminal("demo", "-o", tmp_path / "out")
        mapped = Path(f"/proc/{watched.process.pid}/maps")
        while "libtorch" not in mapped.read_text():
            time.sleep(0.01)
        watched.process.send_signal(signal.SIGINT)
        # Python ends itself with the signal where a class was just being made; a shell calls that 130, too.
        assert watched.read_until(None) in (130, -signal.SIGINT)
        assert watched.text.split("gradprojio: ")[1:] == ["interrupted; no result is half written\r\n"]
        assert "Traceback" not in watched.text

    def test_a_full_disk_is_one_sentence_and_nothing_is_left(self, pair, tmp_path):
        """A limit on the size of files, which fails like a full disk: in the middle of writing the results.

        The images are not compressed, so that nothing is unpacked before.
        """
        (tmp_path / "images").mkdir()
        images = {name: tmp_path / "images" / f"{name}.nii" for name in ("fixed", "moving")}
        for name, path in images.items():
            write_volume(read_volume(pair / f"{name}.nii.gz"), path)

        def limit():
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

        arguments = ["register", images["fixed"], images["moving"], "-o", tmp_path / "out", *QUICK]
        found = command(*arguments, preexec_fn=limit)
        assert found.returncode == 2, found.stderr
        assert "could not be written" in found.stderr
        assert found.stderr.count("\n") == 1
        assert [path.name for path in tmp_path.iterdir()] == ["images"]
