"""How to register: every setting with its default, choices, range, unit and explanation.

The panel, the command line, the tables of a batch, the worker and the report derive theirs from here.
This file imports nothing but the standard library, so that whoever only offers the choices loads nothing else.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any

from GradProjIOLib.errors import InputError, suggestion

MODELS = ("unigradicon", "multigradicon", "compact", "none")
METHODS = ("projected", "vanilla", "direct")
SIMILARITIES = ("lncc", "lncc2", "mind")
MODALITIES = ("mri", "ct")
LANDMARK_ALIGNMENTS = ("landmarks_rigid", "landmarks_affine")
ALIGNMENTS = ("none", "centers", "rigid", "affine", *LANDMARK_ALIGNMENTS)
PROJECTION_RULES = ("random", "both", "similarity", "regularity")
PRECISIONS = ("tf32", "exact")
MEMORY_MODES = ("auto", "full", "lean")
SMALLEST_LATTICE = 16
"""Fewest samples of a network's lattice along each axis."""
LARGEST_SEED = 2**32 - 1
_NO_RULES = {"choices": (), "least": None, "above": None, "most": None, "metavar": None, "is_path": False}
"""The rules of a setting, where it does not say others."""


def _setting(default: Any, help: str, **rules: Any) -> Any:
    """A field of Settings. The rules for its values are its metadata.

    kind: the type of the value; that of the default unless given. choices: the values that are allowed. least and most:
    the range, both included; above: a bound that is excluded. metavar: what stands for the value on the command line,
    N for a whole number and X for another one unless given. is_path: whether the value is the path of a file.
    """
    assert rules.keys() <= {"kind", *_NO_RULES}
    return field(default=default, metadata={"help": help, "kind": type(default)} | _NO_RULES | rules)


@dataclass(frozen=True)
class Settings:
    """How to register a pair. PRESETS has the paper's settings.

    Raises InputError for a value of a wrong type, an unknown choice, or a number out of range.
    """

    model: str = _setting(
        "auto",
        "network that gives the first deformation, or none; auto is unigradicon where its weights are on this "
        "computer, else compact, or none for images of different kinds (mind) that are refined",
        choices=("auto", *MODELS),
    )
    weights: str | None = _setting(
        None, "file of weights to use instead of the model's own", kind=str, metavar="FILE", is_path=True
    )
    method: str = _setting(
        "projected",
        "optimization with projected gradients, with their weighted sum (vanilla), or none (direct)",
        choices=METHODS,
    )
    steps: int = _setting(0, "optimization steps on the network's parameters", least=0)
    refine_steps: int = _setting(
        60, "optimization steps on the displacement fields at each resolution, after those of the network", least=0
    )
    samples: int = _setting(
        3_200_000,
        "about how many samples the finest displacement fields have (1.3 mm for a brain), one per voxel at most",
        least=1000,
    )
    resolution: float | None = _setting(
        None, "spacing of the finest displacement fields in mm, instead of samples", kind=float, above=0, metavar="MM"
    )
    similarity: str = _setting("lncc", "image similarity that is optimized", choices=SIMILARITIES)
    fixed_modality: str = _setting(
        "auto",
        "how the fixed image's intensities are scaled; auto is ct where they look like Hounsfield units, else mri",
        choices=("auto", *MODALITIES),
    )
    moving_modality: str = _setting(
        "auto", "how the moving image's intensities are scaled, likewise", choices=("auto", *MODALITIES)
    )
    align: str = _setting(
        "none",
        "linear alignment before the registration: of what the images show, or of the landmarks that guide it",
        choices=ALIGNMENTS,
    )
    landmark_tolerance: float = _setting(
        2.0, "distance in mm within which landmarks that guide the registration hardly pull", above=0, metavar="MM"
    )
    regularity_weight: float = _setting(1.5, "weight of the regularity against the similarity", least=0)
    learning_rate: float | None = _setting(None, "learning rate instead of the model's own", kind=float, above=0)
    projection: str = _setting(
        "both", "which of the two gradients is projected where they conflict", choices=PROJECTION_RULES
    )
    seed: int = _setting(0, "seed of everything that is random", least=0, most=LARGEST_SEED)
    device: str = _setting("auto", "where to compute: auto, cpu, cuda, cuda:1 … or mps", metavar="DEVICE")
    lattice: tuple[int, int, int] | None = _setting(
        None,
        "lattice of the network instead of the model's own, in samples along each axis of the fixed image",
        kind=tuple,
        least=SMALLEST_LATTICE,
        metavar=("K", "J", "I"),
    )
    precision: str = _setting(
        "tf32",
        "how NVIDIA graphics cards multiply in convolutions: in TF32, which is faster, or in full single precision",
        choices=PRECISIONS,
    )
    memory: str = _setting(
        "auto", "lean takes less memory and more time; auto is lean where memory is short", choices=MEMORY_MODES
    )

    def __post_init__(self) -> None:
        for one in fields(self):
            object.__setattr__(self, one.name, _checked(one, getattr(self, one.name)))

    @property
    def substitute(self) -> str:
        """The model where "auto" finds no weights of unigradicon.

        The compact network was trained on pairs of one contrast. For other pairs its deformation can be a bad start of
        the refinement (Docs/benchmarks.md).
        """
        refined = self.method != "direct" and self.refine_steps > 0 and self.steps == 0
        asked_for = self.weights is not None or self.lattice is not None
        return "none" if refined and self.similarity == "mind" and not asked_for else "compact"

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Settings:
        """The settings with the given names and values; those that are not named are a preset's.

        The name "preset" chooses one of PRESETS. Raises InputError for a name that is not known.
        """
        chosen = dict(values)
        preset = chosen.pop("preset", None)
        for name in chosen:
            if name not in SETTING_NAMES:
                raise InputError(f"The setting {name!r} is not known; {suggestion(name, ('preset', *SETTING_NAMES))}")
        return cls(**(preset_values(preset) | chosen))


