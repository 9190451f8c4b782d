"""`gradprojio evaluate` on small results written like those of `gradprojio register`."""

import csv
import json
import math

import numpy as np
import pytest
from scipy import ndimage

from GradProjIOLib.commands import main
from GradProjIOLib.errors import InputError
from GradProjIOLib.evaluation import cases, tables
from GradProjIOLib.geometry.image_files import write_volume
from GradProjIOLib.geometry.volume import Volume
from GradProjIOLib.spatial.deformation import Deformation

pytest.importorskip("SimpleITK")
AFFINE = np.array([[1.5, 0, 0, -12], [0, 0, 2, -20], [0, -1, 0, 15], [0, 0, 0, 1]], dtype=float)
SHAPE = (16, 18, 20)


def labels(seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=(4, *SHAPE))
    return np.argmax([ndimage.gaussian_filter(channel, 2) for channel in noise], axis=0).astype(np.uint8)


def smooth_displacement(seed: int, strength: float) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=(*SHAPE, 3))
    smooth = np.stack([ndimage.gaussian_filter(noise[..., axis], 3) for axis in range(3)], axis=-1)
    return strength * smooth / smooth.std()


@pytest.fixture
def make_result(tmp_path):
    """Write a result whose displacement has the given strength (mm), and labels to measure it with."""

    def make(name: str, seed: int, strength: float):
        folder = tmp_path / name
        folder.mkdir()
        Deformation(smooth_displacement(seed, strength), AFFINE).write(folder / "transform.h5")
        write_volume(Volume(np.zeros(SHAPE, np.float32), AFFINE), folder / "warped.nii.gz")
        for side, number in (("fixed", seed), ("moving", seed + 50)):
            write_volume(Volume(labels(number), AFFINE), tmp_path / f"{side}_{seed}.nii.gz")
        return folder

    return make


def run(*options) -> int:
    return main.main(["evaluate", *map(str, options)])


