"""Training pairs from images in files: a folder of volumes, or the data of the LUMIR challenge."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from GradProjIOLib.errors import InputError
from GradProjIOLib.evaluation import lumir
from GradProjIOLib.geometry.image_files import IMAGE_SUFFIXES, read_labels, read_volume
from GradProjIOLib.geometry.volume import check_image
from GradProjIOLib.models.registry import Lattice
from GradProjIOLib.registration.preprocessing import normalize
from GradProjIOLib.synthetic.pairs import TrainingPair
from GradProjIOLib.training.augmentation import random_change
from GradProjIOLib.training.pairs import AUGMENTATION, ORDER, generator

HELD_OUT = 0.1
"""Part of a folder's images that is for validation."""


class ImageFile(NamedTuple):
    """An image and, where there is one, its label map."""

    image: Path
    labels: Path | None = None


class ImageFiles(NamedTuple):
    """The images to learn from, and pairs (fixed, moving) to validate with."""

    training: list[ImageFile]
    validation: list[tuple[ImageFile, ImageFile]]


def find_images(path: Path, labels: Path | None = None, seed: int = 0) -> ImageFiles:
    """The images of LUMIR_dataset.json, of a folder with that file, or of a folder of volumes.

    labels: folder with label maps under the names of the images; LUMIR's are found by themselves. Of a folder of
    volumes, a random tenth is for validation. Raises InputError where there are fewer than two images.
    """
    listed = path if path.is_file() else path / lumir.DATASET_FILE
    if listed.exists():
        if listed.name != lumir.DATASET_FILE:
            raise InputError(f"{path} is a file; give {lumir.DATASET_FILE} or a folder of images.")
        return _lumir_images(listed.parent)
    if not path.is_dir():
        raise InputError(f"{path} does not exist; give {lumir.DATASET_FILE} or a folder of images.")
    images = sorted(file for file in path.iterdir() if file.name.lower().endswith(IMAGE_SUFFIXES))
    _check_count(images, path)
    files = [ImageFile(image, _labels_of(image, labels)) for image in images]
    held_out = max(round(HELD_OUT * len(files)), 2) if len(files) >= 4 else 0
    order = torch.randperm(len(files), generator=generator(seed, ORDER)).tolist()
    validating = [files[index] for index in order[:held_out]]
    training = [files[index] for index in sorted(order[held_out:])]
    return ImageFiles(training, list(zip(validating, validating[1:] + validating[:1], strict=True)))


def _labels_of(image: Path, folder: Path | None) -> Path | None:
    return folder / image.name if folder and (folder / image.name).exists() else None


def _lumir_images(folder: Path) -> ImageFiles:
    try:
        listed = json.loads((folder / lumir.DATASET_FILE).read_text(encoding="utf-8"))["training"]
        images = [folder / (entry["image"] if isinstance(entry, dict) else entry) for entry in listed]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder / lumir.DATASET_FILE} does not list training images ({error}); download it again."
        ) from error
    _check_count(images, folder)
    pairs = []
    for pair in lumir.validation_pairs(folder):
        labels = lumir.companions(pair, "labels") or (None, None)
        pairs.append((ImageFile(pair.fixed, labels[0]), ImageFile(pair.moving, labels[1])))
    return ImageFiles([ImageFile(image) for image in images], pairs)


def _check_count(images: Sequence[Path], folder: Path) -> None:
    if len(images) < 2:
        raise InputError(f"{folder} has {len(images)} images to learn from; at least 2 are needed.")


@dataclass(frozen=True)
class Reader:
    """Reads images stretched to a lattice (D, H, W). Raises InputError as ``read_volume`` does."""

    lattice: Lattice
    modality: str = "mri"

    def image(self, path: Path) -> tuple[Tensor, Tensor]:
        """Intensities in [0, 1], float32 [1, D, H, W], and the millimeters between samples along (x, y, z)."""
        volume = read_volume(path)
        check_image(volume)
        spacing = volume.spacing * volume.shape[::-1] / self.lattice[::-1]
        return self._stretched(normalize(volume, self.modality), "trilinear"), torch.from_numpy(spacing).float()

    def labels(self, path: Path) -> Tensor:
        """Labels, int32 [1, D, H, W]."""
        return self._stretched(read_labels(path).array.astype(np.float32), "nearest-exact").to(torch.int32)

    def _stretched(self, array: np.ndarray, mode: str) -> Tensor:
        return F.interpolate(torch.from_numpy(array)[None, None], self.lattice, mode=mode)[0]


@dataclass(frozen=True)
class VolumePairs(Dataset[TrainingPair]):
    """Random pairs of images. In each epoch every image is the fixed one once, and the moving one once.

    From the epoch ``augmented_from`` on (0: always) both images of a pair are changed at random.
    """

    files: Sequence[ImageFile]
    reader: Reader
    augmented_from: int
    seed: int = 0

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> TrainingPair:
        epoch, position = divmod(number, len(self.files))
        order = torch.randperm(len(self.files), generator=generator(self.seed, ORDER, epoch)).tolist()
        chosen = [self.files[order[position]], self.files[order[(position + 1) % len(order)]]]
        read = [self.reader.image(file.image) for file in chosen]
        if epoch < self.augmented_from:
            return TrainingPair(*(image for image, _ in read))
        noise = generator(self.seed, AUGMENTATION, number)
        return TrainingPair(*(random_change(noise)(image, spacing) for image, spacing in read))


@dataclass(frozen=True)
class ValidationPairs:
    """The given pairs, without augmentation, and with labels where both images have them."""

    files: Sequence[tuple[ImageFile, ImageFile]]
    reader: Reader

    def __iter__(self) -> Iterator[TrainingPair]:
        for files in self.files:
            images = [self.reader.image(file.image)[0] for file in files]
            labels = [self.reader.labels(file.labels) for file in files if file.labels is not None]
            yield TrainingPair(*images, *(labels if len(labels) == 2 else ()))
