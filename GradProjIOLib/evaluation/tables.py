"""Tables of measured cases: as text, CSV and JSON, with their statistics.

A row is a dictionary with "case", "group" (the method or setting; may be empty), some of the keys of METRICS,
and, where measured, the lists "structures" and "landmarks".
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from GradProjIOLib.errors import InputError
from GradProjIOLib.evaluation.statistics import PairedComparison, Summary, compare_paired, summarize
from GradProjIOLib.geometry.files import atomic_path, json_text, jsonable

Row = dict[str, Any]


@dataclass(frozen=True)
class Metric:
    """A column: its key in a row, its title, how a value is written, and whether groups are compared by it."""

    key: str
    title: str
    form: str
    compared: bool = True

    def text(self, value: float | None) -> str:
        """`value` as it stands in a table; "–" where it was not measured."""
        return "–" if value is None or math.isnan(value) else format(value, self.form)


METRICS = (
    Metric("dice", "Dice", ".4f"),
    Metric("dice_before", "Dice before", ".4f", compared=False),
    Metric("hd95_mm", "HD95 [mm]", ".3f"),
    Metric("tre_mm", "TRE [mm]", ".3f"),
    Metric("tre_before_mm", "TRE before", ".3f", compared=False),
    Metric("ndv_percent", "NDV [%]", ".3g"),
    Metric("folded_voxels", "folded voxels", ".6g"),
    Metric("std_log_jacobian", "SD log|J|", ".4f"),
    Metric("ndv_percent_in_mask", "NDV in mask [%]", ".3g"),
    Metric("folded_voxels_in_mask", "folded in mask", ".6g"),
    Metric("std_log_jacobian_in_mask", "SD log|J| in mask", ".4f"),
    Metric("seconds", "seconds", ".1f", compared=False),
)


def measured_metrics(rows: Sequence[Row]) -> list[Metric]:
    """The metrics that at least one row has."""
    return [metric for metric in METRICS if any(metric.key in row for row in rows)]


def groups_of(rows: Iterable[Row]) -> list[str]:
    """The groups of `rows` in the order in which they first occur."""
    return list(dict.fromkeys(row["group"] for row in rows))


def summaries(rows: Sequence[Row], columns: Iterable[str]) -> dict[str, dict[str, Summary]]:
    """Mean and standard deviation of some columns over the cases: {group: {column: Summary}}."""
    return {
        group: {
            column: summarize([row[column] for row in rows if row["group"] == group and column in row])
            for column in columns
        }
        for group in groups_of(rows)
    }


@dataclass(frozen=True)
class GroupComparison:
    """One metric of the group `other` against `reference`, over the cases that both have."""

    metric: str
    reference: str
    other: str
    result: PairedComparison


def compare_groups(rows: Sequence[Row], pairs: Iterable[tuple[str, str]]) -> list[GroupComparison]:
    """Compare pairs (reference, other) of groups by each metric that at least one row has."""
    metrics = [metric for metric in measured_metrics(rows) if metric.compared]
    found = []
    for reference, other in pairs:
        for metric in metrics:
            first, second = (
                {row["case"]: row[metric.key] for row in rows if row["group"] == group and metric.key in row}
                for group in (reference, other)
            )
            cases = [case for case in first if case in second]
            if cases:
                result = compare_paired([first[case] for case in cases], [second[case] for case in cases])
                found.append(GroupComparison(metric.key, reference, other, result))
    return found


def case_table(rows: Sequence[Row]) -> str:
    """Every case and, below each group of several cases, its mean ± standard deviation, as text."""
    metrics = measured_metrics(rows)
    lines = []
    for group, found in summaries(rows, [metric.key for metric in metrics]).items():
        members = [row for row in rows if row["group"] == group]
        lines += [[row["case"], group, *(metric.text(row.get(metric.key)) for metric in metrics)] for row in members]
        if len(members) > 1:
            lines.append(["mean ± SD", group, *(_mean_text(metric, found[metric.key]) for metric in metrics)])
    return text_table(["case", "group", *(metric.title for metric in metrics)], lines)


def summary_table(rows: Sequence[Row]) -> str:
    """One line for each group, mean ± standard deviation, as text."""
    metrics = measured_metrics(rows)
    lines = []
    for group, found in summaries(rows, [metric.key for metric in metrics]).items():
        count = max((summary.count for summary in found.values()), default=0)
        lines.append([group, str(count), *(_mean_text(metric, found[metric.key]) for metric in metrics)])
    return text_table(["setting", "cases", *(metric.title for metric in metrics)], lines)


def comparison_table(comparisons: Sequence[GroupComparison]) -> str:
    """Mean difference with its 95 % confidence interval and Wilcoxon's p, one line each, as text."""
    titles = {metric.key: metric.title for metric in METRICS}
    lines = []
    for comparison in comparisons:
        result = comparison.result
        compared = [titles[comparison.metric], comparison.other, comparison.reference, str(result.count)]
        interval = "–" if math.isnan(result.low) else f"{result.low:.3g} … {result.high:.3g}"
        p_value = "–" if math.isnan(result.p_value) else f"{result.p_value:.3g}"
        lines.append([*compared, f"{result.mean_difference:+.3g}", interval, p_value])
    return text_table(["metric", "setting", "minus", "cases", "difference", "95 % interval", "p (Wilcoxon)"], lines)


