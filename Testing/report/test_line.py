"""The one line about a registration."""

import pytest

from GradProjIOLib.report.line import duration, summary_line

REPORT = {
    "similarity_before": 1.2,
    "similarity": 0.45678,
    "jacobian": {"folded_voxels": 0, "folded_percent": 0.0, "ndv_percent": 0.0},
    "start": "network",
    "levels": [[8, 8, 8]],
    "seconds": 72.0,
    "model": {"name": "compact"},
}


def test_the_line_says_what_was_reached() -> None:
    expected = "similarity loss 1.2000 → 0.4568 · no folding · refined from the network's deformation · 1 min"
    assert summary_line(REPORT) == f"{expected} · model compact"


def test_the_line_says_what_is_wrong() -> None:
    folded = {"folded_voxels": 12345, "folded_percent": 0.1234, "ndv_percent": 0.2}
    line = summary_line(REPORT | {"similarity": 1.3, "jacobian": folded, "overlap": 0.4})
    assert "1.2000 → 1.3000, worse than before" in line
    assert "folding: 12,345 voxels (0.12 %)" in line
    assert "(0.12 %) in 7 regions" in summary_line({"jacobian": folded | {"folded_regions": 7}})
    assert "40 % of the images overlap" in line


def test_folding_that_only_the_volume_shows_is_told() -> None:
    figures = {"folded_voxels": 0, "folded_percent": 0.0, "ndv_percent": 0.034}
    assert "folding only between voxels (NDV 0.034 %)" in summary_line(REPORT | {"jacobian": figures})


def test_old_reports_and_other_models_have_a_line() -> None:
    assert summary_line({"model": {"name": "none"}, "start": "zero", "levels": []}) == "without a network"
    assert summary_line(REPORT, tr=lambda text: text.replace("no folding", "glatt")).count("glatt") == 1


@pytest.mark.parametrize(("seconds", "text"), [(0.2, "0 s"), (59, "59 s"), (61, "1 min"), (7500, "2 h 5 min")])
def test_durations_are_given_in_short_words(seconds, text) -> None:
    assert duration(seconds) == text
