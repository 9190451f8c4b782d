"""What fits into memory, and the memory that stays with the process between steps."""

from __future__ import annotations

import math
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import numpy as np
import pytest
import torch

from GradProjIOLib.engine import memory
from GradProjIOLib.errors import InputError
from GradProjIOLib.geometry.volume import Volume
from GradProjIOLib.models import registry
from GradProjIOLib.registration.register import register
from GradProjIOLib.settings import Settings

CPU = torch.device("cpu")


def with_free_memory(monkeypatch, **free):
    """Let each type of device have so many bytes."""
    monkeypatch.setattr(memory, "available_memory", lambda device: free[device.type])


class TestWhatFits:
    network = registry.build(registry.MODELS["compact"])
    lattice = (100, 100, 100)

    def needed(self, mode, device=CPU):
        return memory.needed_memory(self.network, self.lattice, mode, device)

    def modes(self, setting, device=CPU, model="compact"):
        return memory.modes_to_try(setting, model, self.network, self.lattice, device)

    def test_only_modes_that_fit_are_tried(self, monkeypatch):
        assert self.needed("lean") < self.needed("full")
        with_free_memory(monkeypatch, cpu=self.needed("full"))
        assert self.modes("auto") == ("full", "lean")
        assert self.modes("full") == ("full",)
        with_free_memory(monkeypatch, cpu=self.needed("lean"))
        assert self.modes("auto") == ("lean",)
        with pytest.raises(InputError, match="not enough memory"):
            self.modes("full")

    def test_the_message_says_what_is_needed_what_is_there_and_what_to_do(self, monkeypatch):
        with_free_memory(monkeypatch, cpu=2**28)
        with pytest.raises(InputError) as error:
            self.modes("auto", model="unigradicon")
        needed = self.needed("lean") / 2**30
        assert f"needs about {needed:.1f} GB on a lattice of 100 x 100 x 100 and 0.2 GB are free" in str(error.value)
        assert "choose the model compact, a smaller lattice" in str(error.value)

    def test_users_of_compact_are_not_told_to_choose_compact(self, monkeypatch):
        with_free_memory(monkeypatch, cpu=2**20)
        with pytest.raises(InputError) as error:
            self.modes("auto", model="compact")
        assert "choose a smaller lattice" in str(error.value)
        assert "the model compact," not in str(error.value)

    def test_the_computer_beside_a_card_must_hold_the_images(self, monkeypatch):
        card = torch.device("cuda")
        with_free_memory(monkeypatch, cuda=2**40, cpu=2**30)
        assert self.modes("auto", card) == ("full", "lean")
        with_free_memory(monkeypatch, cuda=2**40, cpu=2**20)
        with pytest.raises(InputError, match="not enough memory on cpu"):
            self.modes("auto", card)

    def test_a_lattice_that_cannot_fit_is_refused_before_anything_is_allocated(self):
        """No computer has the memory for it, so the process would be killed."""
        image = Volume(np.random.default_rng(0).random((16, 16, 16), np.float32), np.eye(4), "image")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        lattice = (20_000, 20_000, 20_000)
        with pytest.raises(InputError, match="20000 x 20000 x 20000"):
            register(image, image, Settings(model="compact", lattice=lattice, steps=1, device="cpu"))
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < math.prod(lattice) / 1024


needs_glibc = pytest.mark.skipif(memory._glibc() is None, reason="needs Linux with glibc")


@needs_glibc
def test_memory_stays_with_the_process_while_inside_and_goes_back_at_the_end():
    """In a process of its own, whose memory nothing else uses. A gigabyte that was freed is there, or it is not."""
    program = """
import resource, torch
from GradProjIOLib.engine.memory import recycled_memory

def resident_after_use():
    torch.zeros(2**28)
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

before = resident_after_use()
with recycled_memory(torch.device("cpu")):
    inside = resident_after_use()
    with recycled_memory(torch.device("cpu")):
        pass
    still_inside = resident_after_use()
print(inside - before, still_inside - before, resident_after_use() - before)
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=100)
    inside, still_inside, afterwards = map(int, found.stdout.split())
    assert inside > 2**29
    assert still_inside > 2**29
    assert afterwards < 2**28


@needs_glibc
def test_the_last_thread_to_leave_gives_the_memory_back(monkeypatch):
    """The setting is that of the whole process, so the first thread to leave must not change it for the others."""
    calls = []

    class Recorder:
        def __getattr__(self, name):
            return lambda *arguments: calls.append(name) or 0

    monkeypatch.setattr(memory, "_glibc", Recorder)
    first, second = ExitStack(), ExitStack()
    first.enter_context(memory.recycled_memory(CPU))
    entered = calls.count("mallopt")
    with ThreadPoolExecutor(1) as thread:
        thread.submit(second.enter_context, memory.recycled_memory(CPU)).result()
        first.close()
        assert calls.count("mallopt") == entered
        assert "malloc_trim" not in calls
        thread.submit(second.close).result()
    assert calls[-1] == "malloc_trim"
