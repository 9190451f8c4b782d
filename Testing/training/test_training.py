"""Training: data that depend on their number alone, steps that can be interrupted anywhere, the paper's protocol."""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import oblique_affine, smooth_noise
from scipy.spatial.transform import Rotation

from GradProjIOLib.commands import train
from GradProjIOLib.commands.main import main
from GradProjIOLib.engine.objective import Objective
from GradProjIOLib.engine.similarity import LNCC
from GradProjIOLib.errors import InputError
from GradProjIOLib.geometry.image_files import write_volume
from GradProjIOLib.geometry.volume import Volume
from GradProjIOLib.models import registry
from GradProjIOLib.models import weights as weight_files
from GradProjIOLib.synthetic.pairs import TrainingPair
from GradProjIOLib.training import augmentation, pairs, validation, volumes
from GradProjIOLib.training.overlap import overlap_loss
from GradProjIOLib.training.pairs import SyntheticPairs
from GradProjIOLib.training.trainer import Plan, Trainer

LATTICE = (16, 18, 20)
TINY = replace(
    registry.MODELS["compact"], widths=(((2, 4, 8), (4, 6)), ((2, 4, 8), (4, 6))), halvings=(1, 0), voxels=4.0
)


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def without_times(path: Path) -> list[dict[str, str]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows(path)]


def trainer(folder: Path, plan: Plan, per_epoch: int = 4, **options) -> Trainer:
    source = SyntheticPairs(LATTICE, per_epoch)
    held_out = SyntheticPairs(LATTICE, 2, purpose=pairs.VALIDATION)
    return Trainer(registry.build(TINY), TINY, plan, source, [held_out[0], held_out[1]], folder, loaders=0, **options)


def parameters(network: torch.nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in network.parameters()]


# --- data ---


def test_a_pair_depends_on_its_number_and_purpose_alone():
    source = SyntheticPairs(LATTICE, 4)
    again = SyntheticPairs(LATTICE, 9)
    assert torch.equal(source[7].fixed, again[7].fixed)
    assert torch.equal(source[7].moving_labels, again[7].moving_labels)
    assert not torch.equal(source[7].fixed, source[8].fixed)
    assert not torch.equal(source[7].fixed, SyntheticPairs(LATTICE, 4, purpose=pairs.VALIDATION)[7].fixed)
    assert not torch.equal(source[7].fixed, SyntheticPairs(LATTICE, 4, seed=1)[7].fixed)


@pytest.fixture
def image_folder(tmp_path):
    """Five images of different shape and spacing, with label maps in a second folder."""
    images, labels = tmp_path / "images", tmp_path / "labels"
    images.mkdir()
    labels.mkdir()
    for number in range(5):
        affine = oblique_affine((1.5, 1.0 + 0.2 * number, 2.0), (0, 0, 0), (0, 0, 0))
        array = smooth_noise((14 + number, 20, 18), number)
        write_volume(Volume(array, affine), images / f"s{number}.nii.gz")
        write_volume(Volume((array > 100).astype(np.uint8), affine), labels / f"s{number}.nii.gz")
    return images


def test_every_image_is_fixed_once_and_moving_once_in_an_epoch(image_folder):
    files = volumes.find_images(image_folder).training
    reader = volumes.Reader(LATTICE)
    source = volumes.VolumePairs(files, reader, augmented_from=99)
    known = {reader.image(file.image)[0].numpy().tobytes(): file for file in files}
    epochs = [[source[epoch * len(source) + n] for n in range(len(source))] for epoch in range(3)]
    for epoch in epochs:
        for side in ("fixed", "moving"):
            assert {known[getattr(pair, side).numpy().tobytes()] for pair in epoch} == set(files)
        assert all(not torch.equal(pair.fixed, pair.moving) for pair in epoch)
    orders = [[known[pair.fixed.numpy().tobytes()] for pair in epoch] for epoch in epochs]
    assert orders[0] != orders[1] or orders[1] != orders[2]


