"""Registrations in several threads of one process."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np

from GradProjIOLib.registration.register import register
from GradProjIOLib.settings import Settings

SETTINGS = Settings(model="compact", refine_steps=0, steps=3, lattice=(24, 28, 26), device="cpu")


def test_two_threads_compute_what_one_after_the_other_does(fixed_volume, moving_volume):
    pairs = [(fixed_volume, moving_volume), (moving_volume, fixed_volume)]
    expected = [register(*pair, SETTINGS) for pair in pairs]
    # Both are in the middle of their optimization at the same time.
    barrier = Barrier(2, timeout=100)

    def register_beside_another(pair):
        return register(*pair, SETTINGS, on_step=lambda step: barrier.wait() >= 0)

    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(register_beside_another, pairs))
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(mine.forward.displacement, theirs.forward.displacement)
        np.testing.assert_array_equal(mine.inverse.displacement, theirs.inverse.displacement)
        assert mine.report["similarity"] == theirs.report["similarity"]
