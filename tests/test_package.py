"""The names of the package: loaded when used, and all there."""

import subprocess
import sys
from pathlib import Path

import pytest

import rannc_hf


def test_names_resolve():
    for name in rannc_hf.__all__:
        assert getattr(rannc_hf, name).__name__ == name
    assert set(rannc_hf.__all__) <= set(dir(rannc_hf))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = rannc_hf.nonsense


def test_import_is_light():
    program = "import sys, rannc_hf; rannc_hf.RanncConfig; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(rannc_hf.__file__).parents[1], timeout=60)
