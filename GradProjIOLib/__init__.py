"""Deformable registration of 3-D medical images by instance optimization with gradient projection.

    import GradProjIOLib as gp

    result = gp.register("fixed.nii.gz", "moving.nii.gz", steps=50)
    result.write("result")

The names below load what they need when they are first used, so that `import GradProjIOLib` itself imports
neither PyTorch nor anything else that takes long.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from GradProjIOLib.errors import InputError, WriteError
    from GradProjIOLib.geometry.image_files import read_labels, read_volume, write_volume
    from GradProjIOLib.geometry.volume import Volume
    from GradProjIOLib.registration.going_on import load_result
    from GradProjIOLib.registration.register import register
    from GradProjIOLib.registration.result import Registration
    from GradProjIOLib.settings import Settings
    from GradProjIOLib.spatial.deformation import Deformation

__version__ = "0.1.0"

__all__ = [
    "Deformation",
    "InputError",
    "Registration",
    "Settings",
    "Volume",
    "WriteError",
    "__version__",
    "load_result",
    "read_labels",
    "read_volume",
    "register",
    "write_volume",
]

_MODULES = {
    "Deformation": "spatial.deformation",
    "InputError": "errors",
    "Registration": "registration.result",
    "Settings": "settings",
    "Volume": "geometry.volume",
    "WriteError": "errors",
    "load_result": "registration.going_on",
    "read_labels": "geometry.image_files",
    "read_volume": "geometry.image_files",
    "register": "registration.register",
    "write_volume": "geometry.image_files",
}
"""The module that defines each public name."""


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
