"""``gradprojio train``: further training of a network on images, or training on synthetic pairs."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch
from torch import distributed

from GradProjIOLib.commands.options import add_output_option
from GradProjIOLib.engine.devices import find_device
from GradProjIOLib.engine.memory import needed_memory, recycled_memory
from GradProjIOLib.errors import InputError
from GradProjIOLib.geometry.image_files import read_volume
from GradProjIOLib.models import registry
from GradProjIOLib.settings import MODALITIES, SIMILARITIES
from GradProjIOLib.training.pairs import VALIDATION, PairSource, SyntheticPairs, TrainingPair
from GradProjIOLib.training.trainer import CHECKPOINT, VALIDATION_LOG, WEIGHTS, Plan, Trainer
from GradProjIOLib.training.volumes import ImageFiles, Reader, ValidationPairs, VolumePairs, find_images

SYNTHETIC_VOXELS = (96, 112, 80)
SYNTHETIC_VALIDATION_PAIRS = 6
NUMBERS = (
    ("epochs", Plan.epochs, "how often all pairs are seen"),
    ("batch", Plan.batch, "pairs per step"),
    ("learning-rate", Plan.learning_rate, "learning rate"),
    ("warm-up", Plan.warm_up, "steps in which the rate rises"),
    ("regularity-weight", Plan.regularity_weight, "weight of the regularity"),
    ("sigma", float(Plan.sigma), "LNCC's window in samples"),
    ("label-weight", Plan.label_weight, "weight of the overlap of labels in the loss, for synthetic pairs"),
    ("augment-from", 50, "epoch from which images change"),
    ("loaders", 1, "processes that prepare pairs"),
    ("checkpoint-every", 100, "steps between checkpoints"),
    ("seed", Plan.seed, "seed of everything that is random"),
)
"""Options that are numbers, with their defaults."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("data", nargs="?", type=Path, metavar="DATA", help="folder of images, or LUMIR_dataset.json")
    data.add_argument("--synthetic", type=int, metavar="N", help="learn from synthetic pairs, N new ones per epoch")
    add_output_option(parser, "folder for weights, logs and checkpoint")
    parser.add_argument("--model", choices=tuple(registry.MODELS), default="unigradicon", help="network")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--weights", metavar="FILE", help="weights to start from instead of the model's own")
    start.add_argument("--from-scratch", action="store_true", help="start from the identity")
    parser.add_argument("--stages", type=int, metavar="N", help="only the N coarsest U-Nets, on a coarser lattice")
    parser.add_argument("--lattice", type=int, nargs=3, metavar=("K", "J", "I"), help="instead of the model's own")
    for name, default, help in NUMBERS:
        metavar = "N" if isinstance(default, int) else "X"
        parser.add_argument(f"--{name}", type=type(default), default=default, metavar=metavar, help=help)
    parser.add_argument("--decay", action="store_true", help="let the learning rate fall to nothing along a cosine")
    parser.add_argument("--similarity", choices=tuple(SIMILARITIES), default=Plan.similarity, help="image similarity")
    parser.add_argument("--labels", type=Path, metavar="DIR", help="label maps to validate with, named as the images")
    parser.add_argument("--modality", choices=MODALITIES, default="mri", help="of the images")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="folder for images ready to use (DIR/cache)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda …; torchrun gives each its own")
    parser.add_argument("--precision", choices=("exact", "fast"), default=Plan.precision, help="fast is bfloat16")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")


def run(arguments: argparse.Namespace) -> int:
    """Train, or go on with a training; every process that torchrun started runs this."""
    _check(arguments)
    plan = Plan(**{name: getattr(arguments, name) for name in Plan.__dataclass_fields__})
    device = _join_processes(arguments.device)
    try:
        model = registry.find(arguments.model)
        if arguments.stages is not None:
            model = registry.first_stages(model, arguments.stages)
        network = _network(arguments, model)
        lattice, training, validating = _pairs(arguments, model)
        trainer = Trainer(
            network,
            model,
            plan,
            training,
            validating,
            arguments.output,
            device=device,
            loaders=arguments.loaders,
            checkpoint_every=arguments.checkpoint_every,
        )
        with recycled_memory(device, needed_memory(network, lattice, "full", device)):
            return _train(trainer, arguments)
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def _check(arguments: argparse.Namespace) -> None:
    for name in ("batch", "epochs", "checkpoint_every", "synthetic", "sigma", "learning_rate"):
        value = getattr(arguments, name)
        if value is not None and value <= 0:
            raise InputError(f"--{name.replace('_', '-')} is {value}; it must be more than 0.")
    for name in ("loaders", "warm_up", "augment_from", "seed", "regularity_weight", "label_weight"):
        if getattr(arguments, name) < 0:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}; it must be 0 or more.")
    if arguments.label_weight and not arguments.synthetic:
        raise InputError("--label-weight needs pairs with known labels; use it with --synthetic.")
    stages = len(registry.find(arguments.model).widths)
    if arguments.stages is not None and not 1 <= arguments.stages <= stages:
        raise InputError(f"--stages is {arguments.stages}; the model {arguments.model} has 1 to {stages}.")
    if arguments.lattice and min(arguments.lattice) < registry.SMALLEST_LATTICE:
        raise InputError(f"The lattice must have at least {registry.SMALLEST_LATTICE} samples along each axis.")