def test_images_have_intensities_from_0_to_1_and_the_spacing_of_the_lattice(image_folder):
    image, spacing = volumes.Reader(LATTICE).image(image_folder / "s1.nii.gz")
    assert image.shape == (1, *LATTICE)
    assert 0 <= image.min() < 0.05
    assert image.max() == 1
    # Field of view 18 x 20 x 15 voxels of 1.5 x 1.2 x 2 mm.
    torch.testing.assert_close(spacing, torch.tensor([18 * 1.5 / 20, 20 * 1.2 / 18, 15 * 2.0 / 16]))


def test_images_on_the_lattice_are_those_a_registration_would_use(image_folder):
    from GradProjIOLib.geometry.image_files import read_volume
    from GradProjIOLib.geometry.lattice import lattice_affine
    from GradProjIOLib.registration.preprocessing import normalize
    from GradProjIOLib.spatial.deformation import Deformation

    volume = read_volume(image_folder / "s2.nii.gz")
    affine = lattice_affine(volume.affine, volume.shape, LATTICE)
    normalized = replace(volume, array=normalize(volume, "mri"))
    expected = Deformation.from_linear(np.eye(4), LATTICE, affine).warp(normalized, (LATTICE, affine)).array
    found = volumes.Reader(LATTICE).image(image_folder / "s2.nii.gz")[0][0].numpy()
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_a_folder_is_split_once_and_for_all(image_folder):
    found = volumes.find_images(image_folder, image_folder.parent / "labels", seed=3)
    assert len(found.training) == 3
    held_out = {file.image for pair in found.validation for file in pair}
    assert len(held_out) == 2
    assert not held_out & {file.image for file in found.training}
    assert found == volumes.find_images(image_folder, image_folder.parent / "labels", seed=3)
    assert all(file.labels.name == file.image.name for pair in found.validation for file in pair)


def test_bad_data_are_named(tmp_path):
    with pytest.raises(InputError, match="nowhere does not exist"):
        volumes.find_images(tmp_path / "nowhere")
    with pytest.raises(InputError, match="has 0 images to learn from; at least 2"):
        volumes.find_images(tmp_path)
    (tmp_path / "LUMIR_dataset.json").write_text("{}")
    with pytest.raises(InputError, match="does not list training images"):
        volumes.find_images(tmp_path)


# --- augmentation ---


def changes(count: int = 1000) -> list[augmentation.Change]:
    noise = torch.Generator().manual_seed(0)
    return [augmentation.random_change(noise) for _ in range(count)]


def test_changes_have_the_paper_s_probabilities_and_ranges():
    drawn = changes()
    flipped = torch.tensor([torch.linalg.det(change.matrix) < 0 for change in drawn])
    shifted = torch.tensor([bool(change.shift.any()) for change in drawn])
    brightened = torch.tensor([change.gamma != 1 for change in drawn])
    scales = torch.stack([torch.linalg.det(change.matrix).abs() ** (-1 / 3) for change in drawn])
    scaled = (scales - 1).abs() > 1e-6
    upright = [change.matrix @ torch.diag(torch.tensor([1.0, 1.0, 1.0 - 2 * flip])) * scale
               for change, flip, scale in zip(drawn, flipped.float(), scales, strict=True)]  # fmt: skip
    turned = torch.stack([(matrix - torch.eye(3)).abs().max() > 1e-5 for matrix in upright])
    for happened, probability in ((flipped, 0.5), (shifted, 0.5), (scaled, 0.5), (turned, 0.5), (brightened, 0.1)):
        assert abs(happened.float().mean().item() - probability) < 0.05
    assert 4.9 < max(change.shift.abs().max().item() for change in drawn) <= 5
    assert 0.029 < (scales - 1).abs().max() < 0.0301
    assert 0.19 < max(abs(change.gamma - 1) for change in drawn) <= 0.2
    for matrix in upright:
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(3), atol=1e-5, rtol=0)
    # Entries below the diagonal are about the sines of the angles about z, y and x.
    assert 0.165 < max(matrix[1, 0].abs() for matrix in upright) < 0.175 + 0.031


