"""What the module installs into Slicer, and that it leaves Slicer's own packages alone."""

import importlib.metadata
import re
import sys
import types
from pathlib import Path

import pytest

from GradProjIOLib.scene import packages as dependencies


class Recorder:
    """An installer that writes down what it is asked."""

    def __init__(self):
        self.calls = []

    def install_torch(self):
        self.calls.append("torch")

    def install(self, requirements, constraints):
        self.calls.append((list(requirements), constraints.read_text().splitlines()))


def test_nothing_is_missing_here_and_nothing_is_imported_to_find_out():
    code = (
        "import sys; from GradProjIOLib.scene import packages as d; assert d.missing() == [];"
        "assert not {'torch', 'scipy', 'matplotlib'} & set(sys.modules)"
    )
    import subprocess

    subprocess.run([sys.executable, "-c", code], check=True)


def test_torch_comes_through_the_extension_and_the_rest_under_constraints():
    packages = dependencies.missing(lambda module: module != "scipy" and module != "torch")
    assert [package.module for package in packages] == ["torch", "scipy"]
    recorder = Recorder()
    dependencies.install(packages, recorder)
    torch, (requirements, constraints) = recorder.calls
    assert torch == "torch"
    assert requirements == ["scipy>=1.11"]
    assert f"numpy=={importlib.metadata.version('numpy')}" in constraints
    assert f"SimpleITK=={importlib.metadata.version('SimpleITK')}" in constraints


def test_a_package_without_pip_records_keeps_its_version_too(monkeypatch):
    module = types.ModuleType("SimpleITK_of_Slicer")
    module.__version__ = "2.5.0"
    monkeypatch.setitem(sys.modules, "SimpleITK_of_Slicer", module)
    assert dependencies.installed_version("SimpleITK_of_Slicer") == "2.5.0"
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        dependencies.installed_version("not_there_at_all")


def test_the_question_names_everything_and_its_size():
    text = dependencies.question(dependencies.missing(lambda module: False))
    for package in (dependencies.TORCH, *dependencies.OTHERS):
        assert package.module in text
    assert "2500 MB" in text
    assert "numpy" in text


@pytest.mark.parametrize("new_slicer", [True, False])
def test_both_generations_of_slicer_get_the_constraints(monkeypatch, new_slicer):
    calls = []
    packaging = types.ModuleType("slicer.packaging")
    if new_slicer:
        packaging.pip_ensure = lambda *args, **keywords: calls.append((args, keywords))
    util = types.ModuleType("slicer.util")
    util.pip_install = lambda arguments: calls.append(arguments)
    monkeypatch.setitem(sys.modules, "slicer", types.ModuleType("slicer"))
    monkeypatch.setitem(sys.modules, "slicer.packaging", packaging)
    monkeypatch.setitem(sys.modules, "slicer.util", util)
    dependencies.SlicerInstaller().install(["scipy"], Path("/tmp/constraints.txt"))
    if new_slicer:
        (arguments, keywords) = calls[0]
        assert arguments == (["scipy"],)
        assert keywords["constraints"] == "/tmp/constraints.txt"
        assert keywords["prompt_install"] is False
    else:
        assert calls == [["scipy", "-c", "/tmp/constraints.txt"]]


def test_without_the_pytorch_extension_the_message_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "PyTorchUtils", None)
    with pytest.raises(RuntimeError, match="Extensions Manager"):
        dependencies.SlicerInstaller().install_torch()


def test_the_torch_of_the_extension_is_asked_for_in_a_version_that_works(monkeypatch):
    asked = []

    class PyTorchUtilsLogic:
        def installTorch(self, **keywords):
            asked.append(keywords)
            return None if len(asked) > 1 else object()

    module = types.ModuleType("PyTorchUtils")
    module.PyTorchUtilsLogic = PyTorchUtilsLogic
    monkeypatch.setitem(sys.modules, "PyTorchUtils", module)
    dependencies.SlicerInstaller().install_torch()
    assert asked[0]["torchVersionRequirement"] == ">=2.6"
    with pytest.raises(RuntimeError, match="not installed"):
        dependencies.SlicerInstaller().install_torch()


def test_the_list_covers_what_the_package_declares():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    declared = {requirement.replace("=", ">").split(">")[0] for requirement in project["dependencies"]}
    # Slicer brings the first two along; the last one only serves `gradprojio evaluate`.
    needed = declared - {"numpy", "SimpleITK"}
    assert needed == {re.split("[>=]", p.requirement)[0] for p in (dependencies.TORCH, *dependencies.OTHERS)}
