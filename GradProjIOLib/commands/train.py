"""``gradprojio train``: further training of a network on images, or training on synthetic pairs."""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from pathlib import Path

from GradProjIOLib.commands.options import add_output_option, number, whole_number
from GradProjIOLib.engine.devices import find_device
from GradProjIOLib.engine.memory import recycled_memory
from GradProjIOLib.errors import InputError
from GradProjIOLib.geometry.image_files import read_volume
from GradProjIOLib.models import registry
from GradProjIOLib.settings import MODALITIES, SIMILARITIES
from GradProjIOLib.synthetic.pairs import TrainingPair
from GradProjIOLib.training.pairs import VALIDATION, SyntheticPairs
from GradProjIOLib.training.trainer import CHECKPOINT, VALIDATION_LOG, WEIGHTS, Plan, Trainer
from GradProjIOLib.training.volumes import Reader, ValidationPairs, VolumePairs, find_images

SYNTHETIC_VOXELS = (96, 112, 80)
SYNTHETIC_VALIDATION_PAIRS = 6
POSITIVE = partial(whole_number, least=1)
NOT_NEGATIVE = partial(whole_number, least=0)
NUMBERS = (
    ("epochs", POSITIVE, Plan.epochs, "how often all pairs are seen"),
    ("batch", POSITIVE, Plan.batch, "pairs per step"),
    ("learning-rate", number, Plan.learning_rate, "learning rate"),
    ("warm-up", NOT_NEGATIVE, Plan.warm_up, "steps in which the rate rises"),
    ("regularity-weight", number, Plan.regularity_weight, "weight of the regularity"),
    ("sigma", number, Plan.sigma, "LNCC's window in samples"),
    ("label-weight", number, Plan.label_weight, "weight of the overlap of labels in the loss, for synthetic pairs"),
    ("augment-from", NOT_NEGATIVE, 50, "epoch from which images change"),
    ("loaders", NOT_NEGATIVE, 1, "processes that prepare pairs"),
    ("checkpoint-every", POSITIVE, 100, "steps between checkpoints"),
    ("seed", NOT_NEGATIVE, Plan.seed, "seed of everything that is random"),
)
"""Options that are numbers, with their types and defaults."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("data", nargs="?", type=Path, metavar="DATA", help="folder of images, or LUMIR_dataset.json")
    data.add_argument(
        "--synthetic", type=POSITIVE, metavar="N", help="learn from synthetic pairs, N new ones per epoch"
    )
    add_output_option(parser, "folder for weights, logs and checkpoint")
    parser.add_argument("--model", choices=tuple(registry.MODELS), default="unigradicon", help="network")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--weights", metavar="FILE", help="weights to start from instead of the model's own")
    start.add_argument("--from-scratch", action="store_true", help="start from the identity")
    parser.add_argument("--stages", type=POSITIVE, metavar="N", help="only the N coarsest U-Nets, on a coarser lattice")
    parser.add_argument(
        "--lattice",
        type=partial(whole_number, least=registry.SMALLEST_LATTICE),
        nargs=3,
        metavar=("K", "J", "I"),
        help="instead of the model's own",
    )
    for name, kind, default, help in NUMBERS:
        metavar = "X" if kind is number else "N"
        parser.add_argument(f"--{name}", type=kind, default=default, metavar=metavar, help=help)
    parser.add_argument("--decay", action="store_true", help="let the learning rate fall to nothing along a cosine")
    parser.add_argument("--similarity", choices=tuple(SIMILARITIES), default=Plan.similarity, help="image similarity")
    parser.add_argument("--labels", type=Path, metavar="DIR", help="label maps to validate with, named as the images")
    parser.add_argument("--modality", choices=MODALITIES, default="mri", help="of the images")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda …")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")


def run(arguments: argparse.Namespace) -> int:
    """Train, or go on with a training."""
    _check(arguments)
    plan = Plan(**{name: getattr(arguments, name) for name in Plan.__dataclass_fields__})
    device = find_device(arguments.device)
    whole = registry.find(arguments.model)
    model = whole if arguments.stages is None else registry.first_stages(whole, arguments.stages)
    network = registry.build(model)
    if not arguments.from_scratch:
        registry.start_from(network, whole, registry.weights_path(arguments.model, arguments.weights))
    training, validating = _pairs(arguments, model)
    trainer = Trainer(
        network, model, plan, training, validating, arguments.output,
        device=device, loaders=arguments.loaders, checkpoint_every=arguments.checkpoint_every,
    )  # fmt: skip
    with recycled_memory(device):
        return _train(trainer, arguments)


def _check(arguments: argparse.Namespace) -> None:
    if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        raise InputError("A training is one process; start it without torchrun.")
    if arguments.sigma <= 0 or arguments.learning_rate <= 0:
        raise InputError("--sigma and --learning-rate must be more than 0.")
    if arguments.regularity_weight < 0 or arguments.label_weight < 0:
        raise InputError("--regularity-weight and --label-weight must be 0 or more.")
    if arguments.label_weight and not arguments.synthetic:
        raise InputError("--label-weight needs pairs with known labels; use it with --synthetic.")
    stages = len(registry.find(arguments.model).widths)
    if arguments.stages is not None and arguments.stages > stages:
        raise InputError(f"--stages is {arguments.stages}; the model {arguments.model} has 1 to {stages}.")


def _pairs(
    arguments: argparse.Namespace, model: registry.Model
) -> tuple[SyntheticPairs | VolumePairs, ValidationPairs | list[TrainingPair]]:
    """The pairs to learn from, and those to validate with."""
    if arguments.synthetic:
        lattice = tuple(arguments.lattice or model.lattice_for(SYNTHETIC_VOXELS, (2.0, 2.0, 2.0)))
        held_out = SyntheticPairs(lattice, SYNTHETIC_VALIDATION_PAIRS, arguments.seed, VALIDATION)
        new = SyntheticPairs(lattice, arguments.synthetic, arguments.seed)
        return new, list(held_out)
    files = find_images(arguments.data, arguments.labels, arguments.seed)
    if arguments.lattice:
        lattice = tuple(arguments.lattice)
    else:
        first = read_volume(files.training[0].image)
        lattice = model.lattice_for(first.shape, first.spacing.tolist())
    reader = Reader(lattice, arguments.modality)
    source = VolumePairs(files.training, reader, arguments.augment_from, arguments.seed)
    return source, ValidationPairs(files.validation, reader)


def _train(trainer: Trainer, arguments: argparse.Namespace) -> int:
    """Take the steps that are left; returns the exit status."""
    import tqdm

    hidden = arguments.quiet or not sys.stderr.isatty()
    with tqdm.tqdm(total=trainer.steps, initial=trainer.taken, unit="step", disable=hidden) as bar:
        try:
            for step in trainer:
                losses = f"similarity {step['similarity']:.4f}, regularity {step['regularity']:.4f}"
                bar.set_postfix_str(losses, refresh=False)
                bar.update()
        except KeyboardInterrupt:
            bar.close()
            raise KeyboardInterrupt(f"; {_what_is_left(trainer)}") from None
    if not arguments.quiet:
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
