"""The summary of a batch: a table and a page with pictures, the results most in need of a look first."""

from __future__ import annotations

import csv
import html
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from GradProjIOLib.batch.tasks import DONE, FAILED, KEPT, OPEN, Outcome
from GradProjIOLib.evaluation.cases import REPORT, read_report
from GradProjIOLib.geometry.files import atomic_path
from GradProjIOLib.report.thumbnail import THUMBNAIL

TABLE, PAGE = "summary.csv", "index.html"
FROM_REPORT: dict[str, Callable[[dict[str, Any]], Any]] = {
    "ndv_percent": lambda report: report["jacobian"]["ndv_percent"],
    "folded_voxels": lambda report: report["jacobian"]["folded_voxels"],
    "folded_percent": lambda report: report["jacobian"]["folded_percent"],
    "determinant_min": lambda report: report["jacobian"]["min"],
    "determinant_max": lambda report: report["jacobian"]["max"],
    "similarity": lambda report: report["similarity"],
    "regularity": lambda report: report["regularity"],
    "steps": lambda report: len(report["steps"]),
    "model": lambda report: report["model"]["name"],
    "method": lambda report: report["settings"]["method"],
    "device": lambda report: report["device"]["name"],
    "seconds": lambda report: round(report["seconds"], 3),
    "peak_memory_bytes": lambda report: report["peak_memory_bytes"],
    "fixed": lambda report: report["inputs"]["fixed"]["path"],
    "moving": lambda report: report["inputs"]["moving"]["path"],
    "message": lambda report: " ".join(report["warnings"]),
}
COLUMNS = ("case", "state", *FROM_REPORT)
"""The columns of the table. The message of a pair that failed is the reason."""
SHOWN = {
    "ndv_percent": "NDV [%]",
    "folded_voxels": "folded voxels",
    "determinant_min": "smallest determinant",
    "similarity": "similarity loss",
    "regularity": "regularity loss",
    "steps": "steps",
    "seconds": "seconds",
}
"""The columns of the page, and their titles there."""
STYLE = """
body { font: 15px/1.4 system-ui, sans-serif; margin: 2em; color: #222; background: #fff }
table { border-collapse: collapse } th, td { padding: .35em .7em; text-align: left; vertical-align: middle }
th { position: sticky; top: 0; background: #eee } tr { border-bottom: 1px solid #ddd }
td.number { text-align: right; font-variant-numeric: tabular-nums }
tr.failed { background: #fdecea } tr.folded td.fold { font-weight: bold; color: #b3261e }
img { height: 96px; display: block; background: #000 } small { color: #666 }
"""


def _row(outcome: Outcome, folder: Path) -> dict[str, Any]:
    """The columns of a pair."""
    row = dict.fromkeys(COLUMNS, "") | {"case": outcome.case, "state": outcome.state, "message": outcome.message}
    report = read_report(folder / outcome.case) if outcome.state in (DONE, KEPT) else {}
    return row | {name: value(report) for name, value in FROM_REPORT.items() if report}


def _badness(row: dict[str, Any]) -> tuple[Any, ...]:
    order = {FAILED: 0, DONE: 1, KEPT: 1, OPEN: 2}[row["state"]]
    numbers = [row[key] for key in ("ndv_percent", "folded_voxels", "similarity")]
    return order, *(-number if isinstance(number, (int, float)) else math.inf for number in numbers), row["case"]


def write(outcomes: Sequence[Outcome], folder: Path) -> None:
    """Write the table and the page into ``folder``, each whole or not at all. Raises WriteError.

    First come the failed pairs, the others by folding, then by similarity.
    """
    found = sorted((_row(outcome, folder) for outcome in outcomes), key=_badness)
    with atomic_path(folder / TABLE) as path, open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(found)
    with atomic_path(folder / PAGE) as path:
        path.write_text(page(found), encoding="utf-8")


def page(found: Sequence[dict[str, Any]]) -> str:
    """The page for the rows of a batch; its pictures lie in the folders of the pairs."""
    counts = Counter(row["state"] for row in found)
    ready = counts[DONE] + counts[KEPT]
    still = f", {counts[OPEN]} not done yet" if counts[OPEN] else ""
    head = "".join(f"<th>{title}</th>" for title in ("pair", "fixed, warped, Jacobian", *SHOWN.values(), "note"))
    lines = "\n".join(_line(row) for row in found)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Registered pairs</title><style>{STYLE}</style></head><body>
<h1>{ready} pairs registered, {counts[FAILED]} failed{still}</h1>
<p>Failed pairs come first, then the most folding, then the worst similarity. The pictures are axial slices through
the worst fold, or the middle: the fixed image, the warped moving image, and the Jacobian determinant (blue shrinks,
orange grows, yellow is folded). A picture leads to the whole overview.</p>
<table><thead><tr>{head}</tr></thead><tbody>
{lines}
</tbody></table></body></html>
"""


def _line(row: dict[str, Any]) -> str:
    case, link = html.escape(row["case"]), quote(row["case"])
    cells = "".join(
        f'<td class="number{" fold" if key in ("ndv_percent", "folded_voxels") else ""}">{_text(row[key])}</td>'
        for key in SHOWN
    )
    picture = ""
    if row["model"]:
        picture = f'<a href="{link}/overview.png"><img src="{link}/{THUMBNAIL}" alt="{case}" loading="lazy"></a>'
        case = f'<a href="{link}/{REPORT}">{case}</a><br><small>{html.escape(row["model"])}, {row["method"]}</small>'
    kind = "failed" if row["state"] == FAILED else "folded" if row["folded_voxels"] or row["ndv_percent"] else "good"
    note = html.escape(row["message"] or (row["state"] if row["state"] == OPEN else ""))
    return f'<tr class="{kind}"><td>{case}</td><td>{picture}</td>{cells}<td>{note}</td></tr>'


def _text(value: Any) -> str:
    if isinstance(value, float):
        return format(value, ".4g")
    return str(value) if isinstance(value, int) else ""
