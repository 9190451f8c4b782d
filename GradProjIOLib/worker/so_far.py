"""The worker's part in showing what is reached so far, while the registration runs."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from GradProjIOLib.errors import InputError
from GradProjIOLib.registration.register import Running
from GradProjIOLib.spatial.deformation import Deformation
from GradProjIOLib.worker import protocol

MOST_SAMPLES = 250_000
"""What is shown on the way has no more samples, which lie about 4 mm apart for a brain."""
MOST_OF_THE_TIME = 0.02
"""The part of the time that this may take."""


class SoFar:
    """Sends the deformation that is reached every few seconds, as a file in `folder`.

    seconds: between two of them; None for none at all. send: takes the record of the displacement field as `transform`;
    it is called again only when the file is gone.
    """

    def __init__(self, seconds: float | None, folder: Path, send: Callable[..., None]) -> None:
        self.seconds = math.inf if seconds is None else seconds
        self.folder, self.send = folder, send
        self.running: Running | None = None
        self._next = time.monotonic() + self.seconds

    def start(self, running: Running) -> None:
        """Look at these steps from now on."""
        # What is held takes memory.
        if math.isfinite(self.seconds):
            self.running = running

    def step(self, last: bool) -> None:
        """Send what is reached, where it is time. last: whether no step follows, so that nothing need be held."""
        running = self.running
        if running is None or last or running.optimizer.taken >= running.optimizer.steps:
            self.running = None
            return
        begun = time.monotonic()
        if begun < self._next or (self.folder / f"{protocol.SO_FAR}.npy").exists():
            return
        deformation = coarse(running.forward())
        field = deformation.displacement, deformation.affine, deformation.matrix
        # Where there is no room for it, the registration goes on.
        with contextlib.suppress(InputError):
            self.send(transform=protocol.write_field(*field, self.folder, protocol.SO_FAR))
        now = time.monotonic()
        self._next = now + max(self.seconds, (now - begun) / MOST_OF_THE_TIME)


def coarse(deformation: Deformation) -> Deformation:
    """Every second, third … sample of a deformation, so that MOST_SAMPLES remain at most."""
    stride = int(np.ceil((deformation.displacement[..., 0].size / MOST_SAMPLES) ** (1 / 3)))
    kept = deformation.displacement[::stride, ::stride, ::stride]
    return Deformation(kept, deformation.affine @ np.diag([stride, stride, stride, 1]), deformation.matrix)
