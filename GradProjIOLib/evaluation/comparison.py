"""The paper's Table 1 for a list of pairs with labels.

Settings that differ only in the number of steps share one optimisation, and all share the direct result. What
was computed is kept in the output folder, step by step, so that a comparison that was killed goes on where it
stopped, and one that gets more pairs or settings computes only what is missing.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from GradProjIOLib.engine.optimization import Step
from GradProjIOLib.errors import InputError
from GradProjIOLib.evaluation import metrics, tables
from GradProjIOLib.evaluation.cases import folding_row, label_row
from GradProjIOLib.geometry.files import atomic_path
from GradProjIOLib.geometry.image_files import read_labels, read_volume
from GradProjIOLib.geometry.tables import read_table
from GradProjIOLib.geometry.volume import Volume
from GradProjIOLib.models.weights import checksum
from GradProjIOLib.registration.register import OnStart, OnStep, Running, register
from GradProjIOLib.report import curves
from GradProjIOLib.settings import Settings
from GradProjIOLib.spatial.deformation import Deformation

PAPER = "direct,vanilla:50,projected:50,vanilla:100,projected:100"
DIRECT = "direct"
SECONDS_BETWEEN_STATES = 60.0
REQUIRED = ("fixed", "moving", "fixed_labels", "moving_labels")
OPTIONAL = ("case", "fixed_mask", "moving_mask")

Say = Callable[[str], None]


@dataclass(frozen=True)
class Setting:
    """A method and after how many steps its result counts, written "vanilla:50" or "direct"."""

    method: str
    steps: int

    def __str__(self) -> str:
        return DIRECT if self.method == DIRECT else f"{self.method}:{self.steps}"

    @classmethod
    def parse(cls, text: str) -> Setting:
        """The setting that `text` names. Raises InputError."""
        method, _, steps = text.strip().partition(":")
        if method == DIRECT and not steps:
            return cls(DIRECT, 0)
        if method not in ("vanilla", "projected") or not steps.isdigit() or int(steps) == 0:
            raise InputError(f"The method {text!r} is not known; write direct, vanilla:STEPS or projected:STEPS.")
        return cls(method, int(steps))


def parse_settings(text: str) -> list[Setting]:
    """The settings in a comma-separated list, each once. Raises InputError."""
    settings = [Setting.parse(item) for item in text.split(",") if item.strip()]
    if not settings or len(set(settings)) < len(settings):
        raise InputError(f"The methods {text!r} name none, or one twice; write for example {PAPER}.")
    return settings


@dataclass(frozen=True)
class Pair:
    """The files of one case."""

    case: str
    fixed: Path
    moving: Path
    fixed_labels: Path
    moving_labels: Path
    fixed_mask: Path | None = None
    moving_mask: Path | None = None

    def files(self) -> dict[str, Path]:
        """All files of the case by their role."""
        return {role: path for role, path in vars(self).items() if isinstance(path, Path)}


def read_pairs(path: Path) -> list[Pair]:
    """The pairs in a table with the columns fixed, moving, fixed_labels, moving_labels and perhaps case and masks.

    Paths are relative to the table's folder. Raises InputError.
    """
    rows = read_table(path, {*REQUIRED, *OPTIONAL}, REQUIRED)
    pairs: dict[str, Pair] = {}
    for number, row in enumerate(rows, start=1):
        case = row.get("case") or str(number)
        if case in pairs or Path(case).name != case or case.startswith("."):
            raise InputError(f"{path} has the case {case!r} twice, or it cannot be a folder's name; rename it.")
        files = {role: path.parent / row[role] for role in (*REQUIRED, *OPTIONAL[1:]) if row.get(role)}
        pairs[case] = Pair(case, **files)
    return list(pairs.values())


@dataclass
class Record:
    """What is known of one method on one pair: its steps, and what was measured after how many of them."""

    steps: list[dict[str, Any]] = field(default_factory=list)
    measured: dict[int, tables.Row] = field(default_factory=dict)
    sources: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, sources: dict[str, Any]) -> Record:
        """The record at `path`, or an empty one. Raises InputError for one of other images or settings."""
        if not path.exists():
            return cls(sources=sources)
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["sources"] != sources:
            changed = sorted(key for key in sources if stored["sources"].get(key) != sources[key])
            raise InputError(
                f"{path.parent} holds results of other inputs or settings ({', '.join(changed)}); "
                "choose another output folder, or remove this one."
            )
        measured = {int(steps): tables.from_json(row) for steps, row in stored["measured"].items()}
        return cls(stored["steps"], measured, sources)

    def write(self, path: Path) -> None:
        """Store the record at `path`, whole or not at all."""
        tables.write_json(vars(self), path)


@dataclass(frozen=True)
class Comparison:
    """How pairs are compared: settings of the registration, methods and steps, every how many to measure."""

    settings: Settings
    settings_compared: Sequence[Setting]
    every: int = 10
    structures: Sequence[int] | None = None

    def last_step(self, method: str) -> int:
        """How many steps of `method` are needed."""
        return max((setting.steps for setting in self.settings_compared if setting.method == method), default=0)

    def measured_steps(self, method: str) -> list[int]:
        """After how many steps of `method` to measure: those of its settings, and those between for the curves."""
        last = self.last_step(method)
        asked = {setting.steps for setting in self.settings_compared if setting.method == method}
        return sorted(asked | set(range(self.every, last + 1, self.every)) - {0})

    def methods_with_steps(self) -> list[str]:
        """The methods that take steps, in the order of the settings."""
        methods = dict.fromkeys(setting.method for setting in self.settings_compared)
        return [method for method in methods if method != DIRECT]


class Case:
    """One pair under comparison: its images in memory and its records in a folder."""

    def __init__(self, pair: Pair, comparison: Comparison, folder: Path, say: Say) -> None:
        self.pair, self.comparison, self.folder, self.say = pair, comparison, folder / pair.case, say
        self.folder.mkdir(parents=True, exist_ok=True)
        shared = asdict(replace(comparison.settings, method=DIRECT, steps=0))
        files = {role: checksum(path) for role, path in pair.files().items() if path.exists()}
        self.sources = json.loads(json.dumps(shared | {"structures": comparison.structures} | files))

    @cached_property
    def images(self) -> dict[str, Volume]:
        """Images, labels and masks by their role. Raises InputError where one cannot be read."""
        return {
            role: (read_volume if role in ("fixed", "moving") else read_labels)(path)
            for role, path in self.pair.files().items()
        }

    def rows(self) -> list[tables.Row]:
        """A row for every setting, computed as far as it is not there yet."""
        records = {method: self.follow(method) for method in self.comparison.methods_with_steps()}
        records[DIRECT] = self.direct()
        rows = []
        for setting in self.comparison.settings_compared:
            record = records[setting.method]
            seconds = sum(step["seconds"] for step in record.steps[: setting.steps])
            row = {"case": self.pair.case, "group": str(setting)}
            rows.append(row | record.measured[setting.steps] | {"seconds": seconds})
        return rows

    def direct(self, running: Running | None = None) -> Record:
        """The result without optimisation, of an optimisation that is at its start or of one of its own."""
        path = self.folder / f"{DIRECT}.json"
        record = Record.read(path, self.sources)
        if self.is_measured(record, Setting(DIRECT, 0)):
            return record
        if running is None:
            self.register(DIRECT, 0, self.direct)
            return Record.read(path, self.sources)
        record.measured[0] = self.measure(running, Setting(DIRECT, 0))
        record.write(path)
        return record

    def follow(self, method: str) -> Record:
        """The steps of `method` and what was measured on the way, taken up where they were left."""
        trajectory = Trajectory(self, method)
        if trajectory.missing():
            steps = self.comparison.last_step(method)
            self.register(method, steps, trajectory.start, trajectory.step)
        trajectory.state_path.unlink(missing_ok=True)
        return trajectory.record

    def register(self, method: str, steps: int, on_start: OnStart, on_step: OnStep | None = None) -> None:
        """Register the pair; what is wanted of it is measured on the way."""
        settings = replace(self.comparison.settings, method=method, steps=steps)
        masks = {role: self.images.get(role) for role in ("fixed_mask", "moving_mask")}
        register(self.images["fixed"], self.images["moving"], settings, **masks, on_start=on_start, on_step=on_step)

    def is_measured(self, record: Record, setting: Setting) -> bool:
        """Whether `record` has what is asked of `setting`: distances, too, if its row is in the table."""
        row = record.measured.get(setting.steps)
        return row is not None and (setting not in self.comparison.settings_compared or "hd95_mm" in row)

    def measure(self, running: Running, setting: Setting) -> tables.Row:
        """Overlap and folding of the deformation that was reached; see `is_measured`."""
        deformation = running.forward()
        fixed, labels = self.images["fixed"], (self.images["fixed_labels"], self.images["moving_labels"])
        structures = self.comparison.structures
        if setting in self.comparison.settings_compared:
            row = label_row(metrics.evaluate_labels(deformation, *labels, structures))
        else:
            row = {"dice": mean_dice(deformation, *labels, structures)}
        return row | folding_row(*metrics.evaluate_folding(deformation, fixed))


class Trajectory:
    """One method on one pair: a reader of its steps that measures, and stores how to go on."""

    def __init__(self, case: Case, method: str) -> None:
        self.case, self.method = case, method
        self.path, self.state_path = case.folder / f"{method}.json", case.folder / f"{method}.state"
        self.record = Record.read(self.path, case.sources)
        self.wanted = case.comparison.measured_steps(method)
        self.stored = time.monotonic()
        self.running: Running | None = None

    def missing(self) -> list[int]:
        """The steps after which something is still to be measured."""
        return [steps for steps in self.wanted if not self.case.is_measured(self.record, Setting(self.method, steps))]

    def start(self, running: Running) -> None:
        """Go on from the stored state, or from the beginning."""
        self.running = running
        taken = self._restore(running)
        del self.record.steps[taken:]
        self.record.measured = {steps: row for steps, row in self.record.measured.items() if steps <= taken}
        if taken:
            self.case.say(f"{self.case.pair.case}: {self.method} goes on after step {taken}")
        else:
            self.case.direct(running)

    def step(self, step: Step) -> None:
        """Note the step; measure and store where it is time to."""
        self.record.steps.append(asdict(step))
        taken = step.index + 1
        if taken in self.wanted:
            row = self.case.measure(self.running, Setting(self.method, taken))
            self.record.measured[taken] = row
            last = self.case.comparison.last_step(self.method)
            self.case.say(f"{self.case.pair.case}: {self.method}, step {taken} of {last}, Dice {row['dice']:.4f}, "
                          f"NDV {row['ndv_percent']:.3g} %, {step.seconds:.1f} s per step")  # fmt: skip
        if taken in self.wanted or time.monotonic() - self.stored > SECONDS_BETWEEN_STATES:
            self._store()

    def _store(self) -> None:
        """The record first: if it is ahead of the state after a crash, `start` forgets the surplus."""
        self.record.write(self.path)
        with atomic_path(self.state_path) as temporary:
            torch.save(self.running.optimizer.state(), temporary)
        self.stored = time.monotonic()

    def _restore(self, running: Running) -> int:
        """Put the stored state into the optimizer; returns how many steps are behind it, 0 if it is of no use."""
        if not self.state_path.exists():
            return 0
        state = torch.load(self.state_path, weights_only=True, map_location="cpu")
        if state["taken"] >= self.missing()[0] or state["taken"] > len(self.record.steps):
            return 0
        running.optimizer.restore(state)
        return state["taken"]


def mean_dice(deformation: Deformation, fixed: Volume, moving: Volume, structures: Sequence[int] | None) -> float:
    """Mean Dice over the structures that are in both label maps, as in `metrics.evaluate_labels`."""
    warped = deformation.warp(moving, fixed, "nearest").array
    shared = np.intersect1d(fixed.array, moving.array)
    wanted = shared[shared != 0] if structures is None else np.intersect1d(shared, structures)
    found = metrics.dice_of(fixed.array, warped, wanted.tolist())
    return float(np.mean(found)) if found else np.nan


def compare(
    pairs: Sequence[Pair], comparison: Comparison, folder: Path, say: Say = print
) -> tuple[list[tables.Row], list[dict[str, str]]]:
    """Rows of all pairs under all settings, and the pairs that failed; a broken pair does not stop the others.

    Tables and curves in `folder` are brought up to date after every pair.
    """
    rows: list[tables.Row] = []
    failed: list[dict[str, str]] = []
    for number, pair in enumerate(pairs, start=1):
        say(f"{pair.case}: pair {number} of {len(pairs)}")
        try:
            rows += Case(pair, comparison, folder, say).rows()
        except Exception as error:
            # Whatever went wrong with this pair need not go wrong with the next.
            expected = isinstance(error, InputError)
            failed.append(
                {
                    "case": pair.case,
                    "group": "",
                    "message": str(error) or type(error).__name__,
                    "kind": "input" if expected else "internal",
                }
            )
            say(f"{pair.case}: {error}" if expected else traceback.format_exc())
        write_results(rows, failed, pairs, comparison, folder)
    return rows, failed


def comparisons_of(rows: Sequence[tables.Row], methods: Sequence[Setting]) -> list[tables.GroupComparison]:
    """Every setting against the direct result, and projected against vanilla after the same number of steps."""
    pairs = [(DIRECT, str(setting)) for setting in methods if setting.method != DIRECT]
    pairs = pairs if Setting(DIRECT, 0) in methods else []
    pairs += [
        (str(Setting("vanilla", setting.steps)), str(setting))
        for setting in methods
        if setting.method == "projected" and Setting("vanilla", setting.steps) in methods
    ]
    return tables.compare_groups(rows, pairs)


def write_results(
    rows: Sequence[tables.Row],
    failed: Sequence[dict[str, str]],
    pairs: Sequence[Pair],
    comparison: Comparison,
    folder: Path,
) -> None:
    """Write results.json, results.csv, table.txt and curves.png into `folder`."""
    if not rows:
        return
    report = tables.report(rows, failed, comparisons_of(rows, comparison.settings_compared))
    tables.write_json(report | {"settings": asdict(comparison.settings)}, folder / "results.json")
    tables.write_csv(rows, folder / "results.csv")
    text = results_text(rows, comparison.settings_compared)
    with atomic_path(folder / "table.txt") as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    finished = [pair.case for pair in pairs if any(row["case"] == pair.case for row in rows)]
    panels = read_panels(finished, comparison, folder)
    if not panels:
        return
    title = f"{comparison.settings.model}, {len(finished)} pair" + "s" * (len(finished) != 1)
    curves.write_png(panels, title, folder / "curves.png")


def results_text(rows: Sequence[tables.Row], methods: Sequence[Setting]) -> str:
    """The paper's Table 1 with what it leaves out, and the comparisons, as text."""
    groups = [str(setting) for setting in methods if str(setting) in tables.groups_of(rows)]
    text = tables.summary_table(rows, groups)
    comparisons = comparisons_of(rows, methods)
    return f"{text}\n\n{tables.comparison_table(comparisons)}" if comparisons else text


