"""The errors a user of the zoo can meet: each message gives the value and what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from numbers import Integral

__all__ = [
    "CheckpointError",
    "DataError",
    "DivergenceError",
    "DocumentError",
    "ExportError",
    "FactorError",
    "GraphError",
    "ZooError",
    "first_line",
    "integer",
    "unknown",
]


class ZooError(Exception):
    """Something the user asked for cannot be done; the message says what and what to do next."""


class DocumentError(ZooError):
    """A profile, registry entry or pruning record is malformed."""


class CheckpointError(ZooError):
    """A checkpoint cannot be read, is unsafe, or does not fit the architecture."""


class GraphError(ZooError):
    """The channel groups of a module cannot be derived, or surgery would give a wrong shape."""


class FactorError(ZooError):
    """A compression factor cannot be reached, or no profile exists for it."""


class DataError(ZooError):
    """A data set cannot be found or read, or does not fit the network."""


class DivergenceError(ZooError):
    """A training's loss stopped being a finite number."""


class ExportError(ZooError):
    """An ONNX file could not be written, or does not compute what the module computes."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its class if the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def unknown(
    kind: str, value: object, choices: Iterable[object], error: type[ZooError] = ZooError
) -> ZooError:
    """The error for a `value` that is not among `choices`, naming them and the nearest match."""
    names = [str(choice) for choice in choices]
    near = difflib.get_close_matches(str(value), names, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    listing = ", ".join(names) if names else "none"
    return error(f"Unknown {kind} {str(value)!r}.{hint} Known: {listing}.")


def integer(name: str, value: object, least: int | None = None) -> int:
    """`value` as an int; NumPy's integers are accepted.

    Raises:
        ZooError: if it is a bool, no integer, or less than `least`; the message names the argument.
    """
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or (least is not None and int(value) < least):  # type: ignore[call-overload]
        bound = "" if least is None else f" of at least {least}"
        raise ZooError(f"{name} must be an integer{bound}, got {value!r}.")
    found: int = int(value)  # type: ignore[call-overload]
    return found
