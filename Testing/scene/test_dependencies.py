"""What the module installs into Slicer, and that it leaves Slicer's own packages alone."""

import importlib.metadata
import importlib.util
import re
import sys
import types
from pathlib import Path

import pytest

from GradProjIOLib.scene import packages as dependencies


@pytest.fixture
def absent(monkeypatch):
    """Packages that Python does not find; all, unless the test chooses."""
    names = {dependencies.module_of(requirement) for requirement in dependencies.MEGABYTES}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in names else object())
    return names


@pytest.fixture
def installed(monkeypatch):
    """What Slicer's own ways to install packages are asked for, in order."""
    asked = []

    class PyTorchUtilsLogic:
        def installTorch(self, **keywords):
            asked.append(keywords)
            return object()

    def pip_install(arguments):
        *requirements, option, constraints = arguments
        assert option == "-c"
        asked.append((requirements, Path(constraints).read_text().splitlines()))

    monkeypatch.setitem(sys.modules, "slicer", types.ModuleType("slicer"))
    for name, content in (("PyTorchUtils", PyTorchUtilsLogic), ("slicer.util", pip_install)):
        module = types.ModuleType(name)
        setattr(module, content.__name__, content)
        monkeypatch.setitem(sys.modules, name, module)
    return asked


def test_nothing_is_missing_here_and_nothing_is_imported_to_find_out():
    code = (
        "import sys; from GradProjIOLib.scene import packages as d; assert d.missing() == [];"
        "assert not {'torch', 'scipy', 'matplotlib'} & set(sys.modules)"
    )
    import subprocess

    subprocess.run([sys.executable, "-c", code], check=True)


def test_torch_comes_through_the_extension_and_the_rest_under_constraints(absent, installed):
    absent &= {"torch", "scipy"}
    packages = dependencies.missing()
    assert packages == ["torch>=2.6", "scipy>=1.11"]
    dependencies.install(packages)
    torch, (requirements, constraints) = installed
    assert torch["torchVersionRequirement"] == ">=2.6"
    assert requirements == ["scipy>=1.11"]
    assert f"numpy=={importlib.metadata.version('numpy')}" in constraints
    assert f"SimpleITK=={importlib.metadata.version('SimpleITK')}" in constraints


def test_a_package_without_pip_records_keeps_its_version_too(monkeypatch):
    module = types.ModuleType("SimpleITK_of_Slicer")
    module.__version__ = "2.5.0"
    monkeypatch.setitem(sys.modules, "SimpleITK_of_Slicer", module)
    monkeypatch.setattr(dependencies, "KEPT", ["SimpleITK_of_Slicer"])
    assert dependencies.constraints() == ["SimpleITK_of_Slicer==2.5.0"]


def test_the_question_names_everything_and_its_size(absent):
    text = dependencies.question(dependencies.missing())
    assert all(name in text for name in absent)
    assert "2500 MB" in text
    assert "numpy" in text


def test_without_the_pytorch_extension_the_message_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "PyTorchUtils", None)
    with pytest.raises(RuntimeError, match="Extensions Manager"):
        dependencies.install_torch()


def test_a_torch_that_was_not_installed_gives_a_sentence(monkeypatch, installed):
    monkeypatch.setattr(sys.modules["PyTorchUtils"].PyTorchUtilsLogic, "installTorch", lambda self, **keywords: None)
    with pytest.raises(RuntimeError, match="not installed"):
        dependencies.install_torch()


def test_the_list_covers_what_the_package_declares():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    declared = {requirement.replace("=", ">").split(">")[0] for requirement in project["dependencies"]}
    # Slicer contains these two.
    needed = declared - {"numpy", "SimpleITK"}
    assert needed == {re.split("[>=]", requirement)[0] for requirement in dependencies.MEGABYTES}