def read_panels(cases: Sequence[str], comparison: Comparison, folder: Path) -> list[curves.Panel]:
    """Dice, NDV, cosine and share of conflicts over the steps, from the records of the finished `cases`."""
    direct = _records(cases, DIRECT, folder)
    panels = {"dice": [], "ndv_percent": [], "cosine": [], "conflicts": []}
    for method in comparison.methods_with_steps():
        records = _records(cases, method, folder)
        steps = [0, *comparison.measured_steps(method)]
        for key in ("dice", "ndv_percent"):
            values = {
                case: [(direct[case] if step == 0 else records[case])["measured"][str(step)][key] for step in steps]
                for case in cases
            }
            panels[key].append(_curve(method, steps, values))
        if method == "projected":
            last = range(comparison.last_step(method))
            cosines = {case: [record["steps"][step]["cosine"] for step in last] for case, record in records.items()}
            shares = {
                case: np.cumsum(np.array(values) < 0) / np.arange(1, len(values) + 1)
                for case, values in cosines.items()
            }
            panels["cosine"].append(_curve(method, last, cosines))
            panels["conflicts"].append(_curve(method, last, shares))
    drawn = [
        curves.Panel("Overlap of the structures", "mean Dice", panels["dice"]),
        curves.Panel("Non-diffeomorphic volume", "NDV [%]", panels["ndv_percent"]),
        curves.Panel("Angle between the two gradients", "cosine", panels["cosine"], 0.0),
        curves.Panel("Conflicts", "share of the steps so far", panels["conflicts"]),
    ]
    return [panel for panel in drawn if panel.curves]


def _records(cases: Sequence[str], method: str, folder: Path) -> dict[str, dict[str, Any]]:
    return {case: json.loads((folder / case / f"{method}.json").read_text(encoding="utf-8")) for case in cases}


def _curve(name: str, x: Sequence[int], values: dict[str, Sequence[float]]) -> curves.Curve:
    known = {case: np.array(numbers, dtype=np.float64) for case, numbers in values.items()}
    return curves.Curve(name, list(x), np.mean(list(known.values()), axis=0), known)
