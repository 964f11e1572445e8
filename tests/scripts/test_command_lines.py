"""Every script's command line can be built: no two of its options have one name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
OPTIONS = sorted(path for path in SCRIPTS.rglob("*.py") if "tyro." in path.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("script", OPTIONS, ids=[path.stem for path in OPTIONS])
def test_the_help_of_a_script_is_printed(script):
    done = subprocess.run(
        [sys.executable, str(script), "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout
