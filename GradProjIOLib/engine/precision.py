"""How precisely NVIDIA graphics cards multiply in convolutions.

Since Ampere, cuDNN multiplies in TF32, with 10 bits of mantissa instead of 23, wherever PyTorch lets it. By default
PyTorch lets it, so the published package computes that way, and so does this one. "exact" forbids it: a registration
then computes on a card what it computes on a processor, up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def convolutions(precision: str) -> Iterator[None]:
    """Compute convolutions on NVIDIA cards in "tf32" or "exact" while inside; other devices know no difference.

    The setting is that of the whole process. PyTorch has an older and a newer interface to it and refuses to have
    both used.
    """
    newer = getattr(torch.backends.cudnn, "conv", None)
    owner, name = (torch.backends.cudnn, "allow_tf32") if newer is None else (newer, "fp32_precision")
    values = {"tf32": True, "exact": False} if newer is None else {"tf32": "tf32", "exact": "ieee"}
    before = getattr(owner, name)
    setattr(owner, name, values[precision])
    try:
        yield
    finally:
        setattr(owner, name, before)
