"""How to register: every setting with its default, choices, range, unit and explanation.

The panel, the command line, the tables of a batch, the worker and the report derive theirs from here.
This file imports nothing but the standard library, so that whoever only offers the choices loads nothing else.
"""

from __future__ import annotations

import difflib
import math
import types
import typing
from collections.abc import Sequence
from dataclasses import Field, dataclass, field, fields
from functools import cache
from typing import Any

from GradProjIOLib.errors import InputError

MODELS = ("unigradicon", "multigradicon", "compact")
METHODS = ("projected", "vanilla", "direct")
SIMILARITIES = ("lncc", "lncc2", "mind")
MODALITIES = ("mri", "ct")
ALIGNMENTS = ("none", "centers", "rigid", "affine")
PROJECTION_RULES = ("random", "both", "similarity", "regularity")
PRECISIONS = ("tf32", "exact")
MEMORY_MODES = ("auto", "full", "lean")
SMALLEST_LATTICE = 16
"""Fewest samples of a network's lattice along each axis."""
LARGEST_SEED = 2**32 - 1


def _setting(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] = (),
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    metavar: str | tuple[str, ...] | None = None,
    is_path: bool = False,
) -> Any:
    """A field of Settings.

    choices: the values that are allowed. least and most: the range, both included; above: a bound that is excluded.
    metavar: what stands for the value on the command line. is_path: whether the value is the path of a file.
    """
    metadata = {"help": help, "choices": tuple(choices), "least": least, "above": above, "most": most,
                "metavar": metavar, "is_path": is_path}  # fmt: skip
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """How to register a pair. The defaults of the optimization are the paper's.

    Raises InputError for a value of a wrong type, an unknown choice, or a number out of range.
    """

    model: str = _setting(
        "auto",
        "network; auto is unigradicon where its weights are on this computer, else compact",
        choices=("auto", *MODELS),
    )
    weights: str | None = _setting(None, "weights to use instead of the model's own", metavar="FILE", is_path=True)
    method: str = _setting(
        "projected",
        "optimization with projected gradients, with their weighted sum, or none",
        choices=METHODS,
    )
    steps: int = _setting(50, "optimization steps on the network's parameters", least=0, metavar="N")
    similarity: str = _setting("lncc", "image similarity that is optimized", choices=SIMILARITIES)
    fixed_modality: str = _setting("mri", "how the fixed image's intensities are scaled", choices=MODALITIES)
    moving_modality: str = _setting("mri", "how the moving image's intensities are scaled", choices=MODALITIES)
    align: str = _setting("none", "linear alignment before", choices=ALIGNMENTS)
    regularity_weight: float = _setting(1.5, "weight of the regularity", least=0, metavar="X")
    learning_rate: float | None = _setting(None, "learning rate instead of the model's own", above=0, metavar="X")
    projection: str = _setting("random", "which gradient is projected where they conflict", choices=PROJECTION_RULES)
    seed: int = _setting(0, "seed of everything random", least=0, most=LARGEST_SEED, metavar="N")
    device: str = _setting("auto", "auto, cpu, cuda, cuda:1 … or mps", metavar="DEVICE")
    lattice: tuple[int, int, int] | None = _setting(
        None,
        "lattice of the network instead of the model's own, in samples",
        least=SMALLEST_LATTICE,
        metavar=("K", "J", "I"),
    )
    precision: str = _setting(
        "tf32",
        "how NVIDIA graphics cards multiply in convolutions: in TF32, which is faster, or in full single precision",
        choices=PRECISIONS,
    )
    memory: str = _setting("auto", "lean takes less memory and more time", choices=MEMORY_MODES)

    def __post_init__(self) -> None:
        for one in fields(self):
            object.__setattr__(self, one.name, _checked(one, getattr(self, one.name)))

    @classmethod
    def from_mapping(cls, values: typing.Mapping[str, Any]) -> Settings:
        """The settings with the given names and values. Raises InputError for a name that is not known."""
        names = [one.name for one in fields(cls)]
        for name in values:
            if name not in names:
                close = difflib.get_close_matches(name, names, 1)
                hint = f"did you mean {close[0]}?" if close else f"the settings are {', '.join(names)}."
                raise InputError(f"The setting {name!r} is not known; {hint}")
        return cls(**values)


def value_type(name: str) -> type:
    """The type of a setting's value, without None: str, int, float, or tuple for the lattice."""
    kind = _types()[name]
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kind = next(part for part in typing.get_args(kind) if part is not type(None))
    return typing.get_origin(kind) or kind


@cache
def _types() -> dict[str, Any]:
    return typing.get_type_hints(Settings)


def _checked(one: Field, value: Any) -> Any:
    """``value`` as the type of the field. Raises InputError where it makes no sense."""
    words, kind, rules = one.name.replace("_", " "), value_type(one.name), one.metadata
    if value is None and one.default is None:
        return None
    if rules["choices"] and value not in rules["choices"]:
        raise InputError(f"The {words} {value!r} is not known; choose one of {', '.join(rules['choices'])}.")
    if kind is tuple:
        numbers = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else ()
        if len(numbers) != 3 or not all(_is_whole(number) and number >= rules["least"] for number in numbers):
            raise InputError(
                f"The {words} is {value!r}; it must have at least {rules['least']} samples along each of three axes."
            )
        return tuple(int(number) for number in numbers)
    if kind is int and not _is_whole(value):
        raise InputError(f"The {words} is {value!r}; it must be a whole number.")
    if kind is float and not _is_number(value):
        raise InputError(f"The {words} is {value!r}; it must be a number.")
    if kind is str and not isinstance(value, str):
        if not (rules["is_path"] and hasattr(value, "__fspath__")):
            raise InputError(f"The {words} is {value!r}; it must be a text.")
        value = str(value)
    for bound, fails, sentence in (
        ("least", lambda limit: value < limit, "{} or more"),
        ("above", lambda limit: value <= limit, "more than {}"),
        ("most", lambda limit: value > limit, "at most {}"),
    ):
        if rules[bound] is not None and fails(rules[bound]):
            raise InputError(f"The {words} is {value}; it must be {sentence.format(rules[bound])}.")
    return kind(value)


def _is_number(value: Any) -> bool:
    return hasattr(value, "__float__") and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool)
