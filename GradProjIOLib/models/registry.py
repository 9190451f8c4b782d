"""Which networks there are, and where each one's weights come from.

Another size, lattice or source is a line in :data:`MODELS`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch

from GradProjIOLib.errors import InputError
from GradProjIOLib.models import weights as files
from GradProjIOLib.models.cascade import Cascade
from GradProjIOLib.settings import SMALLEST_LATTICE

Lattice = tuple[int, int, int]
Widths = tuple[tuple[int, ...], tuple[int, ...]]

UNIGRADICON_WIDTHS: Widths = ((2, 16, 32, 64, 256, 512), (16, 32, 64, 128, 256))
COMPACT_WIDTHS: Widths = ((2, 16, 32, 64, 64), (16, 32, 32, 64))


@dataclass(frozen=True)
class Model:
    """One network: its shape, the lattice it works on, its learning rate and its weights.

    widths, halvings, voxels and composed are :class:`network.Cascade`'s. lattice is a fixed (D, H, W); with ``samples``
    the lattice follows the image's proportions instead and has about so many samples. ``url`` is where
    published weights are, ``bundled`` the file in this folder that holds them, ``published_keys`` the
    prefix of each U-Net's entries in the published file.
    """

    description: str
    widths: tuple[Widths, ...]
    halvings: tuple[int, ...]
    learning_rate: float
    license: str
    voxels: float | None = None
    composed: bool = False
    lattice: Lattice | None = None
    samples: int | None = None
    url: str | None = None
    bundled: str | None = None
    published_keys: tuple[str, ...] = ()

    def lattice_for(self, shape: Sequence[int], spacing: Sequence[float]) -> Lattice:
        """The lattice (K, J, I) for an image of ``shape`` (K, J, I) and ``spacing`` (i, j, k) in mm.

        A lattice that follows the image has isotropic samples, never finer than the image's finest axis.
        """
        if self.lattice is not None:
            return self.lattice
        extent = [size * step for size, step in zip(shape, reversed(spacing), strict=True)]
        step = max(min(spacing), (math.prod(extent) / self.samples) ** (1 / 3))
        return tuple(max(SMALLEST_LATTICE, round(length / step)) for length in extent)


_RELEASES = "https://github.com/uncbiag/uniGradICON/releases/download"
_PUBLISHED_KEYS = (
    "netPhi.netPhi.net.netPhi.net.net",
    "netPhi.netPhi.net.netPsi.net",
    "netPhi.netPsi.net",
    "netPsi.net",
)


def _unigradicon(description: str, release: str) -> Model:
    return Model(
        description=description,
        widths=(UNIGRADICON_WIDTHS,) * 4,
        halvings=(2, 1, 0, 0),
        learning_rate=2e-5,
        license="Apache-2.0",
        lattice=(175, 175, 175),
        url=f"{_RELEASES}/{release}/Step_2_final.trch",
        published_keys=_PUBLISHED_KEYS,
    )


MODELS: dict[str, Model] = {
    "unigradicon": _unigradicon("foundation model for pairs of one modality (283 MB)", "unigradicon_weights"),
    "multigradicon": _unigradicon("foundation model for pairs of different modality (283 MB)", "multigradicon_weights"),
    "compact": Model(
        description="small network of the same kind, for any computer (in the package)",
        widths=(COMPACT_WIDTHS, COMPACT_WIDTHS, (COMPACT_WIDTHS[0], COMPACT_WIDTHS[1][1:])),
        halvings=(2, 1, 0),
        learning_rate=2.5e-4,
        license="Apache-2.0",
        voxels=10.0,
        composed=True,
        samples=860_000,
        bundled="compact.pt",
    ),
}


@dataclass(frozen=True)
class LoadedModel:
    """A network in evaluation mode with its weights.

    ``weights`` says where they came from (a path, or None for a network without trained weights, which
    starts as the identity), ``sha256`` is the checksum of that file.
    """

    name: str
    model: Model
    network: Cascade
    weights: str | None
    sha256: str | None


FALLBACK_NOTE = "The weights of unigradicon are not on this computer, so the model compact was taken."


def default_model() -> str:
    """ "unigradicon" where its weights are in the cache, else "compact"."""
    model = MODELS["unigradicon"]
    return "unigradicon" if files.cached_path("unigradicon", model.url).exists() else "compact"


def find(name: str) -> Model:
    """The model of that name. Raises InputError for one that does not exist."""
    if name not in MODELS:
        raise InputError(f"The model {name!r} is not known; choose one of {', '.join(MODELS)}.")
    return MODELS[name]


def build(model: Model) -> Cascade:
    """The network without weights, in evaluation mode: it starts as the identity.

    Its random layers are the same every time, or else the same seed would not give the same result.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Cascade(model.widths, model.halvings, model.voxels, model.composed).eval()