SETTING_NAMES = tuple(one.name for one in fields(Settings))

PRESETS: dict[str, dict[str, Any]] = {
    "quick": {"samples": 2_800_000, "refine_steps": 30},
    "standard": {},
    "thorough": {"samples": 7_000_000, "refine_steps": 90},
    "paper": {"steps": 50, "refine_steps": 0, "projection": "random"},
}
"""Settings that differ from the defaults, by name. ``paper`` is the published protocol, without refinement."""


PRESET_SETTINGS = tuple(sorted({"resolution", *(name for values in PRESETS.values() for name in values)}))
"""The settings that make a preset: those in PRESETS, and the resolution, which takes the place of the samples."""


def preset_values(name: str | None) -> dict[str, Any]:
    """The settings of a preset that differ from the defaults. Raises InputError for one that is not known."""
    if name is None:
        return {}
    if name not in PRESETS:
        raise InputError(f"The preset {name!r} is not known; {suggestion(name, PRESETS)}")
    return PRESETS[name]


def preset_of(settings: Settings) -> str:
    """The name of the preset that has the same PRESET_SETTINGS; "custom" where none has."""
    for preset in PRESETS:
        same = Settings.from_mapping({"preset": preset})
        if all(getattr(same, name) == getattr(settings, name) for name in PRESET_SETTINGS):
            return preset
    return "custom"


def allowed_range(one: Field) -> str:
    """The numbers that a field of Settings allows, in words; empty where all numbers are allowed, and for texts."""
    least, above, most = (one.metadata[bound] for bound in ("least", "above", "most"))
    if least is not None and most is not None:
        return f"{least} to {most}"
    if above is not None:
        return f"more than {above}"
    return "" if least is None else f"{least} or more"


def _checked(one: Field, value: Any) -> Any:
    """``value`` as the type of the field. Raises InputError where it makes no sense."""
    name, kind, rules = one.name.replace("_", " "), one.metadata["kind"], one.metadata
    if value is None and one.default is None:
        return None
    if hasattr(value, "tolist"):
        # Numbers and arrays of numpy and torch become Python's own.
        value = value.tolist()
    if rules["choices"] and not (isinstance(value, str) and value in rules["choices"]):
        raise InputError(f"The setting {name} cannot be {value!r}; {suggestion(value, rules['choices'])}")
    if rules["is_path"] and hasattr(value, "__fspath__"):
        value = str(value)
    if not _fits(rules, kind, value):
        wanted = ", ".join(filter(None, (_KINDS[kind], allowed_range(one))))
        raise InputError(f"The setting {name} is {value!r}; it must be {wanted}.")
    return kind(value)


_KINDS = {str: "a text", int: "a whole number", float: "a number", tuple: "three whole numbers"}


def _fits(rules: Mapping[str, Any], kind: type, value: Any) -> bool:
    """Whether a value is of the kind and within the bounds."""
    if kind is str:
        return isinstance(value, str)
    if kind is tuple:
        return isinstance(value, (list, tuple)) and len(value) == 3 and all(_fits(rules, int, n) for n in value)
    if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
        return False
    return (
        abs(value) <= sys.float_info.max
        and (rules["least"] is None or value >= rules["least"])
        and (rules["above"] is None or value > rules["above"])
        and (rules["most"] is None or value <= rules["most"])
    )
