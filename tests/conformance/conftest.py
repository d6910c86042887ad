"""The suite leans on the literal oracle and the tiny networks of tests/model."""

import sys
from pathlib import Path

for folder in ("model", "conformance"):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / folder))
