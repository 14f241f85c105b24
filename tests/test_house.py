"""The structure of the package: which room may import which, and how docstrings begin."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

import flax_mlm

PACKAGE = Path(flax_mlm.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
LINE = re.search(r"(errors <.*)", " ".join(flax_mlm.__doc__.split()))[1].rstrip(".")
LAYER = {room: i for i, rooms in enumerate(LINE.split("<")) for room in map(str.strip, rooms.split(","))}
NOT_A_VERB = re.compile(r"(Of|That|What|Whether|The same)\b")


def room(file: Path) -> str:
    return file.parent.name if file.parent != PACKAGE else "errors" if file.stem == "errors" else "commands"


@cache
def imports(file: Path) -> set[Path]:
    """Files of the package that a file imports, wherever in it the import stands."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{file}: a relative import"
        if isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    paths = [PACKAGE.parent.joinpath(*name.split(".")[:k]) for name in names for k in range(2, name.count(".") + 2)]
    return {path.with_suffix(".py") for path in paths} & set(FILES) - {file}


def room_of_package(file: Path) -> str:
    top = file.relative_to(PACKAGE).parts[0]
    return top if top in LAYER else room(file)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_follow_the_layer_line(file):
    own = room_of_package(file)
    for imported in imports(file):
        other = room_of_package(imported)
        if file == PACKAGE / "__init__.py" or (own == other != "commands"):
            continue
        assert LAYER[other] < LAYER[own], f"{own} imports {imported.relative_to(PACKAGE)}"


def test_no_circle_of_files():
    finished: set[Path] = set()

    def visit(file: Path, path: tuple[Path, ...]) -> None:
        assert file not in path, " -> ".join(str(p.relative_to(PACKAGE)) for p in (*path, file))
        if file not in finished:
            for imported in imports(file):
                visit(imported, (*path, file))
            finished.add(file)

    for file in FILES:
        visit(file, ())


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_docstrings_begin_with_a_verb_or_a_noun(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node) or ""
            assert not NOT_A_VERB.match(docstring), f"line {getattr(node, 'lineno', 1)}: {docstring.splitlines()[0]}"


@pytest.mark.parametrize("room", [name for name in LAYER if name not in ("errors", "commands")])
def test_rooms_have_empty_init_files(room):
    assert not (PACKAGE / room / "__init__.py").read_text()


def test_only_commands_and_cli_define_flags():
    for file in FILES:
        if room_of_package(file) not in ("cli", "commands"):
            assert "absl" not in file.read_text(), file
