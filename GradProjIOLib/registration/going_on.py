"""Going on with a registration that has ended, was canceled, or lies in a folder.

Steps on a network's parameters go on exactly where they stopped: the optimizer's state is part of the result.
Refinement goes on from the fields that it reached. Only the finest level is run, unless what counts has changed
(landmarks, labels, masks, or COUNTING_SETTINGS). Then all levels are run, and each level's change is added to the
fields, which keep their detail.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from GradProjIOLib.engine.devices import find_device
from GradProjIOLib.errors import InputError
from GradProjIOLib.geometry.conversion import Image, as_volume
from GradProjIOLib.geometry.files import checksum
from GradProjIOLib.geometry.volume import Volume, straightened
from GradProjIOLib.registration.fields import Fields
from GradProjIOLib.registration.labels import LabelPairs
from GradProjIOLib.registration.landmarks import LandmarkPairs
from GradProjIOLib.registration.preprocessing import Guides
from GradProjIOLib.registration.register import Run
from GradProjIOLib.registration.report import CHANGES_VOLUMES
from GradProjIOLib.registration.result import (
    INITIAL_TRANSFORM,
    OPTIMIZER_STATE,
    Reached,
    Registration,
)
from GradProjIOLib.settings import Settings
from GradProjIOLib.spatial.deformation import Deformation, read_initial

FIXED_SETTINGS = ("model", "weights", "lattice", "align", "seed")
"""Settings that are those of the beginning."""
COUNTING_SETTINGS = ("similarity", "fixed_modality", "moving_modality", "landmark_tolerance", "regularity_weight")
"""Settings that say what counts: where they change, coarse levels may find something new."""
INPUTS = {
    "fixed": "fixed image",
    "moving": "moving image",
    "fixed_mask": "fixed mask",
    "moving_mask": "moving mask",
    "fixed_labels": "fixed labels",
    "moving_labels": "moving labels",
}
"""Roles of inputs in the report, in words."""


def prepare(result: Registration, steps: int | None, guides: Guides, **settings: Any) -> Run:
    """What ``Registration.go_on`` runs, which says what it takes."""
    before = result.reached.guides
    planned, uses_network = _settings(result, steps, settings)
    anew = guides.are_new(before) or any(
        getattr(planned, name) != getattr(result.settings, name) for name in COUNTING_SETTINGS
    )
    earlier = Earlier(result, uses_network, anew)
    return Run(result.fixed, result.moving, planned, result.initial, guides.after(before), earlier)


def _settings(result: Registration, steps: int | None, changes: dict[str, Any]) -> tuple[Settings, bool]:
    """The settings of the whole, and whether steps are taken on the network's parameters."""
    for name in ("preset", *FIXED_SETTINGS):
        if name in changes:
            raise InputError(f"The setting {name.replace('_', ' ')} cannot change on the way; register anew with it.")
    before = result.settings
    counts = Counter(step["stage"] for step in result.report["steps"])
    taken, refined = counts["network"], bool(counts["refinement"]) or before.model == "none"
    if "refine_steps" in changes and steps is not None and refined:
        raise InputError("Give either the steps or the refine steps: this registration is being refined already.")
    values = asdict(before) | changes
    if refined:
        if steps is not None:
            values["refine_steps"] = steps
        more = values["refine_steps"]
    else:
        if steps is None:
            steps = 0 if "refine_steps" in changes else (max(before.steps - taken, 0) or before.steps)
        # Added only after the check, so that a message is about what was given.
        values["steps"] = Settings.from_mapping({"steps": steps}).steps + taken
        more = steps + values["refine_steps"]
    planned = Settings.from_mapping(values)
    if planned.method == "direct":
        raise InputError("The method direct takes no steps; go on with another, such as method projected.")
    if not more:
        raise InputError("There are no steps to go on with; say how many to take.")
    uses_network = not refined and bool(steps)
    if uses_network and taken:
        if result.reached.optimizer is None:
            raise InputError(
                "The state of the network's optimizer was not kept with this result, so it can go on only by "
                "refinement; give refine steps."
            )
        before_on, now_on = result.report["device"]["name"], find_device(planned.device).type
        if before_on.split(":")[0] != now_on:
            raise InputError(
                f"The network's steps were taken on {before_on} and cannot continue on {now_on}; choose "
                f"{before_on}, or give refine steps."
            )
    return planned, uses_network


