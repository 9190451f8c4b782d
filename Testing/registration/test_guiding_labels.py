"""Labels that guide a registration."""

import json
from dataclasses import replace

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from GradProjIOLib.commands.main import main
from GradProjIOLib.engine.guidance import LabelOverlap
from GradProjIOLib.errors import InputError
from GradProjIOLib.geometry.image_files import write_volume
from GradProjIOLib.geometry.labels import Labels
from GradProjIOLib.geometry.lattice import lattice_affine, lattice_points
from GradProjIOLib.geometry.volume import Volume, to_sitk
from GradProjIOLib.registration.going_on import load_result
from GradProjIOLib.registration.labels import LabelPairs
from GradProjIOLib.registration.register import register
from GradProjIOLib.synthetic.phantom import make_pair

QUICK = {"model": "none", "refine_steps": 20, "samples": 30_000, "device": "cpu"}
SHAPE = (30, 34, 28)
AFFINE = np.diag([3.0, 3, 3, 1])
AFFINE[:3, 3] = -40, 10, 5
MIDDLE = np.array([1.0, 58, 46])


def balls(value_radius_offset, shape=SHAPE, affine=AFFINE):
    """A label map of balls around offsets from the middle."""
    points = lattice_points(shape, affine)
    array = np.zeros(shape, np.uint8)
    for value, radius, offset in value_radius_offset:
        array[np.linalg.norm(points - MIDDLE - offset, axis=-1) < radius] = value
    return Volume(array, affine, "balls")


@pytest.fixture(scope="module")
def uniform():
    """Two images that show the same faint noise, and so nothing of any structure."""
    array = np.random.default_rng(0).normal(100, 1, SHAPE).astype(np.float32)
    return Volume(array, AFFINE, "fixed"), Volume(array, AFFINE, "moving")


def loss(pairs, image, field, lattice=SHAPE, initial=None):
    affine = lattice_affine(image.affine, image.shape, lattice)
    placed = pairs.placed(np.eye(4) if initial is None else initial, image)
    return placed.on_lattice(lattice, affine, torch.device("cpu"))([field])


@pytest.mark.parametrize("method", ["projected", "vanilla"])
def test_structures_that_do_not_overlap_find_each_other(uniform, method):
    fixed, moving = balls([(1, 8, [-9, 0, 0])]), balls([(1, 8, [9, 0, 0])])
    result = register(*uniform, fixed_labels=fixed, moving_labels=moving, method=method, **QUICK)
    (found,) = result.report["labels"]
    assert found["dice_before"] == 0
    assert found["dice_after"] > 0.75
    assert (found["name"], found["value"]) == ("1", 1)
    assert result.report["jacobian"]["folded_voxels"] == 0
    steps = result.report["steps"]
    assert steps[-1]["labels"] < 0.2 * steps[0]["labels"]
    assert {"fixed_labels", "moving_labels"} <= set(result.report["inputs"])


def test_they_also_guide_from_where_a_registration_is(uniform, tmp_path):
    fixed, moving = balls([(1, 8, [-4, 0, 0]), (2, 5, [20, 9, 9])]), balls([(1, 8, [4, 0, 0]), (2, 5, [20, 9, 9])])
    files = {}
    volumes = zip(("fixed", "moving", "fixed_labels", "moving_labels"), (*uniform, fixed, moving), strict=True)
    for name, volume in volumes:
        files[name] = tmp_path / f"{name}.nii.gz"
        write_volume(volume, files[name])
    labels = {name: files[name] for name in ("fixed_labels", "moving_labels")}
    first = register(files["fixed"], files["moving"], **QUICK | {"refine_steps": 2})
    guided = first.go_on(8, guiding_labels={1: 2.0}, **labels)
    (found,) = guided.report["labels"]
    assert found["dice_after"] > found["dice_before"] + 0.2
    assert [step["labels"] is None for step in guided.report["steps"]] == [True] * 6 + [False] * 24
    guided.write(tmp_path / "result")
    loaded = load_result(tmp_path / "result")
    assert loaded.reached.guides.labels.same_as(guided.reached.guides.labels)
    assert not LabelPairs.of(*labels.values()).same_as(guided.reached.guides.labels)
    further = loaded.go_on(1)
    assert len(further.report["steps"]) == 31
    assert further.report["labels"][0]["weight"] == 2


