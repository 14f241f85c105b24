"""The scripts of docs/, which is no package."""

import importlib.util
import types

from tests.helpers.paths import ROOT


def docs_script(name: str) -> types.ModuleType:
    """Imports docs/NAME.py."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
