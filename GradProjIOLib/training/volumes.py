"""Training pairs from images in files: a folder of volumes, or the data of the LUMIR challenge."""

from __future__ import annotations

import hashlib
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
from GradProjIOLib.geometry.files import atomic_path
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
    """Reads images stretched to a lattice (D, H, W), and keeps them in a folder so that they are read faster later."""

    lattice: Lattice
    cache: Path
    modality: str = "mri"

    def image(self, path: Path) -> Tensor:
        """Intensities in [0, 1], float32 [1, D, H, W], with a precision of 16 bits."""
        return self._prepared(path, "image")["array"].float()

    def labels(self, path: Path) -> Tensor:
        """Labels, int32 [1, D, H, W]."""
        return self._prepared(path, "labels")["array"]

    def spacing(self, path: Path) -> Tensor:
        """Millimeters between the samples along (x, y, z)."""
        return self._prepared(path, "image")["spacing"]

    def _prepared(self, path: Path, kind: str) -> dict[str, Tensor]:
        """What the cache has for this state of the image; it is made where the cache has nothing."""
        try:
            status = path.stat()
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror}); check the list of images.") from error
        identity = [str(path.resolve()), status.st_mtime_ns, status.st_size, self.lattice, self.modality, kind]
        file = self.cache / f"{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]}.pt"
        if not file.exists():
            self.cache.mkdir(parents=True, exist_ok=True)
            prepared = self._prepare(path, kind)
            with atomic_path(file) as temporary:
                torch.save(prepared, temporary)
        return torch.load(file, weights_only=True, mmap=True)

    def _prepare(self, path: Path, kind: str) -> dict[str, Tensor]:
        if kind == "image":
            volume = read_volume(path)
            check_image(volume)
            array, mode, dtype = normalize(volume, self.modality), "trilinear", torch.float16
        else:
            volume = read_labels(path)
            array, mode, dtype = volume.array.astype(np.float32), "nearest-exact", torch.int32
        stretched = F.interpolate(torch.from_numpy(array)[None, None], self.lattice, mode=mode)[0].to(dtype)
        spacing = volume.spacing * volume.shape[::-1] / self.lattice[::-1]
        return {"array": stretched, "spacing": torch.from_numpy(spacing).float()}


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
        images = [self.reader.image(file.image) for file in chosen]
        if epoch >= self.augmented_from:
            noise = generator(self.seed, AUGMENTATION, number)
            spacings = [self.reader.spacing(file.image) for file in chosen]
            images = [random_change(noise)(image, spacing) for image, spacing in zip(images, spacings, strict=True)]
        return TrainingPair(*images)


@dataclass(frozen=True)
class ValidationPairs:
    """The given pairs, without augmentation, and with labels where both images have them."""

    files: Sequence[tuple[ImageFile, ImageFile]]
    reader: Reader

    def __iter__(self) -> Iterator[TrainingPair]:
        for files in self.files:
            images = [self.reader.image(file.image) for file in files]
            labels = [self.reader.labels(file.labels) for file in files if file.labels is not None]
            yield TrainingPair(*images, *(labels if len(labels) == 2 else ()))
