"""Where the repository and its data are."""

from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
SHARED = ROOT.parent / "shared" / "data"  # real corpora and labelled sets; tests that use them skip without
GOLDEN = ROOT / "tests" / "golden"
