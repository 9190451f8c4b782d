"""Curves over the steps as a picture and as a page."""

import html
import json
import math
import re
import subprocess
from shutil import which
from xml.etree import ElementTree

import numpy as np
import pytest

from GradProjIOLib import curves

STEPS = [0, 10, 20]


def make_panels():
    falling = curves.Curve("IO <50>", STEPS, [0.7, 0.6, 0.5], {"a": [0.8, 0.7, 0.6], "b": [0.6, 0.5, 0.4]})
    gap = curves.Curve("IO-GP", STEPS, [0.7, math.nan, 0.9], {"a": [0.7, math.nan, 0.9]})
    return [curves.Panel("Dice & more", "mean", [falling, gap], 0.5), curves.Panel("Empty", "nothing", [])]


@pytest.fixture
def page(tmp_path):
    curves.write_html(make_panels(), "A </script> title", tmp_path / "curves.html", "case  <Dice>\na     0.5")
    return (tmp_path / "curves.html").read_text(encoding="utf-8")


def drawings(page: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]


def test_page_is_complete_in_itself(page):
    """No address is loaded, every text is escaped, the numbers are there for the script."""
    assert not re.search(r"https?://|<link|\bsrc=", page)
    assert "A &lt;/script&gt; title" in page
    assert "&lt;Dice&gt;" in page
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL).group(1))
    assert data[0]["curves"][0] == {"name": "IO <50>", "x": [0, 10, 20], "mean": [0.7, 0.6, 0.5]}
    assert data[0]["curves"][1]["mean"] == [0.7, None, 0.9]
    assert html.unescape(re.search(r'<input[^>]*data-method="([^"]*)"', page).group(1)) == "IO <50>"


def test_curves_are_where_their_values_are(page):
    """Equal steps are equally far apart, a fall goes down the page, and a gap interrupts the line."""
    first = drawings(page)[0]
    groups = {group.get("data-method"): group for group in first.findall("g")}
    mean = next(path for path in groups["IO <50>"] if path.get("class") == "mean").get("d")
    points = np.array([[float(number) for number in pair.split()] for pair in re.split("[ML]", mean)[1:]])
    np.testing.assert_allclose(
        np.diff(points[:, 0]), (curves.WIDTH - curves.LEFT - curves.RIGHT) / 2, atol=0.11
    )
    assert (np.diff(points[:, 1]) > 0).all()
    level = float(next(line for line in first.findall("line") if line.get("class") == "level").get("y1"))
    assert level == pytest.approx(points[2, 1], abs=0.11)
    assert len(list(groups["IO <50>"])) == 3
    (only,) = groups["IO-GP"]
    assert only.get("d").count("M") == 2
    assert "L" not in only.get("d")


def test_page_script_shows_values(page, tmp_path):
    """The page's script in Node with the few browser objects it uses: moving and hiding work."""
    node = which("node")
    if node is None:
        pytest.skip("Node is not installed")
    script = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)[0]
    data = re.search(r'id="data">(.*?)</script>', page, re.DOTALL).group(1)
    harness = f"""
    const listeners = {{}}, caption = {{textContent: ""}};
    const pointer = {{setAttribute: (k, v) => pointer[k] = v}};
    const box = {{dataset: {{method: "IO <50>"}}, checked: false, addEventListener: (k, f) => box[k] = f}};
    const group = {{dataset: {{method: "IO <50>"}}, style: {{}}}};
    const svg = {{dataset: {{left: "0", right: "20"}}, parentNode: {{querySelector: () => caption}},
      querySelector: () => pointer, addEventListener: (k, f) => listeners[k] = f,
      getBoundingClientRect: () => ({{left: 0, width: {curves.WIDTH}}})}};
    const document = {{getElementById: () => ({{textContent: {json.dumps(data)}}}),
      querySelectorAll: s => s.startsWith("input") ? [box] : s.startsWith("g") ? [group] : [svg]}};
    {script}
    listeners.mousemove({{clientX: {curves.WIDTH - curves.RIGHT}}});
    console.log(caption.textContent, "|", pointer.x1);
    box.change();
    listeners.mousemove({{clientX: {curves.LEFT}}});
    console.log(caption.textContent, "|", pointer.x1, "|", group.style.display);
    listeners.mouseleave();
    console.log(pointer.x1);
    """
    (tmp_path / "page.js").write_text(harness)
    done = subprocess.run(
        [node, tmp_path / "page.js"], capture_output=True, text=True, timeout=30, check=True
    )
    moved, hidden, left = done.stdout.splitlines()
    assert moved == f"IO <50> (step 20): 0.50000   IO-GP (step 20): 0.90000 | {curves.WIDTH - curves.RIGHT}"
    assert hidden == f"IO-GP (step 0): 0.70000 | {curves.LEFT} | none"
    assert left == "-9"


def test_picture(tmp_path):
    from PIL import Image

    curves.write_png(make_panels(), "title", tmp_path / "curves.png")
    pixels = np.asarray(Image.open(tmp_path / "curves.png").convert("RGB")).reshape(-1, 3)
    for color in curves.COLORS[:2]:
        wanted = [int(color[first : first + 2], 16) for first in (1, 3, 5)]
        assert (np.abs(pixels.astype(int) - wanted).max(axis=1) < 3).sum() > 100


def test_ticks_are_round():
    assert curves.ticks(0, 100) == [0, 20, 40, 60, 80, 100]
    np.testing.assert_allclose(curves.ticks(-0.013, 0.041), [-0.01, 0, 0.01, 0.02, 0.03, 0.04], atol=1e-12)
    assert curves.ticks(3, 3) == [3]
