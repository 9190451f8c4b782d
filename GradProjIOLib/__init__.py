"""Deformable registration of 3-D medical images by instance optimisation with gradient projection."""

__version__ = "0.1.0"
