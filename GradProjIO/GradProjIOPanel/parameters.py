"""The choices of the panel, as they are kept in the scene."""

from typing import Annotated, Union

import slicer
from slicer.parameterNodeWrapper import Choice, WithinRange, parameterNodeWrapper

from GradProjIOLib.scene import panel_choices
from GradProjIOLib.settings import Settings


def oneOf(setting):
    """The type of a parameter for a setting that is a choice."""
    return Annotated[str, Choice(list(panel_choices.labels()[setting]))]


# Slicer's wrapper requires None in a Union, although any node parameter may be None.
Labels = Union[slicer.vtkMRMLLabelMapVolumeNode, slicer.vtkMRMLSegmentationNode, None]


@parameterNodeWrapper
class GradProjIOParameterNode:
    """The choices of the panel, kept in the scene."""

    fixedVolume: slicer.vtkMRMLScalarVolumeNode
    movingVolume: slicer.vtkMRMLScalarVolumeNode
    fixedModality: oneOf("fixed_modality") = Settings.fixed_modality
    movingModality: oneOf("moving_modality") = Settings.moving_modality
    align: oneOf("align") = Settings.align
    initialTransform: slicer.vtkMRMLTransformNode
    fixedMask: Labels
    movingMask: Labels
    movingSegmentation: Labels
    model: oneOf("model") = Settings.model
    steps: Annotated[int, WithinRange(0, 300)] = Settings.steps
    refineSteps: Annotated[int, WithinRange(0, 300)] = Settings.refine_steps
    samples: Annotated[int, WithinRange(1000, 100_000_000)] = Settings.samples
    resolution: Annotated[float, WithinRange(0, 20)] = 0
    method: oneOf("method") = Settings.method
    similarity: oneOf("similarity") = Settings.similarity
    regularityWeight: Annotated[float, WithinRange(0, 10)] = Settings.regularity_weight
    networkLearningRate: Annotated[float, WithinRange(0, 1)] = 0
    projection: oneOf("projection") = Settings.projection
    seed: Annotated[int, WithinRange(0, 999999)] = Settings.seed
    device: str = Settings.device
    fixedPoints: slicer.vtkMRMLMarkupsFiducialNode
    movingPoints: slicer.vtkMRMLMarkupsFiducialNode
    landmarkTolerance: Annotated[float, WithinRange(0.1, 50)] = Settings.landmark_tolerance
    fixedGuide: Labels
    movingGuide: Labels
    # Names or values of segments, a list in JSON.
    segmentsLeftOut: str = "[]"
    moreSteps: Annotated[int, WithinRange(1, 300)] = 20
    showSoFar: bool = True
    overwrite: bool = False
    makeTransform: bool = True
    makeInverse: bool = True
    makeWarped: bool = True
    makeWarpedLabels: bool = True
    makeJacobian: bool = True
    outputTransform: slicer.vtkMRMLGridTransformNode
    outputInverse: slicer.vtkMRMLGridTransformNode
    outputWarped: slicer.vtkMRMLScalarVolumeNode
    outputWarpedLabels: slicer.vtkMRMLSegmentationNode
    outputJacobian: slicer.vtkMRMLScalarVolumeNode
    result: slicer.vtkMRMLScalarVolumeNode
    foldingSegmentation: Labels
    evaluationFixedLabels: Labels
    evaluationMovingLabels: Labels
    evaluationFixedPoints: slicer.vtkMRMLMarkupsFiducialNode
    evaluationMovingPoints: slicer.vtkMRMLMarkupsFiducialNode