def text_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Columns padded to equal width; a column that is empty in every line is left out."""
    kept = [column for column in range(len(header)) if any(line[column] for line in lines)] or range(len(header))
    table = [[line[column] for column in kept] for line in (header, *lines)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    padded = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table]
    return "\n".join([padded[0], "  ".join("-" * width for width in widths), *padded[1:]])


def write_csv(rows: Sequence[Row], path: str | os.PathLike) -> None:
    """Every case with every structure, then mean and standard deviation of each group; whole or nothing."""
    flat = [_flat(row) for row in rows]
    columns = list(dict.fromkeys(key for row in flat for key in row))
    numbers = [column for column in columns if any(isinstance(row.get(column), (int, float)) for row in flat)]
    means = []
    for group, found in summaries(flat, numbers).items():
        for title, figure in (("mean", "mean"), ("standard deviation", "standard_deviation")):
            values = {column: getattr(summary, figure) for column, summary in found.items()}
            means.append({"case": title, "group": group, **values})
    with atomic_path(Path(path)) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        # NaN becomes None, which is an empty cell.
        writer.writerows(jsonable(flat + means))


def write_json(data: Any, path: str | os.PathLike) -> None:
    """`data` as standard JSON, whole or not at all; NaN becomes null and infinity the text "inf"."""
    with atomic_path(Path(path)) as temporary:
        temporary.write_text(json_text(data, indent=2) + "\n", encoding="utf-8")


def check_fingerprint(stored: dict[str, Any], wanted: dict[str, Any], path: Path) -> None:
    """Raise InputError where results at `path` depend on other files or settings than those that are wanted."""
    first, second = (found["settings"] | found["files"] | found for found in (stored, wanted))
    names = (first.keys() | second.keys()) - {"settings", "files"}
    changed = sorted(name for name in names if first.get(name) != second.get(name))
    if changed:
        raise InputError(
            f"{path} holds results of other inputs or settings ({', '.join(changed)}); "
            "choose another output folder, or remove this one."
        )


def report(rows: Sequence[Row], failed: Sequence[dict[str, str]], comparisons: Sequence[GroupComparison]) -> Row:
    """Everything about a cohort: cases, means, comparisons, and the cases that could not be measured."""
    return {
        "cases": list(rows),
        "summary": summaries(rows, [metric.key for metric in measured_metrics(rows)]),
        "comparisons": list(comparisons),
        "failed": list(failed),
    }


def from_json(value: Any) -> Any:
    """What `files.jsonable` was given: None becomes NaN and "inf" infinity."""
    if isinstance(value, dict):
        return {key: from_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [from_json(item) for item in value]
    if value is None or value in ("inf", "-inf"):
        return float(value or "nan")
    return value


def _mean_text(metric: Metric, found: Summary) -> str:
    if not found.count:
        return "–"
    spread = "" if math.isnan(found.standard_deviation) else f" ± {metric.text(found.standard_deviation)}"
    return metric.text(found.mean) + spread


def _flat(row: Row) -> Row:
    """The row with one column for every structure and landmark."""
    flat = {key: value for key, value in row.items() if not isinstance(value, list)}
    for structure in row.get("structures", []):
        flat[f"dice_{structure['structure']}"] = structure["dice"]
        flat[f"hd95_mm_{structure['structure']}"] = structure["hd95_mm"]
    for landmark in row.get("landmarks", []):
        flat[f"tre_mm_{landmark['name']}"] = landmark["after_mm"]
    return flat
