"""Which networks there are, and where each one's weights come from.

Another size, lattice or source is a line in :data:`MODELS`.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch

from GradProjIOLib.errors import InputError
from GradProjIOLib.models import weights as files
from GradProjIOLib.models.cascade import Cascade
from GradProjIOLib.settings import SMALLEST_LATTICE, Settings

_READING = threading.Lock()

Lattice = tuple[int, int, int]
Widths = tuple[tuple[int, ...], tuple[int, ...]]

UNIGRADICON_WIDTHS: Widths = ((2, 16, 32, 64, 256, 512), (16, 32, 64, 128, 256))
COMPACT_WIDTHS: Widths = ((2, 16, 32, 64, 64), (16, 32, 32, 64))


@dataclass(frozen=True)
class Model:
    """One network: its shape, the lattice it works on, its learning rate and its weights.

    widths, halvings, voxels, composed and memory_share are those of :class:`cascade.Cascade`. lattice: a fixed size
    (D, H, W). samples: instead of it, about how many samples a lattice has that follows the image's proportions. url:
    where published weights are. bundled: the file in this folder that holds the weights. published_keys: the prefix of
    each U-Net's entries in the published file.
    """

    description: str
    widths: tuple[Widths, ...]
    halvings: tuple[int, ...]
    learning_rate: float
    license: str
    voxels: float | None = None
    composed: bool = False
    memory_share: float = 1.0
    lattice: Lattice | None = None
    samples: int = 0
    url: str | None = None
    bundled: str = ""
    published_keys: tuple[str, ...] = ()

    def lattice_for(self, shape: Sequence[int], spacing: Sequence[float]) -> Lattice:
        """The lattice (K, J, I) for an image of ``shape`` (K, J, I) and ``spacing`` (i, j, k) in mm.

        A lattice that follows the image has isotropic samples, never finer than the image's finest axis.
        """
        if self.lattice is not None:
            return self.lattice
        extent = [size * step for size, step in zip(shape, reversed(spacing), strict=True)]
        step = max(min(spacing), (math.prod(extent) / self.samples) ** (1 / 3))
        k, j, i = (max(SMALLEST_LATTICE, round(length / step)) for length in extent)
        return k, j, i


_RELEASES = "https://github.com/uncbiag/uniGradICON/releases/download"
_UNIGRADICON = Model(
    description="foundation model for pairs of one modality (283 MB)",
    widths=(UNIGRADICON_WIDTHS,) * 4,
    halvings=(2, 1, 0, 0),
    learning_rate=2e-5,
    license="Apache-2.0",
    lattice=(175, 175, 175),
    url=f"{_RELEASES}/unigradicon_weights/Step_2_final.trch",
    published_keys=(
        "netPhi.netPhi.net.netPhi.net.net",
        "netPhi.netPhi.net.netPsi.net",
        "netPhi.netPsi.net",
        "netPsi.net",
    ),
)

MODELS: dict[str, Model] = {
    "unigradicon": _UNIGRADICON,
    "multigradicon": replace(
        _UNIGRADICON,
        description="foundation model for pairs of different modality (283 MB)",
        url=f"{_RELEASES}/multigradicon_weights/Step_2_final.trch",
    ),
    "compact": Model(
        description="small network of the same kind, for any computer (in the package)",
        widths=(COMPACT_WIDTHS, COMPACT_WIDTHS, (COMPACT_WIDTHS[0], COMPACT_WIDTHS[1][1:])),
        halvings=(2, 1, 0),
        learning_rate=2.5e-4,
        license="Apache-2.0",
        voxels=10.0,
        composed=True,
        memory_share=0.5,
        samples=860_000,
        bundled="compact.pt",
    ),
}


@dataclass(frozen=True)
class LoadedModel:
    """A network in evaluation mode with its weights, the path of their file, and that file's checksum."""

    model: Model
    network: Cascade
    weights: str
    sha256: str


SUBSTITUTE_NOTES = {
    "compact": "The weights of unigradicon are not on this computer, so the model compact was taken.",
    "none": "The weights of unigradicon are not on this computer, and the model compact knows images of one kind only, "
    "so no network was taken.",
}