def bump(center: tuple[float, float, float], spacing: torch.Tensor) -> torch.Tensor:
    """A ball of 3 mm standard deviation, its center in mm along (x, y, z) from the lattice's middle: [1, D, H, W]."""
    axes = [(torch.arange(size) - (size - 1) / 2) * step for size, step in zip((40, 36, 32), spacing, strict=True)]
    z, y, x = torch.meshgrid(axes[2], axes[1], axes[0], indexing="ij")
    distance = (x - center[0]) ** 2 + (y - center[1]) ** 2 + (z - center[2]) ** 2
    return torch.exp(-distance / 18)[None]


def test_changes_are_in_millimetres():
    spacing = torch.tensor([1.0, 2.0, 1.5])
    matrix = torch.from_numpy(Rotation.from_euler("xyz", [8.0, -9.0, 10.0], degrees=True).as_matrix()).float()
    change = augmentation.Change(matrix / 1.03, torch.tensor([4.0, -3.0, 2.0]), 1.0)
    center = torch.tensor([5.0, -8.0, 6.0])
    found = change(bump(tuple((change.matrix @ center + change.shift).tolist()), spacing), spacing)
    positions = [(torch.arange(size) - (size - 1) / 2) * step for size, step in zip((40, 36, 32), spacing, strict=True)]
    grid = torch.meshgrid(positions[2], positions[1], positions[0], indexing="ij")
    for axis, coordinate in zip((2, 1, 0), grid, strict=True):
        assert abs((found / found.sum() * coordinate).sum() - center[axis]) < 0.05


def test_flip_and_gamma_are_exact():
    image = torch.rand(1, 6, 5, 4, generator=torch.Generator().manual_seed(0))
    flip = augmentation.Change(torch.diag(torch.tensor([1.0, 1.0, -1.0])), torch.zeros(3), 1.0)
    torch.testing.assert_close(flip(image, torch.ones(3)), image.flip(1), atol=1e-5, rtol=0)
    gamma = augmentation.Change(torch.eye(3), torch.zeros(3), 1.2)
    torch.testing.assert_close(gamma(image, torch.ones(3)), image**1.2)


def test_augmentation_starts_at_its_epoch_with_its_own_numbers_for_both_images(image_folder):
    files = volumes.find_images(image_folder).training
    reader = volumes.Reader(LATTICE)
    plain = volumes.VolumePairs(files, reader, augmented_from=99)
    changed = volumes.VolumePairs(files, reader, augmented_from=1)
    count = len(plain)
    same = [torch.equal(plain[n].fixed, changed[n].fixed) for n in range(10 * count)]
    assert all(same[:count])
    assert sum(same[count:]) < 4 * count
    assert any(
        torch.equal(plain[n].fixed, changed[n].fixed) != torch.equal(plain[n].moving, changed[n].moving)
        for n in range(count, 10 * count)
    )
    assert torch.equal(changed[20].fixed, changed[20].fixed)


# --- steps ---


