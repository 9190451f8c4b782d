"""Slicer's translation where it is there (not in slicer-core), else the English text as it is."""

try:
    from slicer.i18n import tr
except ImportError:
    tr = str

__all__ = ["tr"]
