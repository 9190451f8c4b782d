"""Small images in a scene, and a worker that many tests share."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import slicer

from GradProjIOLib.geometry.lattice import lattice_points
from GradProjIOLib.geometry.volume import Volume
from GradProjIOLib.scene import nodes
from GradProjIOLib.scene.session import SceneRegistration
from GradProjIOLib.worker import protocol
from GradProjIOLib.worker.client import WorkerClient

# One thread, like the tests themselves; weights that a developer may have must not matter.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GRADPROJIO_CACHE": "/nonexistent/gradprojio"}
QUICK = {"model": "compact", "steps": 2, "refine_steps": 0, "device": "cpu"}
OBLIQUE = np.array([[2.8, 0.5, -0.6, -30.0], [-0.6, 2.9, 0.3, -25.0], [0.4, -0.35, 4.1, -35.0], [0, 0, 0, 1.0]])


def new_worker() -> WorkerClient:
    """A client whose worker uses one thread."""
    return WorkerClient(environment=ENVIRONMENT)


class ScriptedWorker:
    """A client without a process, which answers a registration step by step, one at each poll, with a result at hand.

    `folded` voxels of the result fold, in one row; `change` changes its volumes. `total` steps are announced.
    """

    def __init__(self) -> None:
        self.pid, self.running = None, False
        self.total, self.folded, self.weights_missing = 2, 0, False
        self.change = lambda array: array
        self.devices: list[dict] = []
        self.models: dict[str, dict] = {}
        self.requests: list[dict] = []
        self._request: dict = {"request": ""}
        self._number, self._events = 0, []

    def start(self) -> None:
        self.running = True

    def submit(self, request) -> int:
        self.running = True
        self._number += 1
        self._request = request
        self.requests.append(request)
        if request["request"] == "download":
            return self._number
        if self.weights_missing and not request["allow_download"]:
            self._events = [{"event": "failed", "kind": protocol.WEIGHTS_MISSING, "message": "Download?"}]
            return self._number
        step = {"event": "step", "stage": "refinement", "level": 0, "similarity": 0.5, "regularity": 0.01}
        step |= {"cosine": 0.1, "conflicts": [], "remaining_seconds": 1.0}
        steps = [step | {"index": index} for index in range(self.total)]
        self._events = [{"event": "started", "total": self.total, "levels": [self.total]}, *steps, {"event": "done"}]
        return self._number

    def poll(self) -> list[dict]:
        if self.devices:
            devices, self.devices = self.devices, []
            return [{"event": "devices", "devices": devices, "models": self.models}]
        events = self._events[:2] if self._events[:1] and self._events[0]["event"] == "started" else self._events[:1]
        self._events = self._events[len(events) :]
        ended = [event for event in events if event["event"] in ("done", "canceled")]
        for event in ended if self._request["request"] == "register" else ():
            event |= {"report": self._report("finished" if event["event"] == "done" else "by request")}
            event |= {"result": self._result()}
        return [event | {"id": self._number} for event in events]

    def cancel(self, number) -> None:
        self._events = [{"event": "canceled"}]

    def kill(self) -> None:
        self._events, self.running = [], False

    close = kill

    def _report(self, stopped) -> dict:
        count = 1 if stopped == "by request" else self.total
        figures = {"folded_voxels": self.folded, "folded_percent": self.folded / 61.2, "ndv_percent": 0.0}
        figures |= {"folded_regions": int(self.folded > 0), "min": -0.5 if self.folded else 0.8, "max": 1.2}
        images = {role: protocol.read(self._request["inputs"][role]) for role in ("fixed", "moving")}
        earlier = (self._request.get("earlier") or {"report": {"steps": []}})["report"]["steps"]
        return {
            "settings": {},
            "inputs": {
                role: {"shape": list(volume.shape), "affine": volume.affine.tolist()} for role, volume in images.items()
            },
            "initial_transform": np.eye(4).tolist(),
            "continued_after": [len(earlier)] if self._request.get("earlier") else [],
            "model": {"name": "compact"},
            "stopped": stopped,
            "similarity_before": 0.9,
            "similarity": 0.5,
            "steps": [*earlier, *[{}] * count],
            "warnings": [],
            "jacobian": figures,
        }

    def _result(self) -> dict:
        request, folder = self._request, Path(self._request["folder"])
        fixed = protocol.read(request["inputs"]["fixed"])
        determinant = np.ones(fixed.shape, np.float32)
        determinant[5, 5, 5 : 5 + self.folded] = -0.5
        volumes = {"warped": fixed.array, "jacobian": determinant, "folding": (determinant <= 0).astype(np.uint8)}
        if request["labels_to_warp"] is not None:
            volumes["warped_labels"] = (fixed.array > 100).astype(np.uint8)
        result = {}
        for role, array in volumes.items():
            array = self.change(array) if role == "warped" else array
            result[role] = protocol.write_volume(Volume(array, fixed.affine, role), folder, f"result {role}")
        for role in ("transform", "inverse"):
            field = np.zeros((*fixed.shape, 3), np.float32)
            result[role] = protocol.write_field(field, fixed.affine, np.eye(4), folder, role)
        return result


def right_angled(matrix: np.ndarray) -> np.ndarray:
    """The affine with the same spacing and origin and the nearest right-angled axes."""
    spacing = np.linalg.norm(matrix[:3, :3], axis=0)
    left, _, right = np.linalg.svd(matrix[:3, :3] / spacing)
    result = matrix.copy()
    result[:3, :3] = left @ right * spacing
    return result


def blobs(points: np.ndarray, shift: float = 0.0) -> np.ndarray:
    """A smooth image of a body with structure, as a function of world positions [n, 3]."""
    x, y, z = (points + shift).T / 10
    body = 1 / (1 + np.exp(4 * (np.sqrt(x**2 + 1.2 * y**2 + 0.8 * z**2) - 2.5)))
    return 800 * body * (1 + 0.4 * np.sin(2 * x) * np.cos(1.7 * y) + 0.3 * np.sin(2.3 * z + y))


def image(name: str, shift: float = 0.0, shape: tuple[int, int, int] = (17, 18, 20), affine=None) -> Volume:
    """A Volume of `blobs` around the middle of its lattice."""
    affine = np.diag([3.0, 3.0, 3.5, 1.0]) if affine is None else affine
    points = lattice_points(shape, affine).reshape(-1, 3)
    return Volume(blobs(points - points.mean(axis=0), shift).reshape(shape).astype(np.float32), affine, name)


def add(scene, volume: Volume, kind: str = "vtkMRMLScalarVolumeNode", parent=None):
    """A node with `volume`, whose affine is that in the world, below `parent`."""
    node = scene.AddNewNodeByClass(kind, volume.name)
    if parent is None:
        return nodes.volume_to_node(volume, node)
    local = np.linalg.inv(slicer.util.arrayFromTransformMatrix(parent)) @ volume.affine
    nodes.volume_to_node(Volume(volume.array, local, volume.name), node)
    node.SetAndObserveTransformNodeID(parent.GetID())
    return node


def add_pair(scene, **keywords):
    """A fixed and a moving image node, some millimeters apart."""
    return add(scene, image("fixed", **keywords)), add(scene, image("moving", shift=2.0, **keywords))


def sessions(client):
    """A registration of an empty scene by a worker's client, for a fixture; it leaves nothing behind."""
    scene = slicer.vtkMRMLScene()
    scene.RegisterNodeClass(slicer.vtkMRMLColorLegendDisplayNode())
    session = SceneRegistration(scene, client)
    yield session
    if session.active:
        session.stop_now()
    session.discard()
    scene.Clear(True)


def wait_until(condition, poll, seconds: float = 120.0) -> None:
    """Call `poll` until `condition` holds; fail where it does not within `seconds`."""
    start = time.perf_counter()
    while not condition():
        assert time.perf_counter() - start < seconds, "waited in vain"
        poll()
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    """Whether the process is there and still runs."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().split(")")[-1].split()[0] != "Z"
    except OSError:
        return False


def exchange_folders(base) -> list[str]:
    """Folders for temporary files that are left in `base`."""
    return [name for name in os.listdir(base) if name.startswith(protocol.FOLDER_PREFIX)]
