"""No import goes up: support, common, tiny, metrics, and above them the stages and the tools."""

import ast
from pathlib import Path

import pytest

from support.files import ROOT

LAYERS = ("support", "common", "tiny", "metrics")
ABOVE = {"collect_ode", "adp", "adm", "sample", "evaluate", "tools"}  # which may import anything
EXCEPTIONS = {
    "tiny/mixture.py": {"adm", "adp", "metrics", "tools"},  # a script of its own, that nothing imports
    "tiny/train.py": {"tools"},  # a script; it reads a teacher's configs as tools.meta does
}


def list_files(*patterns):
    """Paths from the root."""
    root = Path(ROOT)
    paths = [path for pattern in patterns for path in root.glob(pattern)]
    return [path.relative_to(root).as_posix() for path in paths]


def find_imports(file):
    """The names that a file imports, anywhere in it, as "support.files.ROOT"."""
    names = set()
    for node in ast.walk(ast.parse(Path(ROOT, file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("layer", LAYERS)
def test_no_import_goes_up(layer):
    above = ABOVE.union(LAYERS[LAYERS.index(layer) + 1 :])
    files = list_files(f"{layer}.py", f"{layer}/*.py")
    assert files
    for file in files:
        imported = {name.split(".")[0] for name in find_imports(file)}
        assert imported & above == EXCEPTIONS.get(file, set()), file


def test_nothing_imports_the_mixture():
    for file in list_files("*.py", "support/*.py", "tiny/*.py", "metrics/*.py", "tools/*.py"):
        for name in find_imports(file):
            assert not f"{name}.".startswith("tiny.mixture."), file
