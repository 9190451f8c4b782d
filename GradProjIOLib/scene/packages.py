"""The Python packages that the worker process needs inside Slicer, and how they are installed.

Standard library only. Nothing is installed unless `install` is called, which the module does after the user
has agreed. The packages that Slicer contains, above all numpy and SimpleITK, keep their versions.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

REQUESTER = "GradProjIO"


@dataclass(frozen=True)
class Package:
    """A package: the `module` to look for, what to ask pip for, and about how much it downloads."""

    module: str
    requirement: str
    megabytes: int


TORCH_VERSION = ">=2.6"
TORCH = Package("torch", f"torch{TORCH_VERSION}", 200)
TORCH_NOTE = "200 MB for the processor, 2500 MB for an NVIDIA graphics card"
OTHERS = (
    Package("filelock", "filelock>=3.12", 1),
    Package("scipy", "scipy>=1.11", 40),
    Package("matplotlib", "matplotlib>=3.7", 10),
    Package("pooch", "pooch>=1.8", 1),
    Package("nibabel", "nibabel>=5.2", 4),
    Package("platformdirs", "platformdirs>=4", 1),
    Package("surface_distance", "surface-distance==0.1", 1),
    Package("tqdm", "tqdm>=4.60", 1),
    Package("loky", "loky>=3.4", 1),
)
# Replacing these under a running Slicer breaks it, or makes passing images to SimpleITK slow.
KEPT = ("numpy", "SimpleITK", "vtk")


def missing() -> list[Package]:
    """The packages that are not installed, looked up without importing them."""
    return [package for package in (TORCH, *OTHERS) if importlib.util.find_spec(package.module) is None]


def question(packages: Sequence[Package]) -> str:
    """What to ask the user before `packages` are installed."""
    lines = [
        f"- {package.module} ({TORCH_NOTE if package is TORCH else f'{package.megabytes} MB'})" for package in packages
    ]
    return (
        "GradProjIO needs these Python packages, which are downloaded and installed into Slicer once:\n\n"
        + "\n".join(lines)
        + "\n\nThe versions of numpy and SimpleITK that Slicer uses stay as they are. Install them now?"
    )


def constraints() -> list[str]:
    """pip constraints that keep the installed version of the packages in KEPT."""
    found = []
    for name in KEPT:
        with suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name}=={installed_version(name)}")
    return found


def installed_version(name: str) -> str:
    """Version of an installed package, also of those that Slicer ships without pip's records.

    Raises PackageNotFoundError where it is not there at all.
    """
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    try:
        found = getattr(importlib.import_module(name), "__version__", None)
    except ImportError:
        found = None
    if not found:
        raise importlib.metadata.PackageNotFoundError(name)
    return found


def install(packages: Sequence[Package]) -> None:
    """Install `packages` into the running Slicer: torch through the PyTorch extension, the rest with pip.

    Raises RuntimeError with a sentence for the user where torch cannot be installed.
    """
    if TORCH in packages:
        install_torch()
    if requirements := [package.requirement for package in packages if package is not TORCH]:
        install_with_pip(requirements)
    importlib.invalidate_caches()


def install_torch() -> None:
    """Install torch through the PyTorch extension, which chooses the build for this computer."""
    try:
        import PyTorchUtils
    except ImportError as error:
        raise RuntimeError(
            "The PyTorch extension is missing; install it with the Extensions Manager, restart Slicer "
            "and press Register again."
        ) from error
    logic = PyTorchUtils.PyTorchUtilsLogic()
    if logic.installTorch(askConfirmation=False, torchVersionRequirement=TORCH_VERSION) is None:
        raise RuntimeError("PyTorch was not installed; try it in the module PyTorch Utils.")


def install_with_pip(requirements: list[str]) -> None:
    """Install under `constraints`: with slicer.packaging where it is there (from 2026-04 on), else with slicer.util."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "constraints.txt"
        file.write_text("\n".join(constraints()) + "\n", encoding="utf-8")
        try:
            from slicer.packaging import pip_ensure
        except ImportError:
            from slicer.util import pip_install

            pip_install([*requirements, "-c", str(file)])
        else:
            pip_ensure(requirements, constraints=str(file), prompt_install=False, requester=REQUESTER)
