"""What the package tells a user who must change something."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """What the user must change, in one sentence that names the file or node."""


class WriteError(InputError):
    """A result could not be written (disk full, no permission); nothing was left behind."""


def suggestion(word: object, known: Iterable[str]) -> str:
    """The end of a sentence about a word that is not known: the known word like it, else all of them."""
    known = list(known)
    close = difflib.get_close_matches(str(word), known, 1)
    return f"did you mean {close[0]}?" if close else f"choose one of {', '.join(known)}."
