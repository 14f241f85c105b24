"""Files that show a change which nobody meant."""

import pytest

from tests.helpers.paths import GOLDEN


def compare_golden(request: pytest.FixtureRequest, name: str, text: str) -> None:
    """Asserts that `text` is what tests/golden/NAME holds; `--update_golden` writes it there first."""
    file = GOLDEN / name
    if request.config.getoption("--update_golden"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert text == file.read_text(), f"{file} differs; run with --update_golden if that is meant, and say why"
