"""What one registration reached, in the line that the panel shows, and in words that the terminal shares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def summary_line(report: Mapping[str, Any], tr: Callable[[str], str] = str) -> str:
    """One line about a registration, from its report (see Docs/metrics.md); what is missing there is left out.

    It tells the similarity loss before and after (less is better, and a result that is worse says so), the folding,
    what guided it, how much of the images overlaps, what the refinement started from, how long it took and with which
    model. `tr` translates its sentences.
    """
    _ = tr
    parts = []
    if "similarity_before" in report:
        text = _("similarity loss {similarity_before:z.4f} → {similarity:z.4f}").format(**report)
        parts.append(text + _(", worse than before") if is_worse(report) else text)
    parts += [_folding(report.get("jacobian", {}), _), guidance(report, _)]
    if report.get("overlap") is not None:
        parts.append(_("{percent:.0f} % of the images overlap").format(percent=100 * report["overlap"]))
    if report.get("levels") and (start := beginning(report, _)):
        parts.append(_("refined from {start}").format(start=start))
    if "seconds" in report:
        parts.append(duration(report["seconds"]))
    name = report.get("model", {}).get("name")
    if name is not None:
        parts.append(_("without a network") if name == "none" else _("model {name}").format(name=name))
    return " · ".join(filter(None, parts))


def beginning(report: Mapping[str, Any], tr: Callable[[str], str] = str) -> str:
    """What the refinement began with, in words; empty where the report does not say it."""
    _ = tr
    starts = {"zero": _("no deformation"), "translation": _("a translation"), "network": _("the network's deformation")}
    return starts.get(report.get("start", ""), "")


def guidance(report: Mapping[str, Any], tr: Callable[[str], str] = str) -> str:
    """What guided a registration, and how far it followed; empty where nothing did."""
    _ = tr
    parts = []
    for key, before, after, text in (
        ("landmarks", "before_mm", "after_mm", _("{count} landmarks {before:.2f} → {after:.2f} mm")),
        ("labels", "dice_before", "dice_after", _("{count} labels Dice {before:.3f} → {after:.3f}")),
    ):
        if found := report.get(key):
            first, last = (sum(one[name] for one in found) / len(found) for name in (before, after))
            parts.append(text.format(count=len(found), before=first, after=last))
    return _("guided by {guides}").format(guides=", ".join(parts)) if parts else ""


def is_worse(report: Mapping[str, Any]) -> bool:
    """Whether the images match worse than before the deformable registration, as far as the digits shown tell."""
    return "similarity_before" in report and round(report["similarity"], 4) > round(report["similarity_before"], 4)


def _folding(figures: Mapping[str, float], _: Callable[[str], str]) -> str:
    if "folded_voxels" not in figures:
        return ""
    if figures["folded_voxels"]:
        text = _("folding: {folded_voxels:,} voxels ({folded_percent:.2g} %)").format(**figures)
        regions = figures.get("folded_regions")
        if regions is None:
            return text
        return text + (_(" in one region") if regions == 1 else _(" in {count} regions").format(count=regions))
    if figures.get("ndv_percent", 0) > 0:
        return _("folding only between voxels (NDV {ndv_percent:.2g} %)").format(**figures)
    return _("no folding")


def duration(seconds: float) -> str:
    """Seconds in short words: 40 s, 3 min, 2 h 5 min."""
    if seconds < 60:
        return f"{max(seconds, 0):.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