def test_one_result(make_result, tmp_path, capsys):
    folder = make_result("one", 1, 1.0)
    points = np.array([[0.0, 0, 0], [3, 4, 2]])
    for side, offset in (("fixed", 0), ("moving", 2)):
        lines = [f"{x + offset},{y},{z}" for x, y, z in points.tolist()]
        (tmp_path / f"{side}.csv").write_text("\n".join(["x,y,z", *lines]))
    mask = np.zeros(SHAPE, np.uint8)
    mask[4:8] = 1
    write_volume(Volume(mask, AFFINE), tmp_path / "mask.nii.gz")
    inputs = [
        "--fixed-labels",
        tmp_path / "fixed_1.nii.gz",
        "--moving-labels",
        tmp_path / "moving_1.nii.gz",
        "--fixed-points",
        tmp_path / "fixed.csv",
        "--moving-points",
        tmp_path / "moving.csv",
        "--points-frame",
        "RAS",
        "--mask",
        tmp_path / "mask.nii.gz",
    ]
    assert run(folder, *inputs, "--json", tmp_path / "out.json", "--csv", tmp_path / "out.csv") == 0
    row = json.loads((tmp_path / "out.json").read_text())["cases"][0]
    assert row["case"] == "one"
    assert [found["structure"] for found in row["structures"]] == [1, 2, 3]
    assert row["dice"] == pytest.approx(np.mean([found["dice"] for found in row["structures"]]))
    assert row["tre_before_mm"] == pytest.approx(2)
    deformation = Deformation.read(folder / "transform.h5")
    errors = np.linalg.norm(deformation.map_points(points) - points - [2, 0, 0], axis=1)
    assert [found["after_mm"] for found in row["landmarks"]] == pytest.approx(errors)
    assert row["std_log_jacobian"] != row["std_log_jacobian_in_mask"]
    with open(tmp_path / "out.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [line["case"] for line in table] == ["one", "mean", "standard deviation"]
    assert float(table[0]["hd95_mm_2"]) == pytest.approx(row["structures"][1]["hd95_mm"])
    assert float(table[0]["tre_mm_1"]) == pytest.approx(errors[0])
    output = capsys.readouterr().out
    assert "structure" in output
    assert f"{row['dice']:.4f}" in output


def test_transform_file_of_another_program(make_result, tmp_path):
    """A displacement image counts as the same result as the folder it was taken from."""
    folder = make_result("folder", 2, 2.0)
    Deformation.read(folder / "transform.h5").write(tmp_path / "displacement.nii.gz")
    files = {"fixed_labels": tmp_path / "fixed_2.nii.gz", "moving_labels": tmp_path / "moving_2.nii.gz"}
    by_folder = cases.measure(cases.Case(folder, "a", **files))
    by_file = cases.measure(cases.Case(tmp_path / "displacement.nii.gz", "a", **files))
    for key in ("dice", "hd95_mm", "ndv_percent", "folded_voxels", "std_log_jacobian"):
        assert by_file[key] == pytest.approx(by_folder[key], rel=1e-5)
    alone = cases.measure(cases.Case(tmp_path / "displacement.nii.gz", "a"))
    assert alone["ndv_percent"] == pytest.approx(by_folder["ndv_percent"])


def test_cohort_with_a_broken_case(make_result, tmp_path, capsys):
    lines = ["result,case,group,fixed_labels,moving_labels"]
    for seed in (1, 2, 3):
        for group, strength in (("weak", 0.5), ("strong", 6.0)):
            make_result(f"{group}{seed}", seed, strength)
            lines.append(f"{group}{seed},case {seed},{group},fixed_{seed}.nii.gz,moving_{seed}.nii.gz")
    lines.insert(2, "missing,case 9,weak,fixed_1.nii.gz,moving_1.nii.gz")
    (tmp_path / "cases.csv").write_text("\n".join(lines))
    assert run(tmp_path / "cases.csv", "--json", tmp_path / "out.json", "--csv", tmp_path / "out.csv") == 2
    found = json.loads((tmp_path / "out.json").read_text())
    assert len(found["cases"]) == 6
    assert [failure["case"] for failure in found["failed"]] == ["case 9"]
    weak, strong = (
        np.array([row["dice"] for row in found["cases"] if row["group"] == group]) for group in ("weak", "strong")
    )
    assert found["summary"]["weak"]["dice"]["mean"] == pytest.approx(weak.mean())
    assert found["summary"]["weak"]["dice"]["standard_deviation"] == pytest.approx(weak.std(ddof=1))
    comparison = next(item for item in found["comparisons"] if item["metric"] == "dice")
    assert (comparison["reference"], comparison["other"]) == ("weak", "strong")
    assert comparison["result"]["count"] == 3
    assert comparison["result"]["mean_difference"] == pytest.approx((strong - weak).mean())
    assert comparison["result"]["p_value"] == pytest.approx(0.25)  # three differences of one sign
    with open(tmp_path / "out.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert float(table[6]["dice"]) == pytest.approx(weak.mean())
    captured = capsys.readouterr()
    assert "case 9" in captured.err
    assert "mean ± SD" in captured.out
    assert "p (Wilcoxon)" in captured.out
    assert run(tmp_path / "cases.csv", "--reference", "strong", "--json", tmp_path / "out.json") == 2
    assert json.loads((tmp_path / "out.json").read_text())["comparisons"][0]["other"] == "weak"
    assert run(tmp_path / "cases.csv", "--reference", "other") == 2
    assert "no group other" in capsys.readouterr().err


def test_points_in_voxels(make_result, tmp_path):
    """Indices of each image need that image; the moving one is found through the report."""
    folder = make_result("voxels", 4, 1.0)
    moving_affine = AFFINE @ np.diag([2, 1, 1, 1])
    point = np.array([5.0, 6.0, 7.0])
    (tmp_path / "fixed.csv").write_text("i,j,k\n5,6,7\n")
    (tmp_path / "moving.csv").write_text("i,j,k\n5,6,7\n")
    case = cases.Case(
        folder,
        fixed_points=tmp_path / "fixed.csv",
        moving_points=tmp_path / "moving.csv",
        points_frame="voxels",
    )
    with pytest.raises(InputError, match="of which image is unknown"):
        cases.measure(case)
    write_volume(Volume(np.zeros(SHAPE, np.uint8), moving_affine), tmp_path / "moving.nii.gz")
    report = {"inputs": {"moving": {"path": str(tmp_path / "moving.nii.gz")}}}
    (folder / "report.json").write_text(json.dumps(report))
    fixed, moving = (affine[:3, :3] @ point + affine[:3, 3] for affine in (AFFINE, moving_affine))
    assert cases.measure(case)["tre_before_mm"] == pytest.approx(np.linalg.norm(fixed - moving))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("case\na\n", "lacks the column result"),
        ("result,colour\na,red\n", "unknown column 'colour'"),
        ("result,groop\na,red\n", "did you mean group"),
        ("result,mask,mask\na,b,c\n", "the column mask twice"),
        ("result,case\n", "no row"),
        ("result,case\na,1\nb,1\n", "case 1 twice"),
        ("result,case\na,1,2\n", "line 2"),
        ("result,case\n,1\n", "line 2: fill result"),
    ],
)
def test_tables_that_make_no_sense(tmp_path, text, expected):
    path = tmp_path / "cases.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=expected):
        cases.read_cases(path, cases.Case(path))