@dataclass(frozen=True, eq=False)
class Earlier:
    """The registration that another one goes on with.

    uses_network: whether more steps are taken on the network's parameters. anew: whether all levels of the refinement
    are run again.
    """

    result: Registration
    uses_network: bool
    anew: bool

    @property
    def network_steps(self) -> int:
        """How many steps were taken on the network's parameters."""
        return sum(step["stage"] == "network" for step in self.result.report["steps"])

    @property
    def start(self) -> str | None:
        """What the refinement began with; None where there was none yet."""
        return None if self._refined_to() is None else self.result.report["start"]

    @property
    def lattice(self) -> Sequence[int] | None:
        """The lattice of the refinement from which to go on; None where all levels are run."""
        return None if self.anew else self._refined_to()

    def _refined_to(self) -> Sequence[int] | None:
        """The last lattice on which steps of refinement were taken, in the order of the fixed image's axes."""
        levels, steps = self.result.report["levels"], self.result.report["steps"]
        return levels[steps[-1]["level"]] if steps and steps[-1]["stage"] == "refinement" else None

    def fields(self, run: Run) -> Fields | None:
        """Those that were reached, or are made from the deformations; None where nothing was found yet.

        run: the one that goes on from them.
        """
        result = self.result
        if result.settings.model == "none" and not result.report["steps"]:
            return None
        if result.reached.fields is not None:
            return result.reached.fields
        lattice = run.reorder(self._refined_to() or result.settings.lattice or result.fixed.shape)
        return Fields.between(result.forward, result.inverse, result.initial, run.ordered, lattice)

    def continued(self, report: dict[str, Any]) -> dict[str, Any]:
        """The report of the whole, from that of what came after."""
        before = self.result.report
        steps = before["steps"]
        warnings = [warning for warning in before["warnings"] if not warning.startswith(CHANGES_VOLUMES)]
        kept = {} if self.uses_network else {name: before[name] for name in ("model", "memory_mode")}
        return report | kept | {
            "steps": [*steps, *report["steps"]],
            "continued_after": [*before.get("continued_after", []), len(steps)],
            "seconds": before["seconds"] + report["seconds"],
            "warnings": list(dict.fromkeys([*warnings, *report["warnings"]])),
        }  # fmt: skip


def load_result(
    folder: str | os.PathLike,
    *,
    fixed: Image | None = None,
    moving: Image | None = None,
    fixed_mask: Image | None = None,
    moving_mask: Image | None = None,
    fixed_labels: Image | None = None,
    moving_labels: Image | None = None,
) -> Registration:
    """The result in a folder, as ``Registration.write`` or the command wrote it, to look at or to go on with.

    The images, masks and labels are read from where the report says that they were; those given here take their
    place, for files that were moved. Raises InputError where the folder holds no result, a file is not there any more
    or has changed, or an image is not on the lattice of the one that was registered.
    """
    folder = Path(folder)
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        inputs = report["inputs"]
        settings = Settings.from_mapping(report["settings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder} holds no result of a registration that can be read; give its folder.") from error
    given = dict(zip(INPUTS, (fixed, moving, fixed_mask, moving_mask, fixed_labels, moving_labels), strict=True))
    # Moving labels that only were warped did not guide anything.
    described = {role: inputs.get(role) for role in INPUTS if report.get("labels") or role != "moving_labels"}
    images = {role: _input(role, given[role], described.get(role), folder) for role in INPUTS}
    target, source = images["fixed"], images["moving"]
    assert target is not None
    assert source is not None
    matrix = report["initial_transform"]
    return Registration(
        settings,
        target,
        source,
        read_initial(folder / INITIAL_TRANSFORM, target) if matrix is None else np.array(matrix),
        Deformation.read(folder / "transform.h5"),
        Deformation.read(folder / "inverse_transform.h5"),
        report,
        Reached(
            optimizer=_read_state(folder / OPTIMIZER_STATE),
            guides=Guides(
                images["fixed_mask"], images["moving_mask"], LandmarkPairs.from_report(report), _labels(report, images)
            ),
        ),
    )


def _labels(report: dict[str, Any], images: dict[str, Volume | None]) -> LabelPairs | None:
    fixed, moving = images["fixed_labels"], images["moving_labels"]
    if fixed is None or moving is None:
        return None
    return LabelPairs.of(fixed, moving, {label["value"]: label["weight"] for label in report["labels"]})


def _input(role: str, given: Image | None, described: dict[str, Any] | None, folder: Path) -> Volume | None:
    """An image of the registration: the one given, or the file that the report describes."""
    name = INPUTS[role]
    if given is not None:
        volume = straightened(as_volume(given, f"the {name}"))
    elif described is None:
        return None
    else:
        path = described["path"]
        if path is None:
            raise InputError(f"The {name} of {folder} was no file; give the image itself.")
        if not Path(path).is_file():
            raise InputError(f"The {name} of {folder} is not at {path} any more; say where it is now.")
        if checksum(path) != described["sha256"]:
            raise InputError(f"{path} has changed since {folder} was made with it; register anew, or give the old one.")
        volume = straightened(as_volume(path, f"the {name}"))
    if described is not None and not (
        list(volume.shape) == described["shape"] and np.allclose(volume.affine, described["affine"], atol=1e-3)
    ):
        raise InputError(f"{volume.name} is not on the lattice of the {name} with which {folder} was made.")
    return volume


def _read_state(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        if not isinstance(state["adam"], list):
            raise ValueError("an earlier version wrote it")
        return state
    except Exception as error:
        raise InputError(f"{path} cannot be read; remove it to go on by refinement, or register anew.") from error
