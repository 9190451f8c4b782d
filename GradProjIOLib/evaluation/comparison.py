"""The paper's Table 1: which settings are compared, the records of what was measured, and tables and curves of them.

The folder of a comparison has a folder for each pair with a record for each method. Settings that differ only in the
number of steps share one record; one with refinement has its own. ``batch.trajectory`` computes the records.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from GradProjIOLib.errors import InputError
from GradProjIOLib.evaluation import tables
from GradProjIOLib.geometry.files import atomic_path
from GradProjIOLib.report import curves

PAPER = "direct,vanilla:50,projected:50,vanilla:100,projected:100"
DEFAULT = f"{PAPER},projected:0+60"
COMPARED = ("method", "steps", "refine_steps")
"""These settings come from the compared methods, not from the pair."""
DIRECT = "direct"
CURVES = "curves.png"


@dataclass(frozen=True)
class Setting:
    """A method and after how many steps its result counts, written "direct", "vanilla:50" or "projected:50+60".

    ``steps`` are those on the network's parameters, ``refine_steps`` those of the refinement that follows them (see
    ``Settings``); the paper has none.
    """

    method: str
    steps: int
    refine_steps: int = 0

    def __str__(self) -> str:
        if self.method == DIRECT:
            return DIRECT
        return f"{self.method}:{self.steps}" + (f"+{self.refine_steps}" if self.refine_steps else "")

    @classmethod
    def parse(cls, text: str) -> Setting:
        """The setting that `text` names. Raises InputError."""
        if text.strip() == DIRECT:
            return cls(DIRECT, 0)
        found = re.fullmatch(r"(vanilla|projected):(\d+)(?:\+(\d+))?", text.strip())
        setting = found and cls(found[1], int(found[2]), int(found[3] or 0))
        if not setting or not (setting.steps or setting.refine_steps):
            raise InputError(
                f"The method {text!r} is not known; write direct, vanilla:STEPS, projected:STEPS, or with the steps of "
                "the refinement projected:STEPS+STEPS."
            )
        return setting


def parse_settings(text: str) -> tuple[Setting, ...]:
    """The settings in a comma-separated list, each once. Raises InputError."""
    settings = tuple(Setting.parse(item) for item in text.split(",") if item.strip())
    if not settings or len(set(settings)) < len(settings):
        raise InputError(f"The methods {text!r} name none, or one twice; write for example {DEFAULT}.")
    return settings


@dataclass
class Record:
    """What is known of one method on one pair.

    `steps` are those taken, as dictionaries; `measured` has the rows that were measured, by the number of steps before;
    `fingerprint` says of which files and settings.
    """

    fingerprint: dict[str, Any]
    steps: list[dict[str, Any]] = field(default_factory=list)
    measured: dict[int, tables.Row] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, fingerprint: dict[str, Any] | None = None) -> Record:
        """The record at `path`; an empty one where there is none.

        Raises InputError where it is one of other files or settings than `fingerprint` says.
        """
        if not path.exists():
            return cls(fingerprint or {})
        stored = json.loads(path.read_text(encoding="utf-8"))
        if fingerprint is not None:
            tables.check_fingerprint(stored["fingerprint"], fingerprint, path.parent)
        measured = {int(steps): tables.from_json(row) for steps, row in stored["measured"].items()}
        return cls(stored["fingerprint"], stored["steps"], measured)

    def write(self, path: Path) -> None:
        """Store the record at `path`, whole or not at all."""
        tables.write_json(vars(self), path)


@dataclass(frozen=True)
class Comparison:
    """What is compared on pairs with labels, and the results in the folder of a comparison.

    `every`: the curves have a point after every so many steps; `structures` are label values, without them all but 0.
    """

    settings: tuple[Setting, ...]
    every: int = 10
    structures: tuple[int, ...] | None = None

    @property
    def refined(self) -> list[Setting]:
        """The settings with refinement, each of which is run on its own."""
        return [setting for setting in self.settings if setting.refine_steps]

    @property
    def methods(self) -> list[str]:
        """The methods to run without refinement. The result without steps is the start of the first one."""
        plain = dict.fromkeys(setting.method for setting in self.settings if not setting.refine_steps)
        return [method for method in plain if method != DIRECT] or list(plain)

    @property
    def on_network(self) -> bool:
        """Whether anything of it needs a network."""
        return bool(self.methods) or any(setting.steps for setting in self.refined)

    @property
    def names(self) -> list[str]:
        """The names of all records of a pair."""
        return [*self.methods, *map(str, self.refined)]

    def last_step(self, method: str) -> int:
        """How many steps of `method` without refinement are needed."""
        return max((setting.steps for setting in self._plain(method)), default=0)

    def measured_steps(self, method: str) -> list[int]:
        """After how many steps of `method` to measure: those of its settings, and those between for the curves."""
        last = self.last_step(method)
        asked = {setting.steps for setting in self._plain(method)}
        start = {0} if method == self.methods[0] else set()
        return sorted(start | asked | set(range(self.every, last + 1, self.every)))

    def _plain(self, method: str) -> list[Setting]:
        return [setting for setting in self.settings if setting.method == method and not setting.refine_steps]

    def is_compared(self, method: str, steps: int) -> bool:
        """Whether `method` after so many steps is a setting, which has a row in the table with all metrics."""
        return Setting(method if steps else DIRECT, steps) in self.settings

    def missing(self, record: Record, method: str) -> list[int]:
        """The steps after which something is still to be measured."""

        def is_measured(steps: int) -> bool:
            row = record.measured.get(steps)
            return row is not None and (not self.is_compared(method, steps) or "hd95_mm" in row)

        return [steps for steps in self.measured_steps(method) if not is_measured(steps)]

    def rows(self, case: str, folder: Path) -> list[tables.Row]:
        """A row for every setting of a pair that is done."""
        records = {name: Record.read(record_path(folder, case, name)) for name in self.names}
        rows = []
        for setting in self.settings:
            if setting.refine_steps:
                record = records[str(setting)]
                count = len(record.steps)
            else:
                record = records[self.methods[0] if setting.method == DIRECT else setting.method]
                count = setting.steps
            seconds = sum(step["seconds"] for step in record.steps[:count])
            rows.append({"case": case, "group": str(setting)} | record.measured[count] | {"seconds": seconds})
        return rows

    def write_results(self, cases: Sequence[str], failed: Sequence[dict[str, str]], folder: Path) -> None:
        """Write results.json, results.csv, table.txt and curves.png into `folder`.

        `cases` are the pairs that are done; `failed` the others, with the keys case, group, message and kind.
        """
        if not cases:
            return
        rows = [row for case in cases for row in self.rows(case, folder)]
        fingerprints = {case: Record.read(record_path(folder, case, self.names[0])).fingerprint for case in cases}
        report = tables.report(rows, failed, self.comparisons(rows))
        settings = {case: fingerprint["settings"] for case, fingerprint in fingerprints.items()}
        tables.write_json(report | {"settings": settings}, folder / "results.json")
        tables.write_csv(rows, folder / "results.csv")
        with atomic_path(folder / "table.txt") as temporary:
            temporary.write_text(self.text(rows) + "\n", encoding="utf-8")
        if panels := self.panels(cases, folder):
            models = "/".join(sorted({settings[case]["model"] for case in cases}))
            title = f"{models}, {len(cases)} pair" + "s" * (len(cases) != 1)
            curves.write_png(panels, title, folder / CURVES)

    def comparisons(self, rows: Sequence[tables.Row]) -> list[tables.GroupComparison]:
        """Every setting against the direct result, and projected against vanilla after the same number of steps.

        A refined one also against the same without refinement.
        """
        pairs = [(Setting(DIRECT, 0), setting) for setting in self.settings if setting.method != DIRECT]
        pairs += [(replace(setting, method="vanilla"), setting) for setting in self.settings
                  if setting.method == "projected"]  # fmt: skip
        pairs += [(replace(setting, refine_steps=0), setting) for setting in self.refined]
        return tables.compare_groups(rows, [(str(one), str(other)) for one, other in pairs if one in self.settings])

    def text(self, rows: Sequence[tables.Row]) -> str:
        """The paper's Table 1 with what it leaves out, and the comparisons, as text."""
        text = tables.summary_table(rows, [str(setting) for setting in self.settings])
        comparisons = self.comparisons(rows)
        return f"{text}\n\n{tables.comparison_table(comparisons)}" if comparisons else text

    def panels(self, cases: Sequence[str], folder: Path) -> list[curves.Panel]:
        """Dice, NDV, cosine and share of conflicts over the steps, from the records of `cases`, which are done.

        Settings with refinement have no curves, as they are only measured at their end.
        """
        dice: list[curves.Curve] = []
        folding: list[curves.Curve] = []
        cosine: list[curves.Curve] = []
        conflicts: list[curves.Curve] = []
        methods = [method for method in self.methods if method != DIRECT]
        if not methods:
            return []
        starts = {case: Record.read(record_path(folder, case, methods[0])).measured[0] for case in cases}
        for method in methods:
            records = {case: Record.read(record_path(folder, case, method)) for case in cases}
            steps = sorted({0, *self.measured_steps(method)})
            for curve, key in ((dice, "dice"), (folding, "ndv_percent")):
                values = [
                    [(starts[case] if step == 0 else record.measured[step])[key] for step in steps]
                    for case, record in records.items()
                ]
                curve.append(curves.Curve(method, steps, values))
            if method == "projected":
                taken = range(self.last_step(method))
                cosines = [[record.steps[step]["cosine"] for step in taken] for record in records.values()]
                shares = np.cumsum(np.array(cosines) < 0, axis=1) / np.arange(1, len(taken) + 1)
                cosine.append(curves.Curve(method, taken, cosines))
                conflicts.append(curves.Curve(method, taken, shares.tolist()))
        panels = [
            curves.Panel("Overlap of the structures", "mean Dice", dice),
            curves.Panel("Non-diffeomorphic volume", "NDV [%]", folding),
            curves.Panel("Angle between the two gradients", "cosine", cosine, 0.0),
            curves.Panel("Conflicts", "share of the steps so far", conflicts),
        ]
        return [panel for panel in panels if panel.curves]


def record_path(folder: Path, case: str, name: str) -> Path:
    """Where a record of a pair is kept: that of a method, or that of a setting with refinement ("projected:50+60")."""
    # Windows allows no colon in the name of a file.
    return folder / case / f"{name.replace(':', '_')}.json"
