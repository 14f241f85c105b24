"""README and docs are true: links, commands, options and code; generated pages are current."""

import ast
import importlib
import inspect
import json
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml

from flax_mlm.config.knobs import knobs
from tests.helpers.documentation import docs_script
from tests.helpers.paths import ROOT

DOCS = ROOT / "docs"
PACKAGE = ROOT / "flax_mlm"
README = (ROOT / "README.md").read_text()
# What the tutorial and Jupyter write beside it is no page.
FILES = [p for p in DOCS.rglob("*") if not re.match(r"runs/|.*\.ipynb_checkpoints/", str(p.relative_to(DOCS)))]
PAGES = sorted(p for p in FILES if p.suffix in (".md", ".ipynb"))
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES]
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
COMMANDS = {p.stem for p in PACKAGE.glob("*.py") if re.search(r"\bapp\.run\(", p.read_text())}
# Scripts that pass options on to `train`.
TRAIN_SCRIPTS = ("local.sh", "compare_objectives.sh", "tpu.sh", "gke.sh", "slurm.sbatch")

generate, notebooks = docs_script("generate"), docs_script("notebooks")


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


@cache
def text_of(file: Path) -> str:
    """The Markdown of a page; of a notebook without its outputs."""
    text = file.read_text()
    return notebooks.to_markdown(json.loads(text), outputs=False) if file.suffix == ".ipynb" else text


def without_code(text: str) -> str:
    """Markdown without its blocks of code."""
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def command_lines(text: str) -> Iterator[list[str]]:
    """The words of each line of a text that runs one of our commands, modules or scripts."""
    lines = iter(text.splitlines())
    for line in lines:
        if not (match := re.search(r"(`?)((?:python -m (?:flax_mlm|benchmarks)\.|flax-mlm \w|bash |sbatch ).*)", line)):
            continue
        quoted, command = match.groups()
        if quoted:
            command = command.partition("`")[0]
        while True:
            try:
                words = shlex.split(command.removesuffix("\\"), comments=True)
            except ValueError:  # a quotation goes on in the next line
                words = []
            if words and not command.endswith("\\"):
                break
            command = command.removesuffix("\\") + " " + next(lines)
        yield ["python", "-m", f"flax_mlm.{words[1]}", *words[2:]] if words[0] == "flax-mlm" else words


def all_lines() -> list[tuple[str, list[str]]]:
    """The command lines of README, CONTRIBUTING, docs and the docstrings of configs, each with its file."""
    texts = [(name_of(file), text_of(file)) for file in TEXTS]
    texts += [(name_of(file), ast.get_docstring(ast.parse(file.read_text())) or "") for file in CONFIGS]
    return [(name, words) for name, text in texts for words in command_lines(text)]


def options_in(words: list[str]) -> list[str]:
    """The names of the options among words: `--name=value` or `--name`. What follows `--` is for another program."""
    words = words[: words.index("--")] if "--" in words else words
    return [word[2:].partition("=")[0] for word in words if re.match(r"--\w", word)]


@cache
def options_of(command: str) -> set[str]:
    return {name for o in generate.help_of(command).options for name in (o.name, f"no{o.name}")} | {"help"}


def unknown(options: list[str], known: set[str]) -> list[str]:
    fields = [option.removeprefix("config.") for option in options if option.startswith("config.")]
    missing = [f"config.{field}" for field in fields if field not in knobs()]
    return missing + [option for option in options if not option.startswith("config.") and option not in known]


# README


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 200


def test_the_readme_names_every_command():
    assert set(re.findall(r"^\| `python -m flax_mlm\.(\w+)`", README, re.MULTILINE)) == COMMANDS


def test_the_readme_names_every_config():
    assert set(re.findall(r"\(configs/(\w+\.py)\)", README)) == {p.name for p in CONFIGS}


def test_the_architecture_page_lists_every_file():
    listed = set()
    for section in (ROOT / "docs/development/architecture.md").read_text().split("\n### ")[1:]:
        folder = section.split("\n")[0]
        listed |= {f"{folder}/{file}" for file in re.findall(r"^\| `(\S+\.py)`", section, re.MULTILINE)}
    in_rooms = {str(p.relative_to(PACKAGE)) for p in PACKAGE.rglob("*.py") if p.parent.name != "configs"}
    assert listed == {file for file in in_rooms if "/" in file and not file.endswith("__init__.py")}


@pytest.mark.parametrize("file", ["README.md", "docs/development/architecture.md"])
def test_the_layout_is_the_tree(file):
    text = (ROOT / file).read_text()
    folders = {f"{p.parent.name}/" for p in PACKAGE.glob("*/__init__.py")}
    if file == "README.md":
        block = re.search(r"## Layout\n\n```text\n(.*?)```", text, re.DOTALL)[1]
        top, inner = block.split("flax_mlm/", 1)
        assert set(re.findall(r"\w+/", inner)) == folders
        assert all((ROOT / line.split()[0]).is_dir() for line in top.splitlines())
    else:
        assert set(re.findall(r"^\| `(\w+/)` ", text, re.MULTILINE)) == folders


# Links


