"""Bytes of the tensors that are alive at the same time, on any device.

What a graphics card would have to hold: without what a process needs beside tensors, and without what a library takes
inside an operation (a convolution's workspace, say).
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensors(TorchDispatchMode):
    """Counts while active: ``bytes`` now, ``peak`` at most. Tensors that Python knows at the beginning count, too."""

    def __enter__(self) -> LiveTensors:
        self.sizes: dict[int, int] = {}
        self.bytes = self.peak = 0
        for known in gc.get_objects():
            if issubclass(type(known), Tensor):
                self._count(known)
        return super().__enter__()

    def __torch_dispatch__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        results = function(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, Tensor):
                self._count(result)
        return results

    def _count(self, tensor: Tensor) -> None:
        if tensor.layout is not torch.strided:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.bytes += storage.nbytes()
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.bytes -= self.sizes.pop(key)


def peak_of(step: Callable[[], object]) -> int:
    """Most bytes of tensors alive while ``step`` runs."""
    gc.collect()
    with LiveTensors() as live:
        step()
    return live.peak