def test_training_takes_adam_s_steps_on_the_mean_of_the_batch(tmp_path):
    plan = Plan(learning_rate=1e-3, batch=2, epochs=1)
    run = trainer(tmp_path, plan)
    list(run)

    network = registry.build(TINY)
    adam = torch.optim.Adam(network.parameters(), lr=1e-3)
    for step in range(2):
        loss = 0
        for number in (2 * step, 2 * step + 1):
            pair = SyntheticPairs(LATTICE, 4)[number]
            objective = Objective(network, pair.fixed[None], pair.moving[None])
            jitter = objective.regularity.jitter(pairs.generator(0, pairs.JITTER, number))
            similarity, regularity = objective.losses(objective.fields(), jitter)
            loss = loss + (similarity + 1.5 * regularity) / 2
        adam.zero_grad()
        loss.backward()
        adam.step()
    for found, expected in zip(run.network.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_training_lowers_the_loss_of_pairs_it_has_not_seen(tmp_path):
    list(trainer(tmp_path, Plan(learning_rate=3e-3, batch=1, epochs=2, decay=True, warm_up=3, sigma=2), per_epoch=15))
    losses = [float(row["similarity"]) + 1.5 * float(row["regularity"]) for row in rows(tmp_path / "validation.csv")]
    assert len(losses) == 3
    assert losses[-1] < losses[0] - 0.01


def test_rate_rises_and_falls():
    plan = Plan(learning_rate=1.0, warm_up=3, decay=True)
    rates = [plan.rate(step, 103) for step in range(103)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[53] == pytest.approx(0.5)
    assert 0 < rates[-1] < 0.001
    assert {Plan().rate(step, 10) for step in range(10)} == {5e-5}


def test_a_smaller_window_is_used(tmp_path):
    pair = SyntheticPairs(LATTICE, 4)[0]
    run = trainer(tmp_path, Plan(batch=1, sigma=2))
    objective = run._objective(pair)
    loss, _ = objective.losses(objective.fields())
    images = torch.stack([pair.moving, pair.fixed])
    expected = LNCC(images.flip(0), sigma=2)(images).sum()
    torch.testing.assert_close(loss, expected)
    assert abs(expected - LNCC(images.flip(0))(images).sum()) > 1e-3


@pytest.mark.parametrize("interruption", [1, 4])
def test_an_interrupted_training_goes_on_as_if_nothing_had_happened(tmp_path, interruption):
    plan = Plan(learning_rate=1e-3, batch=2, epochs=2, warm_up=2, decay=True)
    whole = trainer(tmp_path / "whole", plan, per_epoch=7)
    list(whole)
    for step in trainer(tmp_path / "parts", plan, per_epoch=7, checkpoint_every=2):
        if step["step"] == interruption:
            break
    resumed = trainer(tmp_path / "parts", plan, per_epoch=7, checkpoint_every=2)
    assert resumed.taken <= interruption + 1
    list(resumed)
    for found, expected in zip(parameters(resumed.network), parameters(whole.network), strict=True):
        assert torch.equal(found, expected)
    for log in ("steps.csv", "validation.csv"):
        assert without_times(tmp_path / "parts" / log) == without_times(tmp_path / "whole" / log)


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    list(trainer(tmp_path, Plan(learning_rate=1e-3, batch=2, epochs=1)))
    with pytest.raises(InputError, match=r"training with learning rate 0\.001 instead of 0\.002"):
        trainer(tmp_path, Plan(learning_rate=2e-3, batch=2, epochs=1))
    other = replace(TINY, widths=(((2, 4, 8), (6, 6)), ((2, 4, 8), (4, 6))))
    with pytest.raises(InputError, match="of another network"):
        Trainer(
            registry.build(other), other, Plan(learning_rate=1e-3, batch=2), SyntheticPairs(LATTICE, 4), [], tmp_path
        )
    with pytest.raises(InputError, match="less than a batch of 8"):
        trainer(tmp_path / "new", Plan(batch=8))


def test_a_checkpoint_from_before_a_setting_existed_is_gone_on_with(tmp_path):
    list(trainer(tmp_path, Plan(batch=2, epochs=1)))
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    del state["plan"]["label_weight"]
    torch.save(state, tmp_path / "checkpoint.pt")
    assert trainer(tmp_path, Plan(batch=2, epochs=1)).taken == 2
    with pytest.raises(InputError, match=r"label weight 0\.0 instead of 1\.0"):
        trainer(tmp_path, Plan(batch=2, epochs=1, label_weight=1.0))


def test_losses_that_are_not_finite_end_the_training(tmp_path):
    run = trainer(tmp_path, Plan(batch=1))
    run.validating = []
    with torch.no_grad():
        run.network.stages[0].head.bias.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="not finite in step 0"):
        next(iter(run))


def test_overlap_is_the_dice_coefficient_of_both_directions():
    fixed, moving = torch.zeros(2, 1, *LATTICE, dtype=torch.uint8)
    fixed[0, 4:12, 4:12, 4:12] = 3
    moving[0, 6:14, 4:12, 4:12] = 3
    moving[0, :2, :2, :2] = 5  # not in the other
    field = torch.zeros(2, 3, *LATTICE, requires_grad=True)
    still = overlap_loss(fixed, moving, [field])
    assert still.item() == pytest.approx(2 * 0.25, abs=1e-4)
    (gradient,) = torch.autograd.grad(still, field)
    unit = (LATTICE[0] / 2 - 1) / 2
    moved = torch.zeros(2, 3, *LATTICE)
    moved[0, 2], moved[1, 2] = 1 / unit, -1 / unit
    assert overlap_loss(fixed, moving, [moved]).item() == pytest.approx(0, abs=1e-5)
    assert (gradient * moved).sum() < 0
    nothing = overlap_loss(fixed, torch.zeros_like(moving), [field])
    assert nothing == 0
    assert nothing.requires_grad


def test_labels_have_their_share_in_the_gradient(tmp_path):
    gradients = []
    for weight in (0.0, 2.0):
        run = trainer(tmp_path / str(weight), Plan(batch=1, label_weight=weight))
        torch.nn.init.normal_(run.network.stages[-1].head.weight, std=0.1, generator=torch.Generator().manual_seed(0))
        pair = run.training[0]
        run._learn(0, pair)
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in run.network.parameters()]))
    overlap = overlap_loss(pair.fixed_labels, pair.moving_labels, run._objective(pair).fields())
    expected = torch.cat([part.flatten() for part in torch.autograd.grad(2 * overlap, list(run.network.parameters()))])
    assert expected.norm() > 0.01
    torch.testing.assert_close(gradients[1] - gradients[0], expected, rtol=1e-3, atol=1e-5)


