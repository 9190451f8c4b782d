"""Training of a registration network with the losses of instance optimization, and of labels where there are any.

All random numbers follow from the seed and the number of the step or pair, so a training is resumed exactly
from the network's parameters, Adam's moments and the number of steps taken.
"""

from __future__ import annotations

import csv
import itertools
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import KW_ONLY, asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from GradProjIOLib.engine.objective import Objective
from GradProjIOLib.engine.similarity import SIGMA
from GradProjIOLib.errors import InputError
from GradProjIOLib.geometry.files import atomic_path
from GradProjIOLib.models.cascade import Cascade
from GradProjIOLib.models.registry import Model, state_for_file
from GradProjIOLib.synthetic.pairs import TrainingPair
from GradProjIOLib.training import pairs, validation
from GradProjIOLib.training.overlap import overlap_loss
from GradProjIOLib.training.pairs import SyntheticPairs
from GradProjIOLib.training.volumes import VolumePairs

CHECKPOINT = "checkpoint.pt"
WEIGHTS = "weights.pt"
STEP_LOG = "steps.csv"
VALIDATION_LOG = "validation.csv"


@dataclass(frozen=True)
class Plan:
    """How to train; the defaults are those of Zhang, Zhao and Tao (Learn2Reg 2024), section 3.2.

    batch: pairs per step. sigma: of LNCC's window, in samples. label_weight: of the overlap of the pairs' labels
    (``overlap.overlap_loss``). warm_up: steps in which the learning rate rises linearly. decay: it then falls along a
    cosine to nothing at the end.
    """

    learning_rate: float = 5e-5
    batch: int = 4
    epochs: int = 80
    regularity_weight: float = 1.5
    similarity: str = "lncc"
    sigma: float = SIGMA
    label_weight: float = 0.0
    warm_up: int = 0
    decay: bool = False
    seed: int = 0

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of the step with this number, of `steps` in all."""
        rate = self.learning_rate * min(1, (step + 1) / (self.warm_up + 1))
        if self.decay and step > self.warm_up:
            rate *= 0.5 * (1 + math.cos(math.pi * (step - self.warm_up) / (steps - self.warm_up)))
        return rate


@dataclass(eq=False)
class Trainer:
    """Trains ``network`` in place; iterating takes the steps that are left, and gives the row of ``steps.csv`` of each.

    The network stays in evaluation mode, as in the instance optimization. The folder gets ``checkpoint.pt`` every
    ``checkpoint_every`` steps and after every epoch, ``weights.pt`` after every epoch, ``steps.csv`` and
    ``validation.csv``. Where it has a checkpoint, the training continues from there. loaders: processes that prepare
    the pairs; with 0 they are prepared between the steps.

    Raises InputError where the folder's checkpoint is of another plan or network or an epoch has less than a batch,
    and FloatingPointError when a loss is no longer finite.
    """

    network: Cascade
    model: Model
    plan: Plan
    training: SyntheticPairs | VolumePairs
    validating: Iterable[TrainingPair]
    folder: Path
    _: KW_ONLY
    device: torch.device | str = "cpu"
    loaders: int = 1
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        self.network.to(self.device)
        if len(self.training) < self.plan.batch:
            raise InputError(
                f"There are {len(self.training)} pairs in an epoch, less than a batch of {self.plan.batch}; "
                "give more images or a smaller batch."
            )
        self.per_epoch = len(self.training) // self.plan.batch
        self.steps = self.per_epoch * self.plan.epochs
        self.adam = torch.optim.Adam(self.network.parameters(), lr=self.plan.learning_rate, fused=True)
        self.taken = 0
        self.saved = 0
        """The steps that the folder's checkpoint holds; 0 where there is none."""
        self._resume()

    def __iter__(self) -> Iterator[dict[str, float]]:
        if self.taken == 0:
            self._validate()
        start = time.perf_counter()
        coming = self._coming_pairs()
        for number in range(self.taken, self.steps):
            row = self._step(number, itertools.islice(coming, self.plan.batch))
            row["seconds"] = time.perf_counter() - start
            self.taken = number + 1
            self._record(row)
            yield row
            start = time.perf_counter()

    def _coming_pairs(self) -> Iterator[tuple[int, TrainingPair]]:
        """The pairs of the coming steps with their numbers."""
        numbers: list[int] = []
        for step in range(self.taken, self.steps):
            # What is left of an epoch after its last full batch is left out.
            epoch, position = divmod(step, self.per_epoch)
            first = epoch * len(self.training) + position * self.plan.batch
            numbers += range(first, first + self.plan.batch)
        loaded = DataLoader(self.training, batch_size=None, sampler=numbers, num_workers=self.loaders)
        return zip(numbers, loaded, strict=True)

    def _step(self, number: int, batch: Iterable[tuple[int, TrainingPair]]) -> dict[str, float]:
        """Learn from a batch; the mean losses of its pairs before the update, and the learning rate."""
        rate = self.plan.rate(number, self.steps)
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.zero_grad()
        found = torch.zeros(2, device=self.device)
        for pair_number, pair in batch:
            found += self._learn(pair_number, pair) / self.plan.batch
        similarity, regularity = found.tolist()
        if not math.isfinite(similarity + regularity):
            raise FloatingPointError(f"The losses are not finite in step {number}; a smaller learning rate may help.")
        self.adam.step()
        epoch = number // self.per_epoch
        losses = {"similarity": similarity, "regularity": regularity}
        return {"step": number, "epoch": epoch, **losses, "learning_rate": rate}

    def _learn(self, number: int, pair: TrainingPair) -> Tensor:
        """Add the gradient of a pair's share of the loss; returns its similarity and regularity."""
        objective = self._objective(pair)
        noise = pairs.generator(self.plan.seed, pairs.JITTER, number, device=self.device)
        fields = objective.fields()
        similarity, regularity = objective.losses(fields, objective.regularity.jitter(noise))
        loss = similarity + self.plan.regularity_weight * regularity
        if self.plan.label_weight and pair.fixed_labels is not None and pair.moving_labels is not None:
            overlap = overlap_loss(pair.fixed_labels, pair.moving_labels, fields)
            loss = loss + self.plan.label_weight * overlap
        (loss / self.plan.batch).backward()
        return torch.stack([similarity, regularity]).detach()

    def _record(self, row: dict[str, float]) -> None:
        _append(self.folder / STEP_LOG, row)
        epoch_ends = self.taken % self.per_epoch == 0
        if epoch_ends:
            self._validate()
            self._save(WEIGHTS, state_for_file(self.network, self.model))
        if epoch_ends or self.taken % self.checkpoint_every == 0:
            state = {"taken": self.taken, "plan": asdict(self.plan)}
            state |= {"network": self.network.state_dict(), "adam": self.adam.state_dict()}
            self._save(CHECKPOINT, state)
            self.saved = self.taken

    def _save(self, name: str, state: dict[str, Any]) -> None:
        with atomic_path(self.folder / name) as path:
            torch.save(state, path)

    def _objective(self, pair: TrainingPair) -> Objective:
        fixed, moving = (image[None].to(self.device) for image in (pair.fixed, pair.moving))
        return Objective(self.network, fixed, moving, self.plan.similarity, sigma=self.plan.sigma)

    def _validate(self) -> None:
        found = [validation.measure(self._objective(pair), pair) for pair in self.validating]
        if found:
            _append(self.folder / VALIDATION_LOG, {"step": self.taken, **validation.mean(found)})

    def _resume(self) -> None:
        """Continue from the folder's checkpoint, and remove what the logs say of later steps."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / CHECKPOINT
        if path.exists():
            state = torch.load(path, map_location="cpu", weights_only=True)
            self._check_plan(state["plan"], path)
            try:
                self.network.load_state_dict(state["network"])
            except RuntimeError as error:
                raise InputError(f"{path} is of another network; choose another folder.") from error
            self.adam.load_state_dict(state["adam"])
            self.taken = self.saved = state["taken"]
        _keep_rows(self.folder / STEP_LOG, self.taken)
        _keep_rows(self.folder / VALIDATION_LOG, self.taken + (self.taken > 0))

    def _check_plan(self, before: dict[str, Any], path: Path) -> None:
        # A checkpoint from before a setting existed was made with its default.
        before = asdict(Plan()) | before
        for name, value in asdict(self.plan).items():
            if name != "epochs" and value != before[name]:
                raise InputError(
                    f"{path} is of a training with {name.replace('_', ' ')} {before[name]} instead of {value}; "
                    "choose another folder, or the same settings."
                )


def _append(path: Path, row: dict[str, Any]) -> None:
    """Add a row to a CSV file, with the header if it is new."""
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if file.tell() == 0:
            writer.writerow(row)
        writer.writerow([f"{value:.6g}" if isinstance(value, float) else value for value in row.values()])


def _keep_rows(path: Path, end: int) -> None:
    """Remove the rows from step ``end`` on, and one that was not written whole."""
    if not path.exists():
        return
    header, *rows = path.read_text(encoding="utf-8").splitlines()
    columns = header.count(",")
    kept = [row for row in rows if row.count(",") == columns and int(row.split(",")[0]) < end]
    with atomic_path(path) as temporary:
        temporary.write_text("\n".join([header, *kept]) + "\n", encoding="utf-8")
