"""The layout of the code: which package may import which, no circles, no long files."""

import ast
import graphlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "GradProjIOLib"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}

BASE = {"errors", "settings"}
SPATIAL = BASE | {"geometry", "spatial"}
REGISTRATION = SPATIAL | {"engine", "models", "registration", "report"}
EVERYTHING = REGISTRATION | {"evaluation", "worker", "batch", "synthetic", "training"}
MAY_IMPORT = {
    "errors": set(),
    "settings": {"errors"},
    "geometry": BASE | {"geometry"},
    "spatial": SPATIAL,
    "engine": SPATIAL | {"engine"},
    "models": SPATIAL | {"engine", "models"},
    "report": SPATIAL | {"report"},
    "registration": REGISTRATION,
    "evaluation": REGISTRATION | {"evaluation"},
    "worker": EVERYTHING - {"synthetic", "training"},
    "worker.client": BASE | {"geometry", "worker.protocol"},
    "worker.protocol": BASE | {"geometry"},
    "batch": EVERYTHING - {"synthetic", "training"},
    "scene": BASE | {"geometry", "report.colors", "report.line", "scene", "worker.client", "worker.protocol"},
    "synthetic": EVERYTHING,
    "training": EVERYTHING,
    "commands": EVERYTHING | {"commands"},
    "__main__": {"commands"},
}
"""Imports inside functions count, too; those for type checkers only do not. Any file may read the version."""

INSIDE_SLICER = ("scene.", "worker.client", "worker.protocol")


def imports(path: Path, at_start_only: bool) -> set[str]:
    """The modules that a file imports, without those for type checkers; perhaps only those at the file's top level."""
    found: set[str] = set()
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if at_start_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        if isinstance(node, ast.ImportFrom):
            inner = {f"{node.module}.{name.name}" for name in node.names}
            found |= (inner & MODULES.keys()) or {node.module}
        pending += ast.iter_child_nodes(node)
    return found


def subjects(module: str) -> set[str]:
    """Under which names the table may know a module: its package, and for some the file itself."""
    parts = module.removeprefix("GradProjIOLib.").split(".")
    return {parts[0], ".".join(parts[:2])}


def test_a_file_imports_only_what_the_table_allows():
    wrong = {}
    for module, path in MODULES.items():
        file = module.partition(".")[2]
        if file:
            allowed = MAY_IMPORT.get(file, MAY_IMPORT.get(file.split(".")[0]))
            own = [name for name in imports(path, at_start_only=False) if name.startswith("GradProjIOLib.")]
            wrong[module] = {name for name in own if not subjects(name) & allowed}
    assert {module: names for module, names in wrong.items() if names} == {}


def test_no_files_import_each_other_in_a_circle():
    graph = {name: imports(path, at_start_only=True) & MODULES.keys() for name, path in MODULES.items()}
    graphlib.TopologicalSorter(graph).prepare()  # Raises CycleError with the files of the circle.


def test_what_slicer_imports_loads_no_torch_and_no_qt():
    """Also not through the files that it imports."""
    reached: set[str] = set()
    pending = {name for name in MODULES if name.partition(".")[2].startswith(INSIDE_SLICER)}
    while pending:
        reached |= pending
        pending = set().union(*(imports(MODULES[name], at_start_only=True) for name in pending & MODULES.keys()))
        pending -= reached
    assert not {name.split(".")[0] for name in reached} & {"torch", "qt", "ctk", "PySide6"}


def test_no_file_is_too_long():
    """A file of more than 400 lines holds more than one subject."""
    limits = dict.fromkeys([*MODULES.values(), *(ROOT / "GradProjIO").rglob("*.py")], 400)
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in limits}
    too_long = {str(path.relative_to(ROOT)): lines for path, lines in lengths.items() if lines > limits[path]}
    assert too_long == {}
