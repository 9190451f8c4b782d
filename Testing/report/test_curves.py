"""Curves over the steps as a picture."""

import math

import numpy as np

from GradProjIOLib.report import curves

STEPS = [0, 10, 20]


def make_panels():
    falling = curves.Curve("IO <50>", STEPS, [[0.8, 0.7, 0.6], [0.6, 0.5, 0.4]])
    gap = curves.Curve("IO-GP", STEPS, [[0.7, math.nan, 0.9]])
    return [curves.Panel("Dice & more", "mean", [falling, gap], 0.5), curves.Panel("Empty", "nothing", [])]


def test_picture(tmp_path):
    from PIL import Image

    curves.write_png(make_panels(), "title", tmp_path / "curves.png")
    pixels = np.asarray(Image.open(tmp_path / "curves.png").convert("RGB")).reshape(-1, 3)
    for color in curves.COLORS[:2]:
        wanted = [int(color[first : first + 2], 16) for first in (1, 3, 5)]
        assert (np.abs(pixels.astype(int) - wanted).max(axis=1) < 3).sum() > 100
