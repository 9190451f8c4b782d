"""What a report says of the inputs of a registration, so that they are known again."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from GradProjIOLib.geometry.files import checksum, path_text
from GradProjIOLib.geometry.volume import Volume


def describe_image(volume: Volume) -> dict[str, Any]:
    """What identifies an input: its name, the checksum of its file (or voxels) and its lattice."""
    path = volume.path
    return {
        "path": path_text(path.resolve()) if path else None,
        "name": volume.name,
        "sha256": checksum(path) if path else hashlib.sha256(np.ascontiguousarray(volume.array)).hexdigest(),
        "shape": list(volume.shape),
        "spacing": volume.spacing.tolist(),
        "affine": volume.affine.tolist(),
    }


def describe_points(source: str) -> dict[str, Any]:
    """What identifies landmarks: their name, and the checksum of their file if they come from one."""
    path = Path(source)
    found = path.is_file()
    return {
        "path": path_text(path.resolve()) if found else None,
        "name": source,
        "sha256": checksum(path) if found else None,
    }
