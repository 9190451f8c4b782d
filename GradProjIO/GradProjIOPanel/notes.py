"""Messages with an icon that marks a warning or an error, tables of texts, and changes without signals."""

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


def fillTable(table, titles, rows):
    """Show `rows` of texts below `titles`, or hide the table where there are none; a click selects a row.

    Return the items, which must be kept, since Slicer's Python may free those that nobody holds.
    """
    table.setVisible(bool(rows))
    table.setEditTriggers(qt.QAbstractItemView.NoEditTriggers)
    table.setSelectionBehavior(qt.QAbstractItemView.SelectRows)
    table.verticalHeader().hide()
    table.setColumnCount(len(titles))
    table.setHorizontalHeaderLabels(titles)
    table.setRowCount(len(rows))
    items = [[qt.QTableWidgetItem(text) for text in row] for row in rows]
    for row, entries in enumerate(items):
        for column, item in enumerate(entries):
            table.setItem(row, column, item)
    table.resizeColumnsToContents()
    return items


def setQuietly(widget, change):
    """Call `change` while the signals of `widget` are blocked, as when it follows the scene."""
    wasBlocked = widget.blockSignals(True)
    try:
        change()
    finally:
        widget.blockSignals(wasBlocked)