def slugs(file: Path) -> set[str]:
    """The anchors of a page, as GitHub and mkdocs make them from headings."""
    headings = re.findall(r"^#+ (.+)$", without_code(text_of(file)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("file", TEXTS, ids=name_of)
def test_links_lead_somewhere(file):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(text_of(file))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        page = (file.parent / path).resolve() if path else file
        assert page.exists(), target
        assert file.parent == ROOT or page.is_relative_to(DOCS), f"{target} is not part of the site"
        assert not anchor or anchor in slugs(page), target


@pytest.mark.parametrize("file", TEXTS, ids=name_of)
def test_paths_in_the_text_exist(file):
    """`flax_mlm/train.py` and the like; names in capitals, globs and what users make are examples."""
    for path in re.findall(r"`((?:flax_mlm|configs|launch|tests|benchmarks|docs)/[\w./*-]*)", text_of(file)):
        if not re.search(r"[A-Z*]", path):
            assert (ROOT / path).exists(), path


def test_every_page_is_in_the_navigation():
    def pages(items: list) -> Iterator[str]:
        for item in items:
            if isinstance(item, str):
                yield item
            else:
                yield from pages([entry for value in item.values() for entry in value])

    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    assert sorted(pages(nav)) == sorted(str(page.relative_to(DOCS)) for page in PAGES)


@pytest.mark.parametrize("file", PAGES, ids=name_of)
def test_a_page_opens_with_what_the_reader_gets(file):
    text = re.sub(r"^<!--.*-->\n\n", "", text_of(file))
    assert re.match(r"# [^\n]+\n\n(This page |flax_mlm )", text)


# Commands


def test_every_command_is_documented():
    assert set(generate.COMMANDS) == COMMANDS


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_options_of_commands_exist(command):
    for file, words in all_lines():
        if words[:2] == ["python", "-m"] and words[2] == f"flax_mlm.{command}":
            assert not unknown(options_in(words), options_of(command)), (file, words)


def test_modules_exist():
    for file, words in all_lines():
        if words[:2] == ["python", "-m"] and "NAME" not in words[2]:
            assert (ROOT / f"{words[2].replace('.', '/')}.py").exists(), (file, words)


def test_configs_exist():
    for file, words in all_lines():
        for name in re.findall(r"--config=([^\s:]+)", " ".join(words)):
            assert name == "..." or name.isupper() or ROOT / "configs" / f"{name}.py" in CONFIGS, (file, name)


def test_options_of_scripts_exist():
    conftests = "".join(file.read_text() for file in (ROOT / "tests").rglob("conftest.py"))
    for file, words in all_lines():
        scripts = [word for word in words if re.match(r"(launch|benchmarks)/[\w.]+$", word)]
        if words[0] not in ("bash", "sbatch") or not scripts:
            continue
        script = ROOT / scripts[0]
        assert script.exists(), (file, words)
        text, own = script.read_text(), words[words.index(scripts[0]) + 1 :]
        known = {option for option in options_in(own) if f"--{option}" in text}
        if script.name in TRAIN_SCRIPTS:
            known |= options_of("train")
        if script.name == "test.sh":
            known |= {option for option in options_in(own) if f'"--{option}"' in conftests}
        if script.parent.name == "launch":
            assert not unknown(options_in(own), known), (file, words)
        if script.name == "tpu.sh":
            assert own[0] in re.findall(r"[a-z]+", re.search(r"^check \|.*\) ;;$", text, re.MULTILINE)[0]), own


def test_the_parser_of_command_lines_finds_mistakes():
    text = (
        "Run `python -m flax_mlm.train --workdri=x`, or\n    python -m flax_mlm.train \\\n        --config.train.step=1"
    )
    lines = list(command_lines(text))
    assert [unknown(options_in(words), options_of("train")) for words in lines] == [["workdri"], ["config.train.step"]]


# Code and generated pages


def python_blocks() -> list[tuple[str, str]]:
    pattern = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
    return [(name_of(file), block) for file in TEXTS for block in pattern.findall(text_of(file))]


@pytest.mark.parametrize(("file", "block"), python_blocks(), ids=lambda x: x if x.endswith(".md") else "")
def test_python_blocks_compile_and_their_names_exist(file, block):
    tree = ast.parse(block)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "flax_mlm":
            module = importlib.import_module(node.module)
            for alias in node.names:
                if not hasattr(module, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "flax_mlm":
            assert hasattr(importlib.import_module("flax_mlm"), node.attr)


def functions_of_the_python_page() -> list[str]:
    return re.findall(r"^::: ([\w.]+)$", (DOCS / "reference" / "python-api.md").read_text(), re.MULTILINE)


def test_the_functions_of_the_python_page_exist():
    assert functions_of_the_python_page()
    for name in functions_of_the_python_page():
        module, _, function = name.rpartition(".")
        assert getattr(importlib.import_module(module), function).__doc__, name


def test_the_site_takes_no_sentence_for_a_type():
    """mkdocstrings shows what precedes a colon in the first line of `Returns:` as a type."""
    for name in functions_of_the_python_page():
        module, _, function = name.rpartition(".")
        listed = getattr(importlib.import_module(module), function)
        for described in [listed, *vars(listed).values()] if inspect.isclass(listed) else [listed]:
            first_lines = re.findall(r"Returns:\n *(.*)", getattr(described, "__doc__", None) or "")
            assert not any(": " in line for line in first_lines), (name, first_lines)


def test_every_field_is_explained():
    assert not [entry.name for entry in generate.entries() if not entry.comment]
    source = (ROOT / "configs" / "base.py").read_text()
    assert not re.findall(r"\bNone\b|\[", re.sub("#.*", "", source.split('"""', 2)[2]))


def test_the_reference_lists_type_default_allowed_values_and_comment():
    entries = {entry.name: entry for entry in generate.entries()}
    depth, dtype, scan = (entries[f"model.{name}"] for name in ("num_layers", "dtype", "scan_layers"))
    assert depth == ("model.num_layers", "int", 4, "at least 1", "N")
    assert dtype.allowed == "float32 | bfloat16"
    assert dtype.comment.startswith("of the computation: ")
    assert (scan.type, scan.default, scan.allowed) == ("bool or none", None, "")
    assert scan.comment.startswith("True: scan one compiled layer; ")
    assert scan.comment.endswith(" otherwise scan")


def test_generated_pages_are_current():
    assert not generate.stale(), "run python docs/generate.py"
