"""What a network is trained on: pairs of images by number, the same in every run and every process.

Pair n of a source depends on the source's settings and n alone. So a training gives the same
network whether or not it is interrupted, and with any number of loading processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset

from GradProjIOLib.models.registry import Lattice
from GradProjIOLib.synthetic.pairs import TrainingPair, synthetic_pair

# What random numbers are drawn for; no two purposes share them.
TRAINING, VALIDATION, JITTER, AUGMENTATION, ORDER = range(5)


@dataclass(frozen=True)
class SyntheticPairs(Dataset[TrainingPair]):
    """Pairs of synthetic images (``synthetic.pairs``) on a lattice (D, H, W), each seen only once.

    purpose: TRAINING or VALIDATION, which have no pair in common.
    """

    lattice: Lattice
    per_epoch: int
    seed: int = 0
    purpose: int = TRAINING

    def __len__(self) -> int:
        return self.per_epoch

    def __iter__(self) -> Iterator[TrainingPair]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, number: int) -> TrainingPair:
        return synthetic_pair(derived_seed(self.seed, self.purpose, number), self.lattice)


def derived_seed(*numbers: int) -> int:
    """A seed that stands for these numbers (0 or more) in this order."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def generator(*numbers: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Random numbers that depend on these numbers alone."""
    return torch.Generator(device).manual_seed(derived_seed(*numbers))
