"""The Python packages that the worker process needs inside Slicer, and how they are installed.

Standard library only. Nothing is installed unless `install` is called, which the module does after the user
has agreed. The packages that Slicer contains, above all numpy and SimpleITK, keep their versions.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

TORCH_VERSION = ">=2.6"
TORCH = f"torch{TORCH_VERSION}"
# What to ask pip for, and about how many megabytes are downloaded.
MEGABYTES = {
    TORCH: "200 MB for the processor, 2500 MB for an NVIDIA graphics card",
    "filelock>=3.12": "1 MB",
    "scipy>=1.11": "40 MB",
    "matplotlib>=3.7": "10 MB",
    "pooch>=1.8": "1 MB",
    "nibabel>=5.2": "4 MB",
    "platformdirs>=4": "1 MB",
    "psutil>=5.9": "1 MB",
    "surface-distance==0.1": "1 MB",
    "tqdm>=4.60": "1 MB",
    "loky>=3.4": "1 MB",
}
# Replacing these under a running Slicer breaks it, or makes passing images to SimpleITK slow.
KEPT = ("numpy", "SimpleITK", "vtk")


def module_of(requirement: str) -> str:
    """The module that a requirement brings."""
    return re.split("[>=]", requirement)[0].replace("-", "_")


def missing() -> list[str]:
    """The requirements that are not installed, looked up without importing them."""
    return [requirement for requirement in MEGABYTES if importlib.util.find_spec(module_of(requirement)) is None]


def question(requirements: Sequence[str]) -> str:
    """What to ask the user before `requirements` are installed."""
    lines = [f"- {module_of(requirement)} ({MEGABYTES[requirement]})" for requirement in requirements]
    return (
        "GradProjIO needs these Python packages, which are downloaded and installed into Slicer once:\n\n"
        + "\n".join(lines)
        + "\n\nThe versions of numpy and SimpleITK that Slicer uses stay as they are. Install them now?"
    )


def constraints() -> list[str]:
    """pip constraints that keep the installed version of the packages in KEPT."""
    found = []
    for name in KEPT:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            # Slicer ships some packages without pip's records.
            version = importlib.import_module(name).__version__
        found.append(f"{name}=={version}")
    return found


def install(requirements: Sequence[str]) -> None:
    """Install `requirements` into the running Slicer, under `constraints`.

    Raises RuntimeError where torch cannot be installed.
    """
    if TORCH in requirements:
        install_torch()
    if others := [requirement for requirement in requirements if requirement != TORCH]:
        from slicer.util import pip_install

        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "constraints.txt"
            file.write_text("\n".join(constraints()) + "\n", encoding="utf-8")
            pip_install([*others, "-c", str(file)])
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
