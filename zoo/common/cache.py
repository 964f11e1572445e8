"""The folder of what can be computed again."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_folder"]


def cache_folder() -> Path:
    """$ZOO_CACHE or ~/.cache/prunezoo.

    It keeps decoded images, traced groups, latencies of layers and TensorRT's engines.
    """
    return Path(os.environ.get("ZOO_CACHE", "~/.cache/prunezoo")).expanduser()
