"""Hides what libraries print and log about failures that they also raise."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any

__all__ = ["ONE_AT_A_TIME", "quiet"]

ONE_AT_A_TIME = threading.RLock()
"""Held by a thread that traces: torch.export and fake tensors patch torch for all threads."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress warnings, log records and what this thread prints.

    One thread at a time: logging, warning filters and standard streams are global to the process,
    and threads that changed and restored them in turn would leave them changed. What other threads
    print meanwhile is still printed.
    """
    with ONE_AT_A_TIME, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        disabled, streams = logging.root.manager.disable, (sys.stdout, sys.stderr)
        logging.disable(logging.CRITICAL)
        sys.stdout, sys.stderr = map(_MutedHere, streams)
        try:
            yield
        finally:
            sys.stdout, sys.stderr = streams
            logging.disable(disabled)


class _MutedHere:
    """A stream that drops what the thread that made it writes, and passes on the rest."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._thread = stream, threading.get_ident()

    def write(self, text: str) -> int:
        here = threading.get_ident() == self._thread
        return len(text) if here else self._stream.write(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
