"""The recipes are programs, not a package: their folder goes on the path as it does when one is run."""

from __future__ import annotations

import sys
from pathlib import Path

RECIPE = Path(__file__).parents[2] / "recipes" / "bert_pretraining"
sys.path.insert(0, str(RECIPE))
