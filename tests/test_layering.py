"""Imports point down only, and training needs neither pymatgen nor matbench."""

import ast
import runpy
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "src" / "crysldnet"

LAYERS = [
    {"api"},
    {"cli", "__main__"},
    {"tools"},
    {"config"},
    {"inference"},
    {"finetune"},
    {"pretrain"},
    {"training"},
    {"artifacts"},
    {"readers", "html"},
    {"models"},
    {"encoders"},
    {"descriptors", "tabular"},
    {"data"},
    {"graphs"},
    {"build", "renames", "signals"},
    {"plugins"},
    {"io"},
    {"errors", "console", "measures", "platforms", "__init__"},
]
"""From the command line down. A module may import its own package and the layers below."""

MAY_TURN = {("__main__", "cli"), ("__init__", "inference"), ("__init__", "api")}
"""What the package offers in Python is imported on first use."""


def layer_of(name: str) -> int:
    return next(i for i, names in enumerate(LAYERS) if name in names)


def imported_modules(path: Path) -> set[str]:
    """Every module of the package that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "crysldnet":
            found |= {node.module} if "." in node.module else {f"crysldnet.{a.name}" for a in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name.startswith("crysldnet.")}
    return found


def imports_of(path: Path) -> set[str]:
    """First part below ``crysldnet`` of every import in a file."""
    found = {name.split(".")[1] for name in imported_modules(path)}
    return {name if any(name in names for names in LAYERS) else "__init__" for name in found}


def upward_imports(files: dict[str, set[str]]) -> list[str]:
    wrong = []
    for file, imported in files.items():
        own = file.split("/")[0].removesuffix(".py")
        for name in imported:
            if name != own and layer_of(name) <= layer_of(own) and (own, name) not in MAY_TURN:
                wrong.append(f"{file} imports {name}")
    return wrong


def test_imports_point_down_only():
    files = {str(path.relative_to(PACKAGE)): imports_of(path) for path in PACKAGE.rglob("*.py")}
    assert len(files) > 30
    assert upward_imports(files) == []


def test_a_tool_imports_no_other_tool():
    tools = PACKAGE / "tools"
    for path in tools.rglob("*.py"):
        own = path.relative_to(tools).parts[0].removesuffix(".py")
        imported = {name for name in imported_modules(path) if name.startswith("crysldnet.tools.")}
        assert {name.split(".")[2] for name in imported} <= {own}, path


def test_an_upward_import_is_found():
    assert upward_imports({"data/store.py": {"models"}}) == ["data/store.py imports models"]
    assert upward_imports({"encoders/pddformer.py": {"training", "data"}}) == ["encoders/pddformer.py imports training"]


def test_training_imports_neither_pymatgen_nor_matbench():
    modules = ", ".join(
        f"crysldnet.{name}" for name in ("pretrain", "finetune", "inference.predict", "inference.embed")
    )
    code = (
        f"import sys, {modules}; from crysldnet.config import compose; compose('pretrain');"
        "bad = {'pymatgen', 'matbench', 'matminer', 'wandb', 'gemmi'} & set(sys.modules); sys.exit(','.join(bad) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_drawing_of_the_layers_is_that_of_the_imports():
    drawing = runpy.run_path(str(PACKAGE.parents[1] / "docs" / "layers.py"))
    assert drawing["draw"]() == (PACKAGE.parents[1] / "docs" / "layers.svg").read_text(), "run: python docs/layers.py"
    assert len(drawing["levels"](drawing["imports"]())) > 5


def test_files_and_functions_are_short():
    long = []
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        if len(text.splitlines()) > 350:
            long.append(f"{path}: {len(text.splitlines())} lines, over 350")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                count = (node.end_lineno or 0) - node.lineno + 1
                if count > 60:
                    long.append(f"{path}: {node.name} has {count} lines, over 60")
    assert long == []
