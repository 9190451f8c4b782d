"""Fetch the weights of a published model for the user, who has asked for it; the worker does it. No Qt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from GradProjIOLib.errors import InputError
from GradProjIOLib.scene.i18n import tr as _
from GradProjIOLib.worker import protocol
from GradProjIOLib.worker.client import WorkerClient
from GradProjIOLib.worker.protocol import DownloadRequest


class ModelDownload:
    """Fetches one model at a time. Call `poll` from a timer while `active`; `message` says how far it is, or why not.

    `done` is the name of the model that has arrived last.
    """

    def __init__(self) -> None:
        # A registration may go on meanwhile, with another model.
        self.client = WorkerClient(environment={"CUDA_VISIBLE_DEVICES": ""})
        self.message, self.done = "", ""
        self._number: int | None = None
        self._model = ""

    @property
    def active(self) -> bool:
        """Whether a download is under way."""
        return self._number is not None

    def start(self, model: str) -> None:
        """Begin to fetch the weights of `model`."""
        if self.active:
            return
        try:
            self._number = self.client.submit(protocol.to_message(DownloadRequest(model)))
            self._model, self.message = model, _("Downloading …")
        except InputError as error:
            self.message = str(error)

    def cancel(self) -> None:
        """End it; what has arrived is removed."""
        if self._number is not None:
            self.client.cancel(self._number)
            self.message = _("Canceling …")

    def poll(self) -> bool:
        """Handle the worker's events since the last call, without waiting. True where something changed."""
        events = [event for event in self.client.poll() if event.get("id") == self._number is not None]
        for event in events:
            if event["event"] == protocol.DOWNLOAD:
                sentence = _("Downloading: {received:.0f} of {total:.0f} MB.")
                self.message = sentence.format(received=event["received"] / 1e6, total=(event["total"] or 0) / 1e6)
            elif event["event"] in protocol.LAST_EVENTS:
                self._end(event)
        return bool(events)

    def close(self) -> None:
        """End the process; nothing is left behind."""
        self.client.close()
        self._number, self.message = None, ""

    def _end(self, event: Mapping[str, Any]) -> None:
        self.close()
        if event["event"] == protocol.DOWNLOADED:
            self.done = self._model
        elif event["event"] == protocol.CANCELED:
            self.message = _("The download was canceled.")
        else:
            self.message = event.get("message") or _("The download ended unexpectedly; try again.")
