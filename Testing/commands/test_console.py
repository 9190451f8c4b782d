"""What the command prints about a registration."""

from dataclasses import replace
from pathlib import Path

import pytest

import GradProjIOLib as gp
from GradProjIOLib.commands.console import print_summary
from GradProjIOLib.synthetic import phantom


@pytest.fixture(scope="module")
def result():
    """A refinement from zero."""
    heads = phantom.make_pair(0, (20, 22, 20), spacing=9, with_skull=False)
    return gp.register(heads.fixed, heads.moving, model="none", refine_steps=2, device="cpu")


def test_the_stages_the_losses_and_the_start_are_told(result, capsys):
    print_summary(result, Path("out"))
    first, losses, start, folding, *_ = capsys.readouterr().out.splitlines()
    report = result.report
    assert first.startswith(f"no network, projected, {len(report['steps'])} refinement steps on cpu in ")
    assert losses.startswith(f"similarity loss {report['similarity_before']:.4f} → {report['similarity']:.4f}, reg")
    k, j, i = report["levels"][-1]
    assert start.startswith("refinement from no deformation on ")
    assert start.endswith(f"{i}x{j}x{k} samples")
    assert folding.startswith("folded voxels 0 ")


def test_a_translation_is_told_as_the_beginning(result, capsys):
    print_summary(replace(result, report=result.report | {"start": "translation"}), Path("out"))
    assert "\nrefinement from a translation on " in capsys.readouterr().out


def test_a_loss_that_grew_is_called_worse(result, capsys):
    worse = {"similarity": result.report["similarity_before"] + 0.1}
    print_summary(replace(result, report=result.report | worse), Path("out"))
    assert "(worse than before)" in capsys.readouterr().out


@pytest.mark.parametrize(("before", "after"), [(0.0, 2e-5), (-2e-5, 0.0)])
def test_rounding_is_neither_worse_nor_negative(result, capsys, before, after):
    same = {"similarity_before": before, "similarity": after}
    print_summary(replace(result, report=result.report | same), Path("out"))
    assert "similarity loss 0.0000 → 0.0000, reg" in capsys.readouterr().out


def test_no_steps_are_told_as_such(result):
    assert ", no steps · " in replace(result, report=result.report | {"steps": []}).title()
