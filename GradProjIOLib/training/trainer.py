"""Unsupervised training of a registration network, with the losses of the instance optimisation.

Zhang, Zhao and Tao (Learn2Reg 2024), section 3.2: Adam, learning rate 5e-5, batches of 4 pairs, 80 epochs. The
network stays in evaluation mode, as in the instance optimisation: its normalisation keeps the statistics it
came with, so one pair more or less in a batch changes nothing in the others.

All random numbers follow from the seed and the number of the step or pair, so a training is resumed exactly
from the network's parameters, Adam's moments and the number of steps taken.
"""

from __future__ import annotations

import csv
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from GradProjIOLib.models.network import Cascade
from GradProjIOLib.objective import Objective
from GradProjIOLib.similarity import LNCC, SIGMA
from GradProjIOLib.training import pairs, validation
from GradProjIOLib.training.pairs import PairSource, TrainingPair
from GradProjIOLib.volume import InputError, atomic_path

CHECKPOINT = "checkpoint.pt"
WEIGHTS = "weights.pt"
STEPS = "steps.csv"
VALIDATION = "validation.csv"


@dataclass(frozen=True)
class Plan:
    """How to train; the defaults are the paper's.

    batch: pairs per step, of all processes together. sigma: of LNCC's window, in samples. warm_up: steps in which
    the learning rate rises linearly. decay: it then falls along a cosine to nothing at the end. precision
    "fast" computes the network in bfloat16.
    """

    learning_rate: float = 5e-5
    batch: int = 4
    epochs: int = 80
    regularity_weight: float = 1.5
    similarity: str = "lncc"
    sigma: float = SIGMA
    warm_up: int = 0
    decay: bool = False
    precision: str = "exact"
    seed: int = 0

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of a step of so many."""
        rate = self.learning_rate * min(1, (step + 1) / (self.warm_up + 1))
        if self.decay and step > self.warm_up:
            rate *= 0.5 * (1 + math.cos(math.pi * (step - self.warm_up) / (steps - self.warm_up)))
        return rate


@dataclass(frozen=True)
class TrainingStep:
    """What one step saw: mean losses of its pairs before the update, learning rate, and the seconds it took."""

    step: int
    epoch: int
    similarity: float
    regularity: float
    learning_rate: float
    seconds: float


class Trainer:
    """Trains ``network`` in place; iterating takes the steps that are left.

    The folder gets ``checkpoint.pt`` every ``checkpoint_every`` steps and after every epoch, ``weights.pt`` (the
    network's state) after every epoch, ``steps.csv`` and ``validation.csv``. A folder with a checkpoint is gone
    on with. loaders: processes that prepare the pairs; 0 prepares them between the steps.

        for step in Trainer(network, plan, training, validating, folder):
            print(step)

    Raises InputError where the folder's checkpoint is of another plan or network, and FloatingPointError when a
    loss is no longer finite.
    """

    def __init__(
        self,
        network: Cascade,
        plan: Plan,
        training: PairSource,
        validating: Sequence[TrainingPair] | PairSource,
        folder: Path,
        *,
        device: torch.device | str = "cpu",
        loaders: int = 1,
        checkpoint_every: int = 100,
    ):
        self.network = network.to(device)
        self.plan = plan
        self.training = training
        self.validating = validating
        self.folder = folder
        self.device = torch.device(device)
        self.loaders = loaders
        self.checkpoint_every = checkpoint_every
        self.per_epoch = max(len(training) // plan.batch, 1)
        self.steps = self.per_epoch * plan.epochs
        self.adam = torch.optim.Adam(self.network.parameters(), lr=plan.learning_rate, fused=True)
        self.taken = 0
        self._resume()

    def __iter__(self) -> Iterator[TrainingStep]:
        if self.taken == 0:
            self._validate()
        start = time.perf_counter()
        for number, batch in enumerate(self._batches(), start=self.taken):
            step = self._step(number, batch, start)
            self.taken = number + 1
            _append(self.folder / STEPS, step)
            if self.taken % self.per_epoch == 0:
                self._validate()
                self._save_weights()
                self._save_checkpoint()
            elif self.taken % self.checkpoint_every == 0:
                self._save_checkpoint()
            yield step
            start = time.perf_counter()

    def _batches(self) -> Iterator[list[TrainingPair]]:
        numbers = range(self.taken * self.plan.batch, self.steps * self.plan.batch)
        loader = DataLoader(Subset(self.training, numbers), batch_size=None, num_workers=self.loaders)
        batch: list[TrainingPair] = []
        for pair in loader:
            batch.append(pair)
            if len(batch) == self.plan.batch:
                yield batch
                batch = []

    def _step(self, number: int, batch: list[TrainingPair], start: float) -> TrainingStep:
        rate = self.plan.rate(number, self.steps)
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.zero_grad()
        sums = torch.zeros(2)
        for position, pair in enumerate(batch):
            objective = self._objective(pair)
            noise = pairs.generator(self.plan.seed, pairs.JITTER, number, position, device=self.device)
            losses = objective.losses(objective.regularity.jitter(noise))
            loss = losses.similarity + self.plan.regularity_weight * losses.regularity
            (loss / len(batch)).backward()
            sums += torch.tensor([losses.similarity.item(), losses.regularity.item()])
        similarity, regularity = (sums / len(batch)).tolist()
        if not math.isfinite(similarity + regularity):
            raise FloatingPointError(f"The losses are not finite in step {number}; a smaller learning rate may help.")
        self.adam.step()
        return TrainingStep(
            number, number // self.per_epoch, similarity, regularity, rate, time.perf_counter() - start
        )

    def _objective(self, pair: TrainingPair) -> Objective:
        fixed, moving = (image[None].to(self.device) for image in (pair.fixed, pair.moving))
        objective = Objective(self._forward, fixed, moving, self.plan.similarity)
        if self.plan.sigma != SIGMA and isinstance(objective.similarity, LNCC):
            objective.similarity = type(objective.similarity)(objective.targets, sigma=self.plan.sigma)
        return objective

    def _forward(self, source: Tensor, target: Tensor) -> list[Tensor]:
        fast = self.plan.precision == "fast"
        with torch.autocast(self.device.type, torch.bfloat16) if fast else nullcontext():
            return self.network(source, target)

    def _validate(self) -> None:
        if not len(self.validating):
            return
        numbered = (self.validating[number] for number in range(len(self.validating)))
        found = validation.mean([validation.measure(self._objective(pair), pair) for pair in numbered])
        _append(self.folder / VALIDATION, {"step": self.taken, **asdict(found)})

    def _save_weights(self) -> None:
        with atomic_path(self.folder / WEIGHTS) as path:
            torch.save(self.network.state_dict(), path)

    def _save_checkpoint(self) -> None:
        state = {
            "taken": self.taken,
            "plan": asdict(self.plan),
            "network": self.network.state_dict(),
            "adam": self.adam.state_dict(),
        }
        with atomic_path(self.folder / CHECKPOINT) as path:
            torch.save(state, path)

    def _resume(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / CHECKPOINT
        if path.exists():
            state = torch.load(path, map_location="cpu", weights_only=True)
            self._check(state, path)
            self.network.load_state_dict(state["network"])
            self.adam.load_state_dict(state["adam"])
            self.taken = state["taken"]
        for log in (STEPS, VALIDATION):
            _forget_after(self.folder / log, self.taken, keep_last=log == VALIDATION and self.taken > 0)

    def _check(self, state: dict[str, Any], path: Path) -> None:
        plan = asdict(self.plan)
        changed = [name for name in plan if name != "epochs" and plan[name] != state["plan"].get(name)]
        if changed:
            raise InputError(
                f"{path} is of a training with another {changed[0].replace('_', ' ')} "
                f"({state['plan'].get(changed[0])} instead of {plan[changed[0]]}); choose another folder."
            )


def _append(path: Path, row: Any) -> None:
    """Add a row to a CSV file, with the header if it is new."""
    values = row if isinstance(row, dict) else {field.name: getattr(row, field.name) for field in fields(row)}
    new = not path.exists()
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(values)
        writer.writerow(f"{value:.6g}" if isinstance(value, float) else value for value in values.values())
        file.flush()
        os.fsync(file.fileno())


def _forget_after(path: Path, step: int, keep_last: bool) -> None:
    """Remove the rows of steps that will be taken again."""
    if not path.exists():
        return
    header, *rows = path.read_text(encoding="utf-8").splitlines()
    kept = [row for row in rows if row and (int(row.split(",")[0]) < step + keep_last)]
    with atomic_path(path) as temporary:
        temporary.write_text("\n".join([header, *kept]) + "\n", encoding="utf-8")