def chosen_model(settings: Settings) -> str:
    """The model of the settings; for "auto" unigradicon where its weights are in the cache, else its substitute."""
    if settings.model != "auto":
        return settings.model
    return settings.substitute if missing_url("unigradicon") else "unigradicon"


def missing_url(name: str) -> str | None:
    """Where the published weights of a model are, if it needs them and they are not in the cache; else None."""
    model = MODELS.get(name)
    if model is None or model.url is None or files.cached_path(name, model.url).exists():
        return None
    return model.url


def find(name: str) -> Model:
    """The model of that name. Raises InputError for one that does not exist."""
    if name not in MODELS:
        raise InputError(f"The model {name!r} is not known; choose one of {', '.join(MODELS)}.")
    return MODELS[name]


def build(model: Model) -> Cascade:
    """The network without weights, in evaluation mode: it starts as the identity.

    Its random layers are the same every time, so that the same seed gives the same result. It draws from torch's own
    generator, so nothing else may draw meanwhile.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _cascade(model)


def _cascade(model: Model) -> Cascade:
    return Cascade(model.widths, model.halvings, model.voxels, model.composed, model.memory_share).eval()


def weights_path(name: str, weights: str | os.PathLike | None = None) -> Path:
    """The file with a model's weights: the given one, else the cached or the bundled one.

    Raises InputError for published weights that are not in the cache.
    """
    model = find(name)
    if weights is not None:
        return Path(weights)
    if model.url is None:
        return Path(__file__).with_name(model.bundled)
    path = files.cached_path(name, model.url)
    if not path.exists():
        others = ", ".join(other for other in MODELS if MODELS[other].url is None)
        raise InputError(
            f"The weights of {name} are not at {path}; download them with `gradprojio models download {name}`, "
            f"or fetch {model.url} by other means and put the file there, or choose another model ({others})."
        )
    return path


def load(name: str, weights: str | os.PathLike | None = None, device: torch.device | str = "cpu") -> LoadedModel:
    """A model with its weights on a device.

    Each call gives a network of its own, so two threads can optimize theirs at the same time. The weights of the last
    file that was read stay in memory. weights: a file to use instead of the model's own. Raises InputError where the
    weights are missing or do not fit the network.
    """
    model = find(name)
    path = weights_path(name, weights)
    state, sha256 = _read(model, path, cached=model.url is not None and weights is None)
    # On the device "meta" nothing is allocated and nothing drawn at random.
    with torch.device("meta"):
        network = _cascade(model)
    network.load_state_dict({key: value.to(device, copy=True) for key, value in state.items()}, assign=True)
    return LoadedModel(model, network, str(path), sha256)


def _read(model: Model, path: Path, cached: bool) -> tuple[dict[str, torch.Tensor], str]:
    """The state of a model's network from a file, and the file's checksum; it is read anew when the file has changed.

    cached: whether the file lies in the cache of downloads.
    """
    changed = path.stat().st_mtime_ns if path.exists() else None
    with _READING:
        return _read_once(model, path, cached, changed)


@lru_cache(maxsize=1)
def _read_once(model: Model, path: Path, cached: bool, changed: int | None) -> tuple[dict[str, torch.Tensor], str]:
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in _cascade(model).state_dict().items()}
    expected = {published_key(key, model): shape for key, shape in shapes.items()}
    if cached:
        found, sha256 = files.load_cached(path, expected)
    else:
        found, sha256 = files.load_state(path, expected), files.checksum(path)
    return {key: _to_ours(key, found[published_key(key, model)], model) for key in shapes}, sha256


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
        samples=model.samples // 8**coarsest,
    )


def start_from(network: Cascade, model: Model, path: Path) -> None:
    """Load a file with weights of the model, or of its ``first_stages``, into the network of either.

    Stages that are not in the file stay as they are. Raises InputError where the file is neither.
    """
    failures = []
    for stages in range(len(model.widths), 0, -1):
        try:
            state, _ = _read(first_stages(model, stages), path, cached=False)
        except InputError as error:
            failures.append(error)
            continue
        network.load_state_dict(state, strict=False)
        return
    raise failures[0]


def _to_ours(key: str, value: torch.Tensor, model: Model) -> torch.Tensor:
    """The published networks give displacements along (D, H, W), ours along (x, y, z) = (W, H, D)."""
    return value.flip(0) if model.published_keys and ".head." in key else value
