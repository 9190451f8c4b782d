"""What the package tells a user who must change something."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


class InputError(ValueError):
    """What the user must change, in one sentence that names the file or node."""


class WriteError(InputError):
    """A result could not be written (disk full, no permission); nothing was left behind."""
