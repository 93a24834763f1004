"""Heavy and foreign packages are imported only inside functions, and only in the folders that own them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "onnxprune"

# package -> folders (or files) of onnxprune that may import it, inside functions
OWNERS: dict[str, tuple[str, ...]] = {
    "torch": ("convert", "training"),
    "safetensors": ("convert", "passes"),
    "tensorflow": ("convert",),
    "keras": ("convert",),
    "tf2onnx": ("convert",),
    "onnxruntime": ("runtime", "targets", "convert", "graph"),
    "onnxsim": ("passes",),
    "ai_edge_litert": ("runtime", "targets"),
    "PIL": ("data",),
    "pycocotools": ("evaluate",),
    "onnxscript": ("graph", "passes"),
}
FILES = sorted(PACKAGE.rglob("*.py"))


def imports_of(tree: ast.AST) -> list[tuple[str, bool]]:
    """(top-level package, whether the import runs when the module is imported) of every import statement."""
    found: list[tuple[str, bool]] = []

    def visit(node: ast.AST, *, at_import: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.extend((alias.name.partition(".")[0], at_import) for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and child.module and not child.level:
                found.append((child.module.partition(".")[0], at_import))
            is_function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))
            is_typing_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            visit(child, at_import=at_import and not is_function and not is_typing_only)

    visit(tree, at_import=True)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_heavy_packages_are_imported_in_functions_of_the_folders_that_own_them(path: Path) -> None:
    folder = path.relative_to(PACKAGE).parts[0]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for package, at_import in imports_of(tree):
        if package in OWNERS:
            assert not at_import, f"{path}: '{package}' is imported at module level"
            typing_only = folder not in OWNERS[package] and not _imported_at_runtime(tree, package)
            assert folder in OWNERS[package] or typing_only, f"{path}: '{package}' belongs to {OWNERS[package]}"


def _imported_at_runtime(tree: ast.Module, package: str) -> bool:
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    return any(name == package for name, _ in imports_of(tree))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_command_line_ends_the_process(path: Path) -> None:
    if path.relative_to(PACKAGE).parts[0] == "cli":
        return
    if path.name.endswith("_main.py") or path.name.endswith("_child.py"):
        return  # entry points of child processes
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        is_exit = isinstance(node, ast.Call) and ast.unparse(node.func) in ("sys.exit", "exit", "quit", "os._exit")
        assert not is_exit, f"{path}:{getattr(node, 'lineno', 0)} ends the process"


def test_the_layers_hold() -> None:
    import subprocess
    import sys

    linter = Path(sys.executable).parent / "lint-imports"
    if not linter.exists():
        pytest.skip("needs import-linter (extra 'dev')")
    completed = subprocess.run([linter], cwd=PACKAGE.parent, capture_output=True, text=True, check=False)
    assert completed.returncode == 0, completed.stdout
