"""The Python packages the registration process needs inside Slicer, and how they get there.

Standard library only. Nothing is installed unless `install` is called, which the module does after the user
has agreed. What Slicer brings along, above all numpy and SimpleITK, keeps its version.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

REQUESTER = "GradProjIO"


@dataclass(frozen=True)
class Package:
    """A package: the `module` to look for, what to ask pip for, and about how much it downloads."""

    module: str
    requirement: str
    megabytes: int


TORCH = Package("torch", "torch>=2.6", 200)
TORCH_VERSION = ">=2.6"
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
)
# Replacing these under a running Slicer breaks it, or makes passing images to SimpleITK slow.
KEPT = ("numpy", "SimpleITK", "vtk")


class Installer(Protocol):
    """What can install packages; SlicerInstaller does, tests put a double in its place."""

    def install_torch(self) -> None:
        """Install torch in the version TORCH_VERSION. Raises RuntimeError where that is not possible."""

    def install(self, requirements: Sequence[str], constraints: Path) -> None:
        """Install `requirements` with pip under the `constraints` file."""


def missing(is_there: Callable[[str], bool] | None = None) -> list[Package]:
    """The packages that are not installed, looked up without importing them."""
    is_there = is_there or (lambda module: importlib.util.find_spec(module) is not None)
    return [package for package in (TORCH, *OTHERS) if not is_there(package.module)]


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


def constraints(version: Callable[[str], str] | None = None) -> list[str]:
    """pip constraints that keep the installed version of the packages in KEPT."""
    version = version or installed_version
    found = []
    for name in KEPT:
        with suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name}=={version(name)}")
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


def install(packages: Sequence[Package], installer: Installer | None = None) -> None:
    """Install `packages`: torch through the PyTorch extension, the rest with pip under `constraints`.

    Raises RuntimeError with a sentence for the user where something is still missing afterwards.
    """
    installer = installer or SlicerInstaller()
    if TORCH in packages:
        installer.install_torch()
    requirements = [package.requirement for package in packages if package is not TORCH]
    if requirements:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "constraints.txt"
            file.write_text("\n".join(constraints()) + "\n", encoding="utf-8")
            installer.install(requirements, file)
    importlib.invalidate_caches()


class SlicerInstaller:
    """Installs into the running Slicer."""

    def install_torch(self) -> None:
        """Through the PyTorch extension, which chooses the build for this computer."""
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

    def install(self, requirements: Sequence[str], constraints: Path) -> None:
        """With slicer.packaging where it is there (from 2026-04 on), else with slicer.util."""
        try:
            from slicer.packaging import pip_ensure
        except ImportError:
            from slicer.util import pip_install

            pip_install([*requirements, "-c", str(constraints)])
            return
        pip_ensure(list(requirements), constraints=str(constraints), prompt_install=False, requester=REQUESTER)
