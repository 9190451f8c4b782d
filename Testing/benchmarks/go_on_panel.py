"""How long the user waits for Go on: from the click to the registered image in the views, on a pair of brains.

    python Testing/benchmarks/go_on_panel.py ../shared/data [--steps 20] [--resolution 2]

Runs the module's panel, its worker and a scene of slicer-core without a window. Between the click and the result the
panel's timer and events go on, and the longest time that one turn of them takes is how long Slicer would not answer.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import slicer
import slicer_application
from panel_tools import open_panel
from scene_tools import add

from GradProjIOLib.geometry.image_files import read_volume
from GradProjIOLib.worker.client import WorkerClient


def run(panel, application, button) -> tuple[float, float]:
    """Click and wait for the result: seconds in all, and of the longest turn."""
    start = time.perf_counter()
    button.click()
    longest = time.perf_counter() - start
    while panel.session.active:
        turn = time.perf_counter()
        application.processEvents()
        panel.onTimer()
        longest = max(longest, time.perf_counter() - turn)
        time.sleep(0.02)
    panel.onTimer()
    return time.perf_counter() - start, longest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--resolution", type=float, default=2.0)
    options = parser.parse_args()
    scene = slicer.vtkMRMLScene()
    application = slicer_application.start(scene)
    application.module = slicer_application.load_module()
    for name in ("Red", "Green", "Yellow"):
        scene.AddNewNodeByClass("vtkMRMLSliceNode", name)
        scene.AddNewNodeByClass("vtkMRMLSliceCompositeNode", name)
    panel = open_panel(application, WorkerClient(), WorkerClient())
    for subject in "ba":
        add(scene, read_volume(options.folder / f"aligned_subject_{subject}.nii.gz"))
    panel.initializeParameterNode()
    parameters = panel._parameterNode
    parameters.model, parameters.device = "none", "cpu"
    parameters.resolution, parameters.refineSteps, parameters.moreSteps = options.resolution, 10, options.steps
    for name, button in (("Register", panel.ui.registerButton), ("Go on", panel.ui.goOnButton)):
        seconds, longest = run(panel, application, button)
        print(f"{name}: {seconds:.1f} s, longest turn {longest:.2f} s, the views show {panel.results.compare.role!r}")
        print(panel.ui.statusLabel.property("text"), flush=True)
    panel.cleanup()


if __name__ == "__main__":
    main()