def test_the_loss_is_zero_for_equal_labels_and_grows_with_their_distance(uniform):
    fixed = balls([(1, 9, [0, 0, 0]), (2, 6, [20, 0, 0])])
    zero = torch.zeros(2, 3, *SHAPE)
    assert loss(LabelPairs.of(fixed, fixed), uniform[0], zero).abs() < 1e-4
    apart = [
        loss(LabelPairs.of(fixed, balls([(1, 9, [0, mm, 0]), (2, 6, [20, mm, 0])])), uniform[0], zero).item()
        for mm in (3, 6, 12, 24)
    ]
    assert sorted(apart) == apart


def test_the_field_that_brings_them_together_is_found_on_any_lattices_of_labels(uniform):
    """The moving labels are oblique, finer along one axis and cut off; the initial transform shifts them."""
    turn = np.eye(4)
    angle = np.radians(25)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    oblique = turn @ np.diag([2.0, 2, 4, 1])
    oblique[:3, 3] = MIDDLE - oblique[:3, :3] @ np.array([20, 20, 10])
    initial = np.eye(4)
    initial[:3, 3] = 5, -4, 3
    step = np.array([6.0, 0, -3])
    fixed = balls([(1, 9, [0, 0, 0])])
    moving = balls([(1, 9, initial[:3, 3] + step)], (21, 41, 41), oblique)
    lattice = (20, 25, 18)
    affine = lattice_affine(AFFINE, SHAPE, lattice)
    shift = np.linalg.inv(affine[:3, :3]) @ step / ((np.array(lattice[::-1]) - 1) / 2)
    field = torch.tensor(np.stack([shift, -shift]), dtype=torch.float32).view(2, 3, 1, 1, 1).expand(2, 3, *lattice)
    pairs = LabelPairs.of(fixed, moving)
    met = loss(pairs, uniform[0], field, lattice, initial)
    assert met < 0.3
    assert loss(pairs, uniform[0], 0 * field, lattice, initial) > 5 * met
    assert loss(pairs, uniform[0], -field, lattice, initial) > 8 * met


