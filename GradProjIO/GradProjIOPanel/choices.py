"""The boxes of Inputs and Registration that the parameter node cannot fill, and notes about the parameters."""

from slicer.i18n import tr as _

from GradProjIOLib.scene import panel_choices
from GradProjIOLib.scene.inputs import GOOD_OVERLAP, overlap
from GradProjIOPanel.notes import setQuietly


class ChoicesSection:
    """Fills the boxes that are no plain parameters, and follows the others. `parameters` is set by the panel."""

    def __init__(self, ui, download):
        self.ui, self.parameters, self.download = ui, None, download
        self._devices = None
        for name, label in panel_choices.preset_labels().items():
            ui.presetComboBox.addItem(label, name)
        ui.presetComboBox.currentIndexChanged.connect(self._onPreset)
        ui.deviceComboBox.currentIndexChanged.connect(self._onDevice)

    def name(self):
        """Translate the entries of the boxes that the parameter node has filled."""
        for setting, labels in panel_choices.labels().items():
            box = getattr(self.ui, f"{panel_choices.parameter_name(setting)}ComboBox")
            for index, label in enumerate(labels.values()):
                box.setItemText(index, label)

    def update(self, devices, models):
        """Follow the parameters; `devices` and `models` are those that the worker has found."""
        ui, parameters = self.ui, self.parameters
        self._showPreset()
        self._fillDevices(devices)
        self._noteModel(devices, models)
        ui.alignComboBox.setEnabled(parameters.initialTransform is None)
        ui.stepsSpinBox.setEnabled(parameters.model != "none")
        ui.methodComboBox.setEnabled(parameters.steps > 0 or parameters.refineSteps > 0)
        ui.samplesSpinBox.setEnabled(parameters.resolution == 0)
        ui.warpedLabelsCheckBox.setEnabled(parameters.movingSegmentation is not None)
        self._noteOverlap()

    def _showPreset(self):
        box = self.ui.presetComboBox
        index = box.findData(panel_choices.preset(self.parameters))
        setQuietly(box, lambda: box.setCurrentIndex(index))

    def _fillDevices(self, devices):
        """List the devices; one that was chosen on another computer stays in the list."""
        box, chosen = self.ui.deviceComboBox, self.parameters.device
        listed = {"auto": _("automatic")} | {device["name"]: device["label"] for device in devices}
        if chosen not in listed:
            listed[chosen] = _("{device} (not found yet)").format(device=chosen) if not devices else chosen
        if listed != self._devices:
            self._devices = listed
            setQuietly(box, lambda: (box.clear(), [box.addItem(label, name) for name, label in listed.items()]))
        setQuietly(box, lambda: box.setCurrentIndex(box.findData(chosen)))

    def _noteModel(self, devices, models):
        """Say what is used where the model is not on this computer or does not fit it, and offer to fetch it."""
        ui, chosen, name = self.ui, self.parameters.model, self.modelToFetch()
        title = panel_choices.labels()["model"][name]
        missing = name in models and not models[name]["there"] and self.download.done != name
        notes = []
        if missing:
            text = (
                _("{model} is not on this computer: using {other}.")
                if chosen == "auto"
                else _("This model is not on this computer yet.")
            )
            notes.append(text.format(model=title, other=panel_choices.substitute(self.parameters)))
        memory = max((device.get("memory") or 0 for device in devices), default=0)
        if name in models and self.parameters.steps > 0 and 0 < memory < models[name]["memory"]:
            text = _("Steps on {model} take about {needed:.0f} GB of memory; {free:.0f} GB are free.")
            notes.append(text.format(model=title, needed=models[name]["memory"] / 2**30, free=memory / 2**30))
        notes.append(self.download.message)
        text = " ".join(filter(None, notes))
        ui.modelNoteLabel.setVisible(bool(text))
        ui.modelNoteLabel.setText(text)
        ui.downloadButton.setVisible(missing or self.download.active)
        offer = _("Download {model} (283 MB)").format(model=title)
        ui.downloadButton.setText(_("Cancel") if self.download.active else offer)

    def modelToFetch(self):
        """The name of the model that the button offers."""
        return "unigradicon" if self.parameters.model == "auto" else self.parameters.model

    def _noteOverlap(self):
        """Suggest an alignment where the images lie apart."""
        label, parameters = self.ui.alignNoteLabel, self.parameters
        share = None
        if parameters.align == "none" and parameters.initialTransform is None:
            share = overlap(parameters.fixedVolume, parameters.movingVolume)
        label.setVisible(share is not None and share < GOOD_OVERLAP)
        if share is not None:
            text = _("Only {share:.0f} % of the fixed image lies inside the moving one: Rigid is suggested.")
            label.setText(text.format(share=100 * share))

    def _onPreset(self, *_args):
        """Take over the preset's values."""
        name = self.ui.presetComboBox.currentData
        if self.parameters and name not in (panel_choices.CUSTOM, panel_choices.preset(self.parameters)):
            panel_choices.choose_preset(self.parameters, name)
        elif self.parameters:
            # "custom" sets no values, so show the preset that the values match.
            self._showPreset()

    def _onDevice(self, *_args):
        """Keep the device by its name, since the list differs from computer to computer."""
        if self.parameters:
            self.parameters.device = self.ui.deviceComboBox.currentData