def weights_path(name: str, weights: str | os.PathLike | None = None) -> Path | None:
    """The file with a model's weights: the given one, the cached or the bundled one; None where there is none.

    Raises InputError for published weights that are not in the cache.
    """
    model = find(name)
    if weights is not None:
        return Path(weights)
    if model.url is not None:
        path = files.cached_path(name, model.url)
        if not path.exists():
            others = [other for other in MODELS if MODELS[other].url is None]
            raise InputError(files.missing_message(name, model.url, path, others))
        return path
    path = Path(__file__).with_name(model.bundled)
    return path if path.exists() else None


def load(name: str, weights: str | os.PathLike | None = None, device: torch.device | str = "cpu") -> LoadedModel:
    """A model with its weights on a device; the last one loaded stays in memory.

    weights: a file to use instead of the model's own. Raises InputError where the weights are missing or
    do not fit the network.
    """
    path = weights_path(name, weights)
    stamp = path.stat().st_mtime_ns if path is not None and path.exists() else None
    return _load(name, path, weights is not None, stamp, torch.device(device))


@lru_cache(maxsize=1)
def _load(name: str, path: Path | None, given: bool, stamp: int | None, device: torch.device) -> LoadedModel:
    model = MODELS[name]
    network = build(model)
    sha256 = None
    if path is not None:
        keys = {published_key(key, model): key for key in network.state_dict()}
        expected = {key: tuple(network.state_dict()[ours].shape) for key, ours in keys.items()}
        if model.url is not None and not given:
            state, sha256 = files.load_cached(path, expected)
        else:
            state, sha256 = files.load_state(path, expected), files.checksum(path)
        network.load_state_dict({ours: _to_ours(ours, state[key], model) for key, ours in keys.items()})
    return LoadedModel(name, model, network.to(device), str(path) if path else None, sha256)


def published_key(key: str, model: Model) -> str:
    """The name in the weights file of an entry of the network's state."""
    if not model.published_keys:
        return key
    _, stage, part, rest = key.split(".", 3)
    names = {"down": "downConvs", "up": "upConvs", "norm": "batchNorms", "head": "lastConv"}
    return f"{model.published_keys[int(stage)]}.{names[part]}.{rest}"


def state_for_file(network: Cascade, model: Model) -> dict[str, torch.Tensor]:
    """The network's state as ``load`` reads it from a file; what comes with the package is in half precision."""
    state = {published_key(key, model): _to_ours(key, value, model) for key, value in network.state_dict().items()}
    return {key: value.half() if model.bundled and value.is_floating_point() else value for key, value in state.items()}


def first_stages(model: Model, stages: int) -> Model:
    """The coarsest ``stages`` U-Nets of a model as a model of its own, on the lattice that the last of them sees.

    Their entries in the network's state have the names that they have in the whole network's.
    """
    halvings = model.halvings[:stages]
    coarsest = min(halvings)
    return replace(
        model,
        widths=model.widths[:stages],
        halvings=tuple(count - coarsest for count in halvings),
        voxels=None if model.voxels is None else model.voxels / 2**coarsest,
        lattice=None if model.lattice is None else tuple(-(-size // 2**coarsest) for size in model.lattice),
        samples=None if model.samples is None else model.samples // 8**coarsest,
    )


def start_from(network: Cascade, model: Model, path: str | os.PathLike) -> None:
    """Load a file with weights of the model, or of its ``first_stages``; other stages stay as they are.

    Raises InputError where the file is neither.
    """
    failures = []
    for stages in range(len(network.stages), 0, -1):
        part = {key: value for key, value in network.state_dict().items() if int(key.split(".")[1]) < stages}
        keys = {published_key(key, model): key for key in part}
        try:
            state = files.load_state(path, {key: tuple(part[ours].shape) for key, ours in keys.items()})
        except InputError as error:
            failures.append(error)
            continue
        network.load_state_dict({ours: _to_ours(ours, state[key], model) for key, ours in keys.items()}, strict=False)
        return
    raise failures[0]


def _to_ours(key: str, value: torch.Tensor, model: Model) -> torch.Tensor:
    """The published networks give displacements along (D, H, W), ours along (x, y, z) = (W, H, D)."""
    return value.flip(0) if model.published_keys and ".head." in key else value
