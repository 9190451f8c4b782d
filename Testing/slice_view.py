"""A slice view of Slicer without its application: slice logic, layers and displayable managers, offscreen."""

from __future__ import annotations

from pathlib import Path

import slicer
import vtk
from vtk.util.numpy_support import vtk_to_numpy

MANAGERS = (
    "vtkMRMLSegmentationsDisplayableManager2D",
    "vtkMRMLTransformsDisplayableManager2D",
    "vtkMRMLColorLegendDisplayableManager",
    "vtkMRMLMarkupsDisplayableManager",
    "vtkMRMLModelSliceDisplayableManager",
)
ORIENTATIONS = {"Red": "Axial", "Green": "Coronal", "Yellow": "Sagittal"}


class SliceView:
    """Shows `scene` in one slice view; `save` and `pixels` render it."""

    def __init__(self, scene: slicer.vtkMRMLScene, name: str = "Red", size: tuple[int, int] = (480, 480)):
        self.scene, self.size = scene, size
        self._application = slicer.vtkMRMLApplicationLogic()
        self._application.SetMRMLScene(scene)
        self._colors = slicer.vtkMRMLColorLogic()
        self._colors.SetMRMLScene(scene)
        self._colors.AddDefaultColorNodes()
        # The application logic does not keep these alive.
        self._markups, self._logics = slicer.vtkSlicerMarkupsLogic(), vtk.vtkCollection()
        self._markups.SetMRMLScene(scene)
        self._application.SetModuleLogic("Markups", self._markups)
        self.logic = slicer.vtkMRMLSliceLogic()
        self.logic.SetMRMLScene(scene)
        self.logic.AddSliceNode(name)
        self.node = self.logic.GetSliceNode()
        self.node.SetOrientation(ORIENTATIONS[name])
        self._logics.AddItem(self.logic)
        self._application.SetSliceLogics(self._logics)
        self.node.SetMappedInLayout(1)
        self.node.SetDimensions(*size, 1)
        self._window = self._make_window()
        self._group = self._make_managers()

    def _make_window(self) -> vtk.vtkRenderWindow:
        window = vtk.vtkRenderWindow()
        window.SetOffScreenRendering(True)
        window.SetMultiSamples(8)
        window.SetSize(*self.size)
        images = vtk.vtkRenderer()
        images.SetLayer(0)
        self._mapper = vtk.vtkImageMapper()
        self._mapper.SetColorWindow(255)
        self._mapper.SetColorLevel(127.5)
        actor = vtk.vtkActor2D()
        actor.SetMapper(self._mapper)
        images.AddActor2D(actor)
        self._overlays = vtk.vtkRenderer()
        self._overlays.SetLayer(1)
        self._overlays.GetActiveCamera().ParallelProjectionOn()
        window.SetNumberOfLayers(2)
        window.AddRenderer(images)
        window.AddRenderer(self._overlays)
        self._interactor = vtk.vtkRenderWindowInteractor()
        self._interactor.SetRenderWindow(window)
        self._interactor.SetInteractorStyle(vtk.vtkInteractorStyleUser())
        return window

    def _make_managers(self) -> slicer.vtkMRMLDisplayableManagerGroup:
        factory = slicer.vtkMRMLSliceViewDisplayableManagerFactory.GetInstance()
        factory.SetMRMLApplicationLogic(self._application)
        for name in MANAGERS:
            if not factory.IsDisplayableManagerRegistered(name):
                factory.RegisterDisplayableManager(name)
        group = slicer.vtkMRMLDisplayableManagerGroup()
        group.SetRenderer(self._overlays)
        group.SetMRMLDisplayableNode(self.node)
        group.SetAndObserveDisplayableManagerFactory(factory)
        group.Initialize(factory, self._overlays)
        group.SetMRMLDisplayableNode(self.node)
        self.logic.SetDisplayableManagerGroup(group)
        return group

    def fit(self, volume: slicer.vtkMRMLVolumeNode) -> None:
        """Show all of `volume`."""
        self.logic.FitSliceToVolume(volume, *self.size)

    def render(self) -> vtk.vtkImageData:
        """The view as an image."""
        self.logic.UpdatePipeline()
        if self.logic.GetImageDataConnection() is not None:
            self._mapper.SetInputConnection(self.logic.GetImageDataConnection())
        camera = self._overlays.GetActiveCamera()
        camera.SetParallelScale(self.size[1] / 2)
        camera.SetFocalPoint(self.size[0] / 2, self.size[1] / 2, 0)
        camera.SetPosition(self.size[0] / 2, self.size[1] / 2, 100)
        camera.SetClippingRange(0.1, 1000)
        self._window.Render()
        grabber = vtk.vtkWindowToImageFilter()
        grabber.SetInput(self._window)
        grabber.ReadFrontBufferOff()
        grabber.Update()
        return grabber.GetOutput()

    def pixels(self):
        """The view as an array [row, column, RGB], top row first."""
        image = self.render()
        width, height, _ = image.GetDimensions()
        return vtk_to_numpy(image.GetPointData().GetScalars()).reshape(height, width, -1)[::-1, :, :3].copy()

    def save(self, path: Path) -> None:
        """Write the view as PNG."""
        writer = vtk.vtkPNGWriter()
        writer.SetInputData(self.render())
        writer.SetFileName(str(path))
        writer.Write()
