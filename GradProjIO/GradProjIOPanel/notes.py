"""Messages with an icon that marks a warning or an error."""

import qt
import slicer

from GradProjIOLib.scene.session import Tone

SIGN_SIZE = 16


def showNote(iconLabel, textLabel, text, tone=Tone.PLAIN):
    """Show `text`, with the application's sign for a warning or an error beside it."""
    signs = {Tone.WARNING: qt.QStyle.SP_MessageBoxWarning, Tone.ERROR: qt.QStyle.SP_MessageBoxCritical}
    iconLabel.setVisible(bool(text) and tone in signs)
    if tone in signs and iconLabel.property("tone") != tone.value:
        iconLabel.setPixmap(slicer.app.style().standardIcon(signs[tone]).pixmap(SIGN_SIZE, SIGN_SIZE))
        iconLabel.setProperty("tone", tone.value)
    textLabel.setText(text)


def setQuietly(widget, change):
    """Call `change` while the signals of `widget` are blocked, as when it follows the scene."""
    wasBlocked = widget.blockSignals(True)
    try:
        change()
    finally:
        widget.blockSignals(wasBlocked)
