"""Counts the faults that the suite injects and what became of each, and prints the table by kind.

A test is marked `@pytest.mark.fault(kind)` (see kinds.py) and records with the fixture `outcome`. Tests marked
`full` run only with `--faults` (or `--full`); with it the totals that the suite promises are checked too.
"""

import collections
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.fault_kinds import KINDS

OUTCOMES = ("detected", "recovered", "harmless")
PROMISED = {"kinds": 50, "cases": 120, "faults": 250, "kills": 40, "damages": 200}

_faults: dict[int, collections.Counter[str]] = collections.defaultdict(collections.Counter)
_totals: collections.Counter[str] = collections.Counter()


@pytest.fixture
def outcome(request: pytest.FixtureRequest) -> Callable[..., None]:
    """`outcome("detected", count=1, kills=0, damages=0)`: what became of `count` injected faults, after asserting
    so. `kills` of them were real SIGKILLs, `damages` flipped, truncated or deleted bytes."""
    marker = request.node.get_closest_marker("fault")
    assert marker, "a test that records an outcome needs @pytest.mark.fault(kind)"

    def record(what: str, count: int = 1, kills: int = 0, damages: int = 0) -> None:
        assert what in OUTCOMES
        _faults[marker.args[0]][what] += count
        _totals.update(faults=count, kills=kills, damages=damages)

    return record


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = (yield).get_result()
    marker = item.get_closest_marker("fault")
    if marker and (report.failed or (report.when == "call" and report.passed)):
        _faults[marker.args[0]]["failed" if report.failed else "cases"] += 1
        _totals["cases"] += 1


def table() -> list[str]:
    """Markdown: tried and outcomes by kind."""
    lines = [
        "| kind of fault | cases | tried | detected | recovered | harmless | lost or silent |",
        "|---|" + "--:|" * 6,
    ]
    for kind, name in KINDS.items():
        n = _faults[kind]
        tried = sum(n[o] for o in OUTCOMES)
        numbers = (n["cases"], tried, *(n[o] for o in OUTCOMES), n["failed"])
        lines.append(f"| {kind} {name} | " + " | ".join(str(x) if x else "" for x in numbers) + " |")
    return lines


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if not _totals:
        return
    kinds = sum(1 for n in _faults.values() if n["cases"])
    found = {**_totals, "kinds": kinds}
    failed = sum(n["failed"] for n in _faults.values())
    said = (
        f"{kinds} kinds of fault, {found['cases']} cases, {found.get('faults', 0)} injected faults "
        f"({found.get('kills', 0)} SIGKILLs, {found.get('damages', 0)} damaged bytes or files), {failed} failed"
    )
    terminalreporter.write_line("\n" + said)
    if path := config.getoption("--fault_report"):
        Path(path).write_text("\n".join([*table(), "", said, ""]))


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    # A run of the whole suite must keep its promise; one of single tests (-k, a file) need not.
    config = session.config
    if not config.getoption("--faults") or config.getoption("keyword") or exitstatus:
        return
    if [Path(a).name for a in config.args] != ["faults"]:
        return
    found = {**_totals, "kinds": sum(1 for n in _faults.values() if n["cases"])}
    short = [
        f"{found.get(name, 0)} {name} of {wanted}" for name, wanted in PROMISED.items() if found.get(name, 0) < wanted
    ]
    if short:
        session.exitstatus = 1
        print("\nfewer faults than promised: " + ", ".join(short))
