"""What report.json says of a registration: how it was made, from what, and what was found."""

from __future__ import annotations

import hashlib
import json
import platform
import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from GradProjIOLib import __version__
from GradProjIOLib.engine.devices import describe_device
from GradProjIOLib.engine.memory import peak_memory
from GradProjIOLib.geometry.files import checksum, path_text
from GradProjIOLib.geometry.volume import Volume
from GradProjIOLib.spatial.deformation import Deformation

if TYPE_CHECKING:
    from GradProjIOLib.registration.register import Run
    from GradProjIOLib.registration.result import Registration

CHANGES_VOLUMES = "The deformation changes volumes a lot"
"""How the warning about this result, and not about those before it went on, begins."""
LARGE_SPREAD = 0.5
"""Where the standard deviation of the determinant's logarithm is larger, the user is told.

It was 0.31 to 0.35 where brains were matched well, and more than 0.7 where LNCC was used on images of different kinds.
"""


def report_of(run: Run, found: Registration, inverse_error: dict[str, float | None]) -> dict[str, Any]:
    """The report of a registration, without what came before it went on. All its fields: Docs/report.schema.json."""
    forward, figures = found.forward, found.describe_jacobian()
    if figures["std_log"] > LARGE_SPREAD:
        least, most = (max(figures[f"without_affine_percentile_{n}"], 0) for n in (1, 99))
        other = "" if run.settings.similarity == "mind" else "the similarity mind (for images of different kinds), "
        run.warnings.append(
            f"{CHANGES_VOLUMES}: one voxel in a hundred grows to more than {most:.1f} times its size, and one "
            f"shrinks to less than {least:.2f} times. Look at the Jacobian map. If the images do not explain that, "
            f"choose {other}a larger regularity weight, or an alignment."
        )
    loaded = None if run.network is None else run.network.loaded
    guides = run.guides
    masks = {"fixed_mask": guides.fixed_mask, "moving_mask": guides.moving_mask}
    inputs = {"fixed": run.fixed, "moving": run.moving} | masks
    if guides.labels is not None:
        inputs["fixed_labels"], inputs["moving_labels"] = guides.labels.sources
    points = {}
    if guides.landmarks is not None:
        points["fixed_points"], points["moving_points"] = map(describe_points, guides.landmarks.sources)
    return {
        "version": __version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [path_text(word) for word in sys.argv],
        "settings": json.loads(json.dumps(asdict(run.settings))),
        "model": {"name": run.settings.model, "weights": loaded and loaded.weights, "sha256": loaded and loaded.sha256},
        "device": {"name": str(run.device), "description": describe_device(run.device)},
        "software": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "system": platform.platform(),
            "threads": torch.get_num_threads(),
        },
        "seed": run.settings.seed,
        "memory_mode": "full" if run.network is None else run.network.mode,
        "inputs": {role: describe_image(volume) for role, volume in inputs.items() if volume is not None} | points,
        "initial_transform": None if isinstance(run.initial, Deformation) else run.initial.tolist(),
        "overlap": run.overlap,
        "start": run.start,
        "levels": [list(run.as_stored(lattice)) for lattice in run.lattices],
        "steps": [asdict(step) | {"conflicts": list(step.conflicts)} for step in run.steps],
        "continued_after": [],
        "landmarks": None if guides.landmarks is None else guides.landmarks.report(run.initial, forward),
        "labels": None if guides.labels is None else guides.labels.report(run.initial, forward),
        "stopped": run.stopped,
        **run.losses,
        "jacobian": figures,
        "inverse_error_mm": inverse_error,
        "seconds": time.perf_counter() - run.started,
        "peak_memory_bytes": peak_memory(run.device),
        "warnings": run.warnings,
    }


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
