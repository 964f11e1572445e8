"""Warnings that point at the user's line."""

from __future__ import annotations

import sys
import warnings

__all__ = ["warn"]

_DECORATORS = {"contextlib", "torch.utils._contextlib"}


def warn(message: str) -> None:
    """Warn of `message` at the line that called the zoo, however deep in the zoo this is."""
    frame = caller = sys._getframe(1)
    while outer := frame.f_back:
        inside = frame.f_globals.get("__name__", "").partition(".")[0] == "zoo"
        if inside or (caller is frame and frame.f_globals.get("__name__") in _DECORATORS):
            caller = outer
        frame = outer
    name, registry = caller.f_globals.get("__name__"), caller.f_globals
    warnings.warn_explicit(
        message, UserWarning, caller.f_code.co_filename, caller.f_lineno, name,
        registry.setdefault("__warningregistry__", {}),
    )  # fmt: skip