def test_options_beside_a_table_hold_for_rows_that_leave_them_empty(make_result, tmp_path):
    """They used to be ignored without a word."""
    for seed in (1, 2):
        make_result(f"result{seed}", seed, 1.0)
    mask = np.zeros(SHAPE, np.uint8)
    mask[4:8] = 1
    write_volume(Volume(mask, AFFINE), tmp_path / "mask.nii.gz")
    (tmp_path / "cases.tsv").write_text("Result\tfixed-labels\nresult1\t\nresult2\tfixed_2.nii.gz\n")
    options = ["--fixed-labels", tmp_path / "fixed_1.nii.gz", "--moving-labels", tmp_path / "moving_1.nii.gz",
               "--mask", tmp_path / "mask.nii.gz", "--json", tmp_path / "out.json"]  # fmt: skip
    assert run(tmp_path / "cases.tsv", *options) == 0
    rows = json.loads((tmp_path / "out.json").read_text())["cases"]
    for row, seed in zip(rows, (1, 2), strict=True):
        files = {"fixed_labels": tmp_path / f"fixed_{seed}.nii.gz", "moving_labels": tmp_path / "moving_1.nii.gz",
                 "mask": tmp_path / "mask.nii.gz"}  # fmt: skip
        alone = cases.measure(cases.Case(tmp_path / f"result{seed}", **files))
        assert row["dice"] == alone["dice"]
        assert row["ndv_percent_in_mask"] == alone["ndv_percent_in_mask"]


def test_inputs_that_do_not_fit(make_result, tmp_path):
    folder = make_result("result", 5, 1.0)
    with pytest.raises(InputError, match="give the moving labels"):
        cases.measure(cases.Case(folder, fixed_labels=tmp_path / "fixed_5.nii.gz"))
    with pytest.raises(InputError, match=r"no transform\.h5"):
        cases.measure(cases.Case(tmp_path))


def test_values_that_json_and_csv_do_not_know(tmp_path):
    """NaN (not measured) becomes null or an empty cell, infinity (a lost structure) the text inf."""
    row = {"case": "a", "group": "", "dice": math.nan, "hd95_mm": math.inf}
    tables.write_json(tables.report([row], [], []), tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    assert (found["cases"][0]["dice"], found["cases"][0]["hd95_mm"]) == (None, "inf")
    tables.write_csv([row], tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_text().splitlines()[1] == "a,,,inf"


def test_result_of_the_command(make_result, tmp_path):
    """What `gradprojio register` writes can be measured, and its report has the same folding."""
    image = smooth_displacement(7, 100.0)[..., 0].astype(np.float32)
    for side, shift in (("fixed", 0), ("moving", 1)):
        write_volume(Volume(np.roll(image, shift, axis=1), AFFINE), tmp_path / f"{side}.nii.gz")
    make_result("unused", 7, 1.0)  # for its labels
    output = tmp_path / "registered"
    options = [
        "--model",
        "compact",
        "--lattice",
        "16",
        "16",
        "16",
        "--method",
        "vanilla",
        "--steps",
        "3",
        "--refine-steps",
        "0",
        "--quiet",
    ]
    images = [str(tmp_path / "fixed.nii.gz"), str(tmp_path / "moving.nii.gz")]
    assert main.main(["register", *images, "-o", str(output), *options]) == 0
    row = cases.measure(
        cases.Case(output, fixed_labels=tmp_path / "fixed_7.nii.gz", moving_labels=tmp_path / "moving_7.nii.gz")
    )
    report = json.loads((output / "report.json").read_text())["jacobian"]
    assert row["ndv_percent"] == pytest.approx(report["ndv_percent"], rel=1e-4, abs=1e-9)
    assert row["std_log_jacobian"] == pytest.approx(report["std_log"], rel=1e-4)
    assert row["folded_voxels"] == report["folded_voxels"]
    assert row["dice"] != row["dice_before"]
