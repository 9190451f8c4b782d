"""The tutorial's images in Slicer's Sample Data module."""

import sys
import types
from pathlib import Path

from GradProjIOLib.scene import sample_data


def test_sample_data_are_registered(monkeypatch):
    registered, categories = [], []

    class SampleDataLogic:
        registerCustomSampleDataSource = staticmethod(lambda **keywords: registered.append(keywords))
        registerCustomSampleDataCategory = staticmethod(lambda name, title: categories.append(name))

    module = types.ModuleType("SampleData")
    module.SampleDataLogic = SampleDataLogic
    monkeypatch.setitem(sys.modules, "SampleData", module)
    sample_data.register(Path("icon.png"))
    assert [entry["sampleName"] for entry in registered] == ["MRBrainTumor1", "MRBrainTumor2"]
    for entry in registered:
        assert entry["category"] == "GradProjIO" == categories[0]
        assert entry["uris"].endswith(entry["checksums"].removeprefix("SHA256:"))
        assert entry["thumbnailFileName"] == "icon.png"
