"""The structure of the package and of its tests: which room may import which, and how docstrings begin."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

import flax_mlm

PACKAGE = Path(flax_mlm.__file__).parent
TESTS = PACKAGE.parent / "tests"
FILES = sorted(PACKAGE.rglob("*.py"))
LINE = re.search(r"(errors <.*)", " ".join(flax_mlm.__doc__.split()))[1].rstrip(".")
LAYER = {room: i for i, rooms in enumerate(LINE.split("<")) for room in map(str.strip, rooms.split(","))}
ROOMS = [name for name in LAYER if name not in ("errors", "commands")]
NOT_A_VERB = re.compile(r"(Of|That|What|Whether|The same)\b")


def name_of(file: Path) -> str:
    return str(file.relative_to(PACKAGE))


def room(file: Path) -> str:
    top = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return top if top in LAYER else "commands"


@cache
def imports(file: Path) -> set[Path]:
    """Files of the package that a file imports, wherever in it the import stands."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name_of(file)} has a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    paths = [PACKAGE.parent.joinpath(*name.split(".")[:k]) for name in names for k in range(2, name.count(".") + 2)]
    return {path.with_suffix(".py") for path in paths} & set(FILES) - {file}


@pytest.mark.parametrize("file", [file for file in FILES if file != PACKAGE / "__init__.py"], ids=name_of)
def test_imports_follow_the_layer_line(file):
    for imported in imports(file):
        own, other = room(file), room(imported)
        assert own == other != "commands" or LAYER[other] < LAYER[own], f"{own} imports {name_of(imported)}"


def test_no_circle_of_files():
    finished: set[Path] = set()

    def visit(file: Path, path: tuple[Path, ...]) -> None:
        assert file not in path, " -> ".join(map(name_of, (*path, file)))
        if file not in finished:
            for imported in imports(file):
                visit(imported, (*path, file))
            finished.add(file)

    for file in FILES:
        visit(file, ())


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_docstrings_begin_with_a_verb_or_a_noun(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node) or ""
            assert not NOT_A_VERB.match(docstring), f"line {getattr(node, 'lineno', 1)}: {docstring.splitlines()[0]}"


def test_configs_import_only_each_other():
    for file in (PACKAGE / "configs").glob("*.py"):
        nodes = ast.walk(ast.parse(file.read_text()))
        modules = {getattr(node, "module", "") for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)}
        assert modules <= {"ml_collections", "ml_collections.config_dict", "flax_mlm.configs"}, file.name


@pytest.mark.parametrize("name", ROOMS)
def test_rooms_have_empty_init_files(name):
    assert not (PACKAGE / name / "__init__.py").read_text()


def test_only_commands_and_cli_define_flags():
    for file in FILES:
        if room(file) not in ("cli", "commands"):
            assert "absl" not in re.sub(r'"absl"', "", file.read_text()), name_of(file)


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=lambda p: str(p.relative_to(TESTS)))
def test_tests_import_no_tests_and_assert_one_thing_a_line(path):
    tree = ast.parse(path.read_text())
    modules = [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    modules += [name.name for n in ast.walk(tree) if isinstance(n, ast.Import) for name in n.names]
    assert not [m for m in modules if m and re.search(r"(^|\.)(test_\w+|conftest)$", m)]
    assert not [n.lineno for n in ast.walk(tree) if isinstance(n, ast.Assert) and _is_and(n.test)]


def _is_and(node: ast.expr) -> bool:
    return isinstance(node, ast.BoolOp) and isinstance(node.op, ast.And)