def test_the_gradient_is_that_of_finite_differences(uniform):
    pairs = LabelPairs.of(balls([(1, 9, [0, 0, 0])]), balls([(1, 7, [3, 0, 0])]))
    lattice = (6, 7, 5)
    objective = pairs.placed(np.eye(4), uniform[0]).on_lattice(
        lattice, lattice_affine(AFFINE, SHAPE, lattice), torch.device("cpu")
    )
    numbers = ("points", "values", "volumes", "image", "to_image")
    double = [
        [replace(side, **{name: getattr(side, name).double() for name in numbers}) for side in pair]
        for pair in objective.structures
    ]
    objective = LabelOverlap(double, [objective.weight])
    generator = torch.Generator().manual_seed(0)
    field = (0.1 * torch.randn(2, 3, *lattice, generator=generator, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda one: objective([one]), field, eps=1e-7, atol=1e-4)


def test_labels_correspond_by_name_where_both_have_names_else_by_value(tmp_path):
    fixed = balls([(1, 8, [0, 0, 0]), (2, 6, [20, 0, 0]), (5, 4, [-20, 0, 0])])
    moving = balls([(2, 8, [0, 0, 0]), (7, 6, [20, 0, 0])])
    paths = []
    for side, volume, names in (
        ("fixed", fixed, {1: "cord", 2: "disc", 5: "other"}),
        ("moving", moving, {7: "disc", 2: "cord"}),
    ):
        image = to_sitk(volume)
        for number, (value, name) in enumerate(names.items()):
            image.SetMetaData(f"Segment{number}_Name", name)
            image.SetMetaData(f"Segment{number}_LabelValue", str(value))
        paths.append(tmp_path / f"{side}.seg.nrrd")
        sitk.WriteImage(image, str(paths[-1]))
    named = LabelPairs.of(*paths)
    assert [(pair.name, pair.fixed, pair.moving) for pair in named.pairs] == [("cord", 1, 2), ("disc", 2, 7)]
    assert [one["dice_before"] for one in named.report(np.eye(4), _identity())] == [1, 1]
    by_value = LabelPairs.of(fixed, moving)
    assert [(pair.name, pair.fixed, pair.moving) for pair in by_value.pairs] == [("2", 2, 2)]
    weighed = LabelPairs.of(*paths, {"disc": 0.5, 1: 2})
    assert [(pair.name, pair.weight) for pair in weighed.pairs] == [("disc", 0.5), ("cord", 2)]


def _identity():
    from GradProjIOLib.spatial.deformation import Deformation

    return Deformation.from_linear(np.eye(4))


def test_weights_choose_which_structure_gives_way(uniform):
    fixed = balls([(1, 8, [0, 0, 0]), (2, 8, [20, 0, 0])])
    moving = balls([(1, 8, [5, 0, 0]), (2, 8, [15, 0, 0])])
    zero = torch.zeros(2, 3, *SHAPE)
    one, two, both = (
        loss(LabelPairs.of(fixed, moving, wanted), uniform[0], zero) for wanted in ([1], [2], {1: 3.0, 2: 1.0})
    )
    assert min(one, two) <= both <= max(one, two)


def test_labels_that_make_no_sense_are_refused(uniform):
    some = balls([(1, 8, [0, 0, 0])])
    other = balls([(2, 8, [0, 0, 0])])
    away = Volume(some.array, AFFINE + np.array([[0, 0, 0, 500]] * 3 + [[0] * 4]), "away")
    empty = Volume(0 * some.array, AFFINE, "empty")
    halves = Volume(some.array + np.float32(0.5), AFFINE, "halves")
    for fixed, moving, wanted, words in (
        (some, None, None, "in pairs"),
        (None, None, [1], "in pairs"),
        (some, other, None, "no label of the same value"),
        (Labels(some, {1: "a"}), Labels(some, {1: "b"}), None, "no label of the same name"),
        (some, empty, None, "empty holds no label"),
        (some, halves, None, "whole numbers"),
        (some, some, [4], "label 4 is not in both"),
        (some, some, {1: 0}, "must be above 0"),
        (some, some, [], "No label is chosen"),
        (some, away, None, "label 1 of away lies outside"),
    ):
        with pytest.raises(InputError, match=words):
            register(*uniform, fixed_labels=fixed, moving_labels=moving, guiding_labels=wanted, **QUICK)


def test_a_structure_of_one_voxel_on_a_coarse_lattice_is_seen(uniform):
    array = np.zeros(SHAPE, np.uint8)
    array[15, 17, 14] = 1
    tiny = Volume(array, AFFINE, "tiny")
    found = []
    for mm in (0, 1.4, 8):
        shifted = np.eye(4)
        shifted[:3, 3] = mm
        found.append(loss(LabelPairs.of(tiny, tiny), uniform[0], torch.zeros(2, 3, 8, 8, 8), (8, 8, 8), shifted).item())
    assert found[0] < 1e-4 < found[1] < found[2]


def test_the_command_is_guided_and_evaluate_says_so(tmp_path, capsys):
    pair = make_pair(3, (28, 32, 26), 6.0)
    files = {}
    for name in ("fixed", "moving", "fixed_labels", "moving_labels"):
        files[name] = str(tmp_path / f"{name}.nii.gz")
        write_volume(getattr(pair, name), files[name])
    value = int(np.unique(pair.fixed_labels.array)[1])
    quick = ["--model", "none", "--refine-steps", "4", "--samples", "5000", "--device", "cpu"]
    labels = ["--fixed-labels", files["fixed_labels"], "--moving-labels", files["moving_labels"]]
    images = ["register", files["fixed"], files["moving"], "-o"]
    assert main([*images, str(tmp_path / "guided"), *quick, *labels, "--guiding-labels", f"{value}:2"]) == 0
    assert "guided by 1 label" in capsys.readouterr().out
    report = json.loads((tmp_path / "guided" / "report.json").read_text(encoding="utf-8"))
    assert [one["value"] for one in report["labels"]] == [value]
    assert (tmp_path / "guided" / "warped_labels.nii.gz").exists()
    assert main([*images, str(tmp_path / "free"), *quick, *labels[2:]]) == 0
    assert json.loads((tmp_path / "free" / "report.json").read_text(encoding="utf-8"))["labels"] is None
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "guided"), *labels]) == 0
    assert "guided this registration" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path / "free"), *labels]) == 0
    assert "guided" not in capsys.readouterr().err
    assert main([*images, str(tmp_path / "wrong"), *quick, *labels[:2]]) == 2
    assert "in pairs" in capsys.readouterr().err
