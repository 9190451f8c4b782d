"""Reports of every kind of registration are as Docs/report.schema.json describes them."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from GradProjIOLib.geometry.files import json_text
from GradProjIOLib.geometry.volume import Volume
from GradProjIOLib.registration.register import register
from GradProjIOLib.registration.result import Registration
from GradProjIOLib.synthetic.phantom import make_pair

SCHEMA = json.loads((Path(__file__).parents[2] / "Docs" / "report.schema.json").read_text(encoding="utf-8"))
PLAIN = {"model": "none", "refine_steps": 1, "device": "cpu"}


@pytest.fixture(scope="module")
def pair():
    return make_pair(0, (20, 24, 20), 8.0)


def whole_mask(volume: Volume) -> Volume:
    return Volume(np.ones(volume.shape, np.uint8), volume.affine, "mask")


KINDS = {
    "refined": lambda pair: PLAIN,
    "vanilla": lambda pair: PLAIN | {"method": "vanilla"},
    "direct": lambda pair: {"model": "compact", "method": "direct", "device": "cpu"},
    "paper": lambda pair: {"model": "compact", "preset": "paper", "steps": 1, "device": "cpu"},
    "landmarks": lambda pair: PLAIN | {"fixed_points": [[0.0, 0, 0]], "moving_points": [[0.0, 0, 1]]},
    "labels": lambda pair: PLAIN | {"fixed_labels": pair.fixed_labels, "moving_labels": pair.moving_labels},
    "masks": lambda pair: PLAIN | {f"{role}_mask": whole_mask(getattr(pair, role)) for role in ("fixed", "moving")},
    "stopped": lambda pair: PLAIN | {"on_step": lambda step: False},
}


def check(result: Registration) -> dict:
    report = json.loads(json_text(result.report))
    jsonschema.validate(report, SCHEMA, format_checker=jsonschema.FormatChecker())
    return report


@pytest.mark.parametrize("kind", KINDS)
def test_a_report_is_as_described(pair, kind):
    check(register(pair.fixed, pair.moving, **KINDS[kind](pair)))


def test_a_continued_report_is_as_described(pair):
    report = check(register(pair.fixed, pair.moving, **PLAIN).go_on(steps=1))
    assert report["continued_after"]


def test_every_field_is_described(pair):
    """What the description does not know is refused, wherever it is."""
    report = json.loads(json_text(register(pair.fixed, pair.moving, **PLAIN).report))
    for place in (report, report["steps"][0], report["inputs"]["fixed"], report["jacobian"]):
        place["unknown"] = 1
        with pytest.raises(jsonschema.ValidationError, match="unknown"):
            jsonschema.validate(report, SCHEMA)
        del place["unknown"]
    jsonschema.validate(report, SCHEMA)
