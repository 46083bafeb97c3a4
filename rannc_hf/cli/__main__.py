"""`python -m rannc_hf.cli`, where the command `rannc` is not on the path."""

from __future__ import annotations

import sys

from rannc_hf.cli import main

sys.exit(main())
