"""The repository itself: imports point one way, and a file has one concern."""

import ast
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent
MODULES = {
    path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): ROOT / path
    for path in subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    if not path.startswith("tests/")
}


def imported_at_once(path):
    """The modules of this repository that a file imports when it is imported itself."""
    for node in ast.parse(path.read_text()).body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{name}" for name in names)]
        yield from (name for name in names if name in MODULES)


def test_no_circle_of_imports():
    graph = {name: set(imported_at_once(path)) for name, path in MODULES.items()}
    assert "kernels.packing" in graph["kernels"]
    while leaves := [name for name, imports in graph.items() if not imports & graph.keys() - {name}]:
        for name in leaves:
            del graph[name]
    assert not graph


def test_no_file_is_longer_than_500_lines():
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    code = [ROOT / name for name in names if name.endswith((".py", ".cpp", ".h")) and not name.startswith("tests/")]
    assert code and not [path.name for path in code if len(path.read_text().splitlines()) > 500]