# --- validation ---


def test_quality_of_a_known_shift():
    """A network that moves everything by 2 voxels along D puts the labels exactly where they belong."""
    fixed = torch.zeros(1, *LATTICE)
    fixed[0, 5:10, 4:12, 4:12] = 1
    moving = torch.roll(fixed, 2, dims=1)
    labels = fixed.to(torch.int32), moving.to(torch.int32)
    field = torch.zeros(2, 3, *LATTICE)
    for entry, voxels in ((0, 2), (1, -2)):
        field[entry, 2] = voxels / ((LATTICE[0] - 1) / 2)
    objective = Objective(lambda source, target: [field], fixed[None], moving[None])
    quality = validation.measure(objective, TrainingPair(fixed, moving, *labels))
    assert quality["dice"] == 1
    assert quality["dice_before"] == pytest.approx(0.6)
    assert quality["regularity"] == pytest.approx(0, abs=1e-6)
    assert quality["folded_percent"] == 0
    assert math.isnan(validation.measure(objective, TrainingPair(fixed, moving))["dice"])
    field[0, 2] *= -torch.linspace(0, 9, LATTICE[0])[:, None, None]
    assert validation.measure(objective, TrainingPair(fixed, moving, *labels))["folded_percent"] > 50


def test_mean_leaves_out_what_is_not_known():
    one, other = {"regularity": 0.1, "dice": 0.5}, {"regularity": 0.3, "dice": math.nan}
    assert validation.mean([one, other]) == {"regularity": 0.2, "dice": 0.5}


# --- parts of a cascade ---


def test_the_first_stages_are_a_network_on_the_coarser_lattice(tmp_path):
    model = registry.MODELS["compact"]
    coarse = registry.first_stages(model, 2)
    assert (coarse.halvings, coarse.voxels) == ((1, 0), 5)
    assert model.lattice_for((192, 224, 160), (1, 1, 1)) == (96, 112, 80)
    assert coarse.lattice_for((192, 224, 160), (1, 1, 1)) == (48, 56, 40)
    assert registry.first_stages(registry.MODELS["unigradicon"], 2).lattice == (88, 88, 88)

    network = registry.build(coarse)
    for parameter in network.parameters():
        parameter.data += 0.01
    torch.save(registry.state_for_file(network, model), tmp_path / "coarse.pt")
    whole = registry.build(model)
    registry.start_from(whole, model, tmp_path / "coarse.pt")
    for key, value in network.state_dict().items():
        torch.testing.assert_close(whole.state_dict()[key], value, atol=1e-3, rtol=1e-3)
    assert not whole.stages[2].head.weight.any()
    with pytest.raises(InputError, match="does not fit"):
        registry.start_from(network, coarse, _saved(tmp_path / "no.pt", {"a": torch.ones(1)}))


