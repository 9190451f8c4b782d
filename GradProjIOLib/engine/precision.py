"""How precisely NVIDIA graphics cards multiply in convolutions.

Since Ampere, cuDNN multiplies in TF32, with 10 bits of mantissa instead of 23, if PyTorch allows it, which
is its default. So the published package computes in TF32, and so does this one. "exact" forbids it: a registration
then computes on a card what it computes on a processor, up to rounding.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_changed = threading.Condition()
_entered: list[str] = []
"""The precision of each context that is open in this process. They are all the same."""
_before: object = None


@contextmanager
def convolutions(precision: str) -> Iterator[None]:
    """Compute convolutions on NVIDIA cards in "tf32" or "exact" while inside. Other devices know no difference.

    PyTorch has one setting for the whole process. Threads that want the same precision share it, and a thread that
    wants the other one waits until they are done. The last one to leave brings the former setting back. A thread that
    is inside must not ask for the other precision.
    """
    global _before
    with _changed:
        _changed.wait_for(lambda: not _entered or _entered[0] == precision)
        owner, name, values = _setting()
        if not _entered:
            _before = getattr(owner, name)
            setattr(owner, name, values[precision])
        _entered.append(precision)
    try:
        yield
    finally:
        with _changed:
            _entered.pop()
            if not _entered:
                setattr(owner, name, _before)
                _changed.notify_all()


def _setting() -> tuple[object, str, dict[str, object]]:
    """Where PyTorch keeps the setting: the owner, the attribute's name, and its value for each precision.

    PyTorch has an older and a newer interface to it and refuses to have both used.
    """
    newer = getattr(torch.backends.cudnn, "conv", None)
    if newer is None:
        return torch.backends.cudnn, "allow_tf32", {"tf32": True, "exact": False}
    return newer, "fp32_precision", {"tf32": "tf32", "exact": "ieee"}
