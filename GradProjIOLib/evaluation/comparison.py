"""The paper's Table 1: which settings are compared, the records of what was measured, and tables and curves of them.

The folder of a comparison has a folder for each pair with a record for each run. Settings that differ only in the
number of steps share one run; one with refinement has its own. ``batch.trajectory`` makes the records.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
TABLE, CURVES = "table.txt", "curves.png"


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

    @property
    def run(self) -> str:
        """The name of the run that gives its result; that of "direct" is ``Comparison.first``."""
        return str(self) if self.refine_steps else self.method

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


@dataclass(frozen=True)
class Record:
    """What came out of one run on one pair, which is written when the run has ended.

    `steps` are those taken, as dictionaries; `measured` has the rows that were measured, by the number of steps before;
    `fingerprint` says of which files and settings.
    """

    fingerprint: dict[str, Any]
    steps: list[dict[str, Any]]
    measured: dict[int, tables.Row]

    @classmethod
    def read(cls, path: Path) -> Record:
        """The record at `path`."""
        stored = json.loads(path.read_text(encoding="utf-8"))
        measured = {int(steps): tables.from_json(row) for steps, row in stored["measured"].items()}
        return cls(stored["fingerprint"], stored["steps"], measured)


Records = dict[str, Record]
"""The records of a pair by the names of the runs."""


@dataclass(frozen=True)
class Comparison:
    """What is compared on pairs with labels, and the results in the folder of a comparison.

    `every`: the curves have a point after every so many steps; `structures` are label values, without them all but 0.
    """

    settings: tuple[Setting, ...]
    every: int = 10
    structures: tuple[int, ...] | None = None

    @property
    def runs(self) -> dict[str, Setting]:
        """What is run on each pair, by name: each method as far as it is needed, and each setting with refinement."""
        runs: dict[str, Setting] = {}
        for setting in sorted(self.settings, key=lambda one: one.refine_steps > 0):
            if setting.steps >= runs.get(setting.run, setting).steps:
                runs[setting.run] = setting
        if "vanilla" in runs or "projected" in runs:
            runs.pop(DIRECT, None)
        return runs

    @property
    def first(self) -> str:
        """The run whose start is the result without steps: one without refinement where there is any."""
        return next(iter(self.runs))

    @property
    def on_network(self) -> bool:
        """Whether anything of it needs a network."""
        return any(setting.steps or not setting.refine_steps for setting in self.settings)

    def measured_steps(self, name: str) -> dict[int, bool]:
        """After how many steps of a run to measure, and whether with all metrics.

        Those of its settings are measured with all metrics, which are in the table. Those between are for the curves.
        A run with refinement is measured at its end only.
        """
        run = self.runs[name]
        if run.refine_steps:
            return {}
        compared = {setting.steps for setting in self.settings if setting.run in (name, DIRECT)}
        first = 0 if name == self.first else self.every
        steps = (compared - {0}) | set(range(first, run.steps + 1, self.every))
        return {taken: taken in compared for taken in sorted(steps)}

    def missing(self, folder: Path, case: str, fingerprint: dict[str, Any]) -> list[str]:
        """The runs of a pair that have no record yet, or one in which something is not measured that is wanted.

        Raises InputError where there are records of other files or settings than `fingerprint` says.
        """
        return [name for name in self.runs if not self._is_whole(record_path(folder, case, name), name, fingerprint)]

    def _is_whole(self, path: Path, name: str, fingerprint: dict[str, Any]) -> bool:
        """Whether the record of a run is at `path`, with all that is wanted."""
        if not path.exists():
            return False
        record = Record.read(path)
        tables.check_fingerprint(record.fingerprint, fingerprint, path.parent)
        columns = {steps: "hd95_mm" if full else "dice" for steps, full in self.measured_steps(name).items()}
        return all(column in record.measured.get(steps, {}) for steps, column in columns.items())

    def records(self, folder: Path, case: str) -> Records:
        """The records of a pair that is done."""
        return {name: Record.read(record_path(folder, case, name)) for name in self.runs}

    def rows(self, case: str, records: Records) -> list[tables.Row]:
        """A row for every setting of a pair that is done."""
        rows = []
        for setting in self.settings:
            record = records[self.first if setting.method == DIRECT else setting.run]
            count = len(record.steps) if setting.refine_steps else setting.steps
            seconds = sum(step["seconds"] for step in record.steps[:count])
            rows.append({"case": case, "group": str(setting)} | record.measured[count] | {"seconds": seconds})
        return rows

    def write_results(self, cases: Sequence[str], failed: Sequence[dict[str, str]], folder: Path) -> None:
        """Write results.json, results.csv, table.txt and curves.png into `folder`.

        `cases` are the pairs that are done; `failed` the others, with the keys case, group, message and kind.
        """
        if not cases:
            return
        found = {case: self.records(folder, case) for case in cases}
        rows = [row for case, records in found.items() for row in self.rows(case, records)]
        comparisons = self.comparisons(rows)
        report = tables.report(rows, failed, comparisons)
        # All records of a pair have the same fingerprint.
        settings = {case: records[self.first].fingerprint["settings"] for case, records in found.items()}
        tables.write_json(report | {"settings": settings}, folder / "results.json")
        tables.write_csv(rows, folder / "results.csv")
        text = tables.summary_table(rows)
        if comparisons:
            text += f"\n\n{tables.comparison_table(comparisons)}"
        with atomic_path(folder / TABLE) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
        if panels := self.panels(list(found.values())):
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
        pairs += [(replace(setting, refine_steps=0), setting) for setting in self.settings if setting.refine_steps]
        return tables.compare_groups(rows, [(str(one), str(other)) for one, other in pairs if one in self.settings])

    def panels(self, found: Sequence[Records]) -> list[curves.Panel]:
        """Dice, NDV, cosine and share of conflicts over the steps, from the records of several pairs.

        Settings with refinement have no curves, as they are only measured at their end.
        """
        drawn: dict[str, list[curves.Curve]] = {"dice": [], "ndv_percent": [], "cosine": [], "conflicts": []}
        for method, setting in self.runs.items():
            if method == DIRECT or setting.refine_steps:
                continue
            steps = sorted({0, *self.measured_steps(method)})
            measured = [records[method].measured | {0: records[self.first].measured[0]} for records in found]
            for key in ("dice", "ndv_percent"):
                values = [[rows[step][key] for step in steps] for rows in measured]
                drawn[key].append(curves.Curve(method, steps, values))
            if method == "projected":
                taken = range(setting.steps)
                cosines = [[records[method].steps[step]["cosine"] for step in taken] for records in found]
                shares = np.cumsum(np.array(cosines) < 0, axis=1) / np.arange(1, len(taken) + 1)
                drawn["cosine"].append(curves.Curve(method, taken, cosines))
                drawn["conflicts"].append(curves.Curve(method, taken, shares.tolist()))
        panels = [
            curves.Panel("Overlap of the structures", "mean Dice", drawn["dice"]),
            curves.Panel("Non-diffeomorphic volume", "NDV [%]", drawn["ndv_percent"]),
            curves.Panel("Angle between the two gradients", "cosine", drawn["cosine"], 0.0),
            curves.Panel("Conflicts", "share of the steps so far", drawn["conflicts"]),
        ]
        return [panel for panel in panels if panel.curves]


def record_path(folder: Path, case: str, name: str) -> Path:
    """Where a record of a pair is kept: that of a method, or that of a setting with refinement ("projected:50+60")."""
    # Windows allows no colon in the name of a file.
    return folder / case / f"{name.replace(':', '_')}.json"