def test_the_first_stages_start_from_the_whole_network_s_weights(tmp_path):
    weights = registry.weights_path("compact")
    arguments = [
        *("train", "--synthetic", "1", "--batch", "1", "--epochs", "1", "--stages", "1", "--learning-rate", "1e-9"),
        *("--model", "compact", "--weights", str(weights), "--lattice", "16", "16", "16", "--quiet"),
    ]
    assert main([*arguments, "-o", str(tmp_path)]) == 0
    whole, part = (torch.load(path, weights_only=True) for path in (weights, tmp_path / "weights.pt"))
    assert part.keys() == {key for key in whole if key.startswith("stages.0.")}
    for key, value in part.items():
        torch.testing.assert_close(value, whole[key], rtol=0, atol=1e-5)


def _saved(path: Path, state: dict[str, torch.Tensor]) -> Path:
    torch.save(state, path)
    return path


# --- the command ---

COMPACT = ["--model", "compact", "--from-scratch", "--stages", "2", "--lattice", "16", "16", "16", "--quiet"]


def command(folder: Path, *arguments: str) -> list[str]:
    return ["train", "-o", str(folder), *COMPACT, *arguments]


SYNTHETIC = ["--synthetic", "6", "--epochs", "2", "--batch", "2", "--learning-rate", "1e-3", "--checkpoint-every", "1"]
# So many steps that the test's signal comes before the last of them.
LONGER = [*SYNTHETIC, "--epochs", "7"]
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


def start_training(folder: Path) -> subprocess.Popen:
    """A process that has taken a few steps, and saved a checkpoint after each, when this returns."""
    training = [sys.executable, "-m", "GradProjIOLib", *command(folder, *LONGER)]
    process = subprocess.Popen(training, env=ONE_THREAD, start_new_session=True, stderr=subprocess.PIPE, text=True)
    log = folder / "steps.csv"
    while process.poll() is None and not (log.exists() and len(log.read_text().splitlines()) > 3):
        time.sleep(0.02)
    return process


def finish_training(folder: Path) -> dict:
    """Run the same command to its end; returns the checkpoint."""
    training = [sys.executable, "-m", "GradProjIOLib", *command(folder, *LONGER)]
    subprocess.run(training, env=ONE_THREAD, check=True, timeout=300)
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def test_a_killed_process_is_gone_on_with(tmp_path):
    """SIGKILL in the middle of the steps; the weights are then those of a training that was left alone."""
    process = start_training(tmp_path / "killed")
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    taken = torch.load(tmp_path / "killed" / "checkpoint.pt", weights_only=True)["taken"]
    assert 1 <= taken < 21
    killed, expected = (finish_training(tmp_path / folder) for folder in ("killed", "whole"))
    for key, value in expected["network"].items():
        assert torch.equal(killed["network"][key], value), key
    assert without_times(tmp_path / "killed" / "steps.csv") == without_times(tmp_path / "whole" / "steps.csv")


def test_an_interrupted_process_says_where_the_training_goes_on(tmp_path):
    process = start_training(tmp_path)
    os.kill(process.pid, signal.SIGINT)
    _, message = process.communicate(timeout=300)
    assert process.returncode == 130
    taken = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["taken"]
    assert message == (
        f"gradprojio: interrupted; {tmp_path / 'checkpoint.pt'} holds the first {taken} of 21 steps, and the same "
        "command goes on from there\n"
    )