def _join_processes(device: str) -> torch.device:
    """The device of this process, which joins those that torchrun started beside it."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return find_device(device)
    on_gpus = torch.cuda.is_available() and device != "cpu"
    found = find_device(f"cuda:{os.environ['LOCAL_RANK']}" if on_gpus else "cpu")
    if on_gpus:
        torch.cuda.set_device(found)
    distributed.init_process_group("nccl" if on_gpus else "gloo")
    return found


def _network(arguments: argparse.Namespace, model: registry.Model) -> registry.Cascade:
    """The network of a model, or of its first stages, with the weights to start from."""
    network = registry.build(model)
    if not arguments.from_scratch and (path := registry.weights_path(arguments.model, arguments.weights)):
        whole = registry.find(arguments.model)
        source = registry.build(whole)
        registry.start_from(source, whole, path)
        state = source.state_dict()
        network.load_state_dict({key: state[key] for key in network.state_dict()})
    return network


def _pairs(
    arguments: argparse.Namespace, model: registry.Model
) -> tuple[registry.Lattice, PairSource, PairSource | list[TrainingPair]]:
    """The lattice, the pairs on it to learn from, and those to validate with."""
    if arguments.synthetic:
        lattice = tuple(arguments.lattice or model.lattice_for(SYNTHETIC_VOXELS, (2.0, 2.0, 2.0)))
        held_out = SyntheticPairs(lattice, SYNTHETIC_VALIDATION_PAIRS, arguments.seed, VALIDATION)
        new = SyntheticPairs(lattice, arguments.synthetic, arguments.seed)
        return lattice, new, [held_out[number] for number in range(len(held_out))]
    files = find_images(arguments.data, arguments.labels, arguments.seed)
    lattice = tuple(arguments.lattice or _lattice_of(files, model))
    reader = Reader(lattice, arguments.cache or arguments.output / "cache", arguments.modality)
    source = VolumePairs(files.training, reader, arguments.augment_from, arguments.seed)
    return lattice, source, ValidationPairs(files.validation, reader)


def _lattice_of(files: ImageFiles, model: registry.Model) -> registry.Lattice:
    """The model's lattice, which may follow the proportions of the first image."""
    if model.lattice is not None:
        return model.lattice
    first = read_volume(files.training[0].image)
    return model.lattice_for(first.shape, first.spacing.tolist())


def _train(trainer: Trainer, arguments: argparse.Namespace) -> int:
    """Take the steps that are left; returns the exit status."""
    import tqdm

    shown = trainer.rank == 0 and not arguments.quiet
    with tqdm.tqdm(
        total=trainer.steps, initial=trainer.taken, unit="step", disable=not (shown and sys.stderr.isatty())
    ) as bar:
        try:
            for step in trainer:
                bar.set_postfix_str(
                    f"similarity {step.similarity:.4f}, regularity {step.regularity:.4f}", refresh=False
                )
                bar.update()
        except KeyboardInterrupt:
            if trainer.rank == 0:
                bar.close()
                print(f"gradprojio: interrupted; {_what_is_left(trainer)}", file=sys.stderr)
            return 130
    if shown:
        print(f"weights in {arguments.output / WEIGHTS}, validation in {arguments.output / VALIDATION_LOG}")
    return 0


def _what_is_left(trainer: Trainer) -> str:
    """Where an interrupted training can go on."""
    if not trainer.saved:
        return f"{trainer.folder} has no checkpoint yet, so the same command starts anew"
    return (
        f"{trainer.folder / CHECKPOINT} holds the first {trainer.saved} of {trainer.steps} steps, and the same "
        "command goes on from there"
    )
