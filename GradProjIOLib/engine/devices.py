"""Devices to compute on."""

from __future__ import annotations

import platform

import torch

from GradProjIOLib.errors import InputError


def find_device(name: str) -> torch.device:
    """The device to compute on: "auto", "cpu", "cuda", "cuda:1", "mps". Raises InputError where it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"The device {name!r} is not there or cannot be used; choose auto or cpu.") from error
    return device


def describe_device(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()