@pytest.fixture
def lumir_folder(tmp_path):
    """Data laid out as the LUMIR challenge's: five training images, and one validation pair with labels."""
    folder = tmp_path / "LUMIR"
    for name in ("imagesTr", "imagesVal", "labelsVal"):
        (folder / name).mkdir(parents=True)
    names = [f"imagesTr/LUMIRMRI_{n:04}_0000.nii.gz" for n in range(5)]
    names += [f"imagesVal/LUMIRMRI_{n:04}_0000.nii.gz" for n in (3455, 3456)]
    for seed, name in enumerate(names):
        pair = SyntheticPairs((20, 28, 24), 1, seed)[0]
        array = (255 * pair.fixed[0]).round().numpy().astype(np.uint8)
        write_volume(Volume(array, np.eye(4)), folder / name)
        if "Val" in name:
            labels = pair.fixed_labels[0].numpy().astype(np.uint8)
            write_volume(Volume(labels, np.eye(4)), folder / name.replace("images", "labels"))
    listed = {
        "training": [{"image": f"./{name}"} for name in names[:5]],
        "validation": [{"fixed": f"./{names[6]}", "moving": f"./{names[5]}"}],
    }
    (folder / "LUMIR_dataset.json").write_text(json.dumps(listed))
    return folder


def test_two_epochs_of_the_paper_s_protocol(lumir_folder, tmp_path):
    """uniGradICON's own network, on a small lattice; the weights can be registered with."""
    arguments = ["train", str(lumir_folder), "-o", str(tmp_path / "out"), "--from-scratch", "--quiet",
                 "--lattice", "16", "16", "16", "--epochs", "2", "--augment-from", "1"]  # fmt: skip
    assert main(arguments) == 0
    steps = rows(tmp_path / "out" / "steps.csv")
    assert [row["epoch"] for row in steps] == ["0", "1"]
    assert {row["learning_rate"] for row in steps} == {"5e-05"}
    measured = rows(tmp_path / "out" / "validation.csv")
    assert [row["step"] for row in measured] == ["0", "1", "2"]
    assert measured[0]["dice"] == measured[0]["dice_before"] != "nan"
    network = registry.build(registry.MODELS["unigradicon"])
    expected = {
        registry.published_key(key, registry.MODELS["unigradicon"]): tuple(value.shape)
        for key, value in network.state_dict().items()
    }
    weight_files.load_state(tmp_path / "out" / "weights.pt", expected)
    loaded = registry.load("unigradicon", tmp_path / "out" / "weights.pt").network
    checkpoint = torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)["network"]
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, checkpoint[key])
    assert any(value.any() for key, value in checkpoint.items() if ".head." in key)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--synthetic", "4", "--batch", "0"], "--batch: 0 is too small; give 1 or more"),
        (["--synthetic", "4", "--stages", "9"], "--stages is 9; the model compact has 1 to 3"),
        (["--synthetic", "4", "--loaders", "-1"], "--loaders: -1 is too small; give 0 or more"),
        (["missing-folder"], "missing-folder does not exist"),
    ],
)
def test_what_the_user_must_change(arguments, message, tmp_path, capsys):
    assert main(command(tmp_path, *arguments)) == 2
    assert message in capsys.readouterr().err


def test_published_weights_that_are_not_here_are_asked_for(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(weight_files, "cache_directory", lambda: tmp_path / "empty")
    assert main(["train", "--synthetic", "4", "-o", str(tmp_path / "out")]) == 2
    assert "Step_2_final.trch" in capsys.readouterr().err


def test_numbers_that_may_have_decimals_are_read_as_such(tmp_path):
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    found = parser.parse_args(["--synthetic", "4", "-o", str(tmp_path), "--sigma", "2.5", "--regularity-weight", "0.1"])
    assert (found.sigma, found.regularity_weight, found.batch) == (2.5, 0.1, 4)


def test_torchrun_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert main(["train", "--synthetic", "4", "-o", str(tmp_path / "out")]) == 2
    assert "start it without torchrun" in capsys.readouterr().err
