"""Slicer's translation where it is there (not in slicer-core), else the English text as it is."""

try:
    from slicer.i18n import tr
except ImportError:

    def tr(text: str) -> str:
        """`text` in the language of the application."""
        return text


__all__ = ["tr"]
