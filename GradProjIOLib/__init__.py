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
    from GradProjIOLib.errors import InputError as InputError
    from GradProjIOLib.errors import WriteError as WriteError
    from GradProjIOLib.geometry.image_files import read_labels as read_labels
    from GradProjIOLib.geometry.image_files import read_volume as read_volume
    from GradProjIOLib.geometry.image_files import write_volume as write_volume
    from GradProjIOLib.geometry.volume import Volume as Volume
    from GradProjIOLib.registration.going_on import load_result as load_result
    from GradProjIOLib.registration.register import register as register
    from GradProjIOLib.registration.result import Registration as Registration
    from GradProjIOLib.settings import Settings as Settings
    from GradProjIOLib.spatial.deformation import Deformation as Deformation

__version__ = "0.1.0"

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

__all__ = ["__version__", *_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
