"""The images of the tutorial, for Slicer's Sample Data module."""

from __future__ import annotations

from pathlib import Path

CATEGORY = "GradProjIO"
URL = "https://github.com/Slicer/SlicerTestingData/releases/download/SHA256/"
CHECKSUMS = {
    "MRBrainTumor1": "998cb522173839c78657f4bc0ea907cea09fd04e44601f17c82ea27927937b95",
    "MRBrainTumor2": "1a64f3f422eb3d1c9b093d1a18da354b13bcf307907c66317e2463ee530b7a97",
}


def register(thumbnail: Path) -> None:
    """Offer the images, all with the picture `thumbnail`."""
    import SampleData

    logic = SampleData.SampleDataLogic
    if hasattr(logic, "registerCustomSampleDataCategory"):
        logic.registerCustomSampleDataCategory(CATEGORY, title=CATEGORY)
    for name, checksum in CHECKSUMS.items():
        logic.registerCustomSampleDataSource(
            category=CATEGORY,
            sampleName=name,
            thumbnailFileName=str(thumbnail),
            uris=URL + checksum,
            fileNames=f"{name}.nrrd",
            checksums=f"SHA256:{checksum}",
            nodeNames=name,
        )
