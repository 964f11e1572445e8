"""Frozen dataclasses to JSON documents and back, strictly: an unknown or missing key is an error.

Writing is atomic: a file is either the complete new document or the old one.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import os
import reprlib
import secrets
import types
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from zoo.errors import DocumentError, unknown

__all__ = [
    "LARGEST",
    "SCHEMA_VERSION",
    "decode",
    "decode_document",
    "encode",
    "encode_document",
    "parse_json",
    "read_json",
    "read_text",
    "write_json",
    "write_text",
]

SCHEMA_VERSION = 1

LARGEST = 64 << 20
"""Bytes of a document; those of the largest networks have a hundredth of it."""

T = TypeVar("T")


def encode(value: Any, *, terse: bool = False) -> Any:
    """A dataclass, or containers of them, as plain JSON values.

    `None` fields are left out; with `terse`, also fields that equal their default.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = ((f, getattr(value, f.name)) for f in dataclasses.fields(value))
        return {
            field.name: encode(item, terse=terse)
            for field, item in fields
            if item is not None and not (terse and item == field.default)
        }
    if isinstance(value, Mapping):
        return {str(key): encode(item, terse=terse) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(item, terse=terse) for item in value]
    return value


def decode(cls: type[T], raw: Any, where: str) -> T:
    """A `cls` from the JSON value `raw`; `where` names the place in error messages.

    Raises:
        DocumentError: for an unknown key (with the nearest known one), a missing key, or a value
            of the wrong type.
    """
    return typing.cast(T, _decode(cls, raw, where))


def encode_document(value: Any, *, terse: bool = False) -> dict[str, Any]:
    """`encode(value)` with the schema version added: a whole document."""
    return {"schema_version": SCHEMA_VERSION, **encode(value, terse=terse)}


def decode_document(cls: type[T], raw: Any, where: str) -> T:
    """A `cls` from the whole document `raw`; `where` names it in error messages.

    Raises:
        DocumentError: if the schema version is missing or another one, and as `decode`.
    """
    body = dict(_expect(raw, dict, where))
    version = body.pop("schema_version", None)
    if version != SCHEMA_VERSION:
        raise DocumentError(
            f"{where}: schema_version is {version!r}, this version reads {SCHEMA_VERSION}."
        )
    return decode(cls, body, where)


def _decode(kind: Any, raw: Any, where: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(typing.cast(type, kind), raw, where)
    if origin in (typing.Union, types.UnionType):
        inner = [arg for arg in args if arg is not type(None)]
        return None if raw is None and len(inner) < len(args) else _decode(inner[0], raw, where)
    if origin is tuple:
        items = _expect(raw, list, where)
        if args == (int, ...) and all(type(item) is int for item in items):
            return tuple(items)
        if args[-1] is not Ellipsis and len(items) != len(args):
            raise DocumentError(f"{where}: expected {len(args)} items, got {len(items)}.")
        item_kinds = [args[0]] * len(items) if args[-1] is Ellipsis else args
        pairs = zip(item_kinds, items, strict=True)
        return tuple(_decode(k, item, f"{where}[{n}]") for n, (k, item) in enumerate(pairs))
    if origin is dict:
        items = _expect(raw, dict, where)
        return {key: _decode(args[1], item, f"{where}.{key}") for key, item in items.items()}
    if origin is typing.Literal:
        if raw not in args:
            raise unknown(f"value of {where}:", raw, args, DocumentError)
        return raw
    if kind is Any:
        return raw
    if kind is float:
        if isinstance(raw, bool) or not isinstance(raw, (int, float)):
            raise DocumentError(f"{where}: expected a number, got {reprlib.repr(raw)}.")
        try:
            return float(raw)
        except OverflowError:
            raise DocumentError(f"{where}: {str(raw)[:12]}... is too large a number.") from None
    if kind is int and isinstance(raw, bool):
        raise DocumentError(f"{where}: expected an integer, got {raw!r}.")
    return _expect(raw, kind, where)


@functools.cache
def _layout(cls: type) -> tuple[dict[str, Any], dict[str, dataclasses.Field[Any]]]:
    """The types and the fields of a dataclass, by name."""
    return typing.get_type_hints(cls), {field.name: field for field in dataclasses.fields(cls)}


def _decode_dataclass(cls: type, raw: Any, where: str) -> Any:
    items = _expect(raw, dict, where)
    hints, fields = _layout(cls)
    for key in items:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise DocumentError(
                f"{where}: unknown key {reprlib.repr(key)}.{hint} Known: {', '.join(fields)}."
            )
    values = {}
    for name, field in fields.items():
        if name in items:
            values[name] = _decode(hints[name], items[name], f"{where}.{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise DocumentError(f"{where}: the key {name!r} is missing.")
    return cls(**values)


def _expect(raw: Any, kind: type, where: str) -> Any:
    if not isinstance(raw, kind):
        names = {dict: "an object", list: "a list", str: "a string", int: "an integer"}
        got = reprlib.repr(raw)
        raise DocumentError(f"{where}: expected {names.get(kind, kind.__name__)}, got {got}.")
    return raw


def read_json(path: Path) -> Any:
    """The JSON value in the file at `path`, of at most `LARGEST` bytes.

    Raises:
        DocumentError: for a file that is missing, larger, or no JSON that can be read.
    """
    return parse_json(read_text(path), str(path))


def parse_json(text: str | bytes, where: str) -> Any:
    """The JSON value in `text`; `where` names it in error messages.

    Raises:
        DocumentError: for text that is no JSON that can be read.
    """
    try:
        return json.loads(text, parse_constant=_no_constant, parse_float=_finite)
    except json.JSONDecodeError as error:
        raise DocumentError(f"{where} is not valid JSON: {error}.") from None
    except RecursionError:
        raise DocumentError(f"{where} is not a document: it is nested too deeply.") from None
    except ValueError as error:  # no UTF-8, NaN, infinity, an integer of thousands of digits
        raise DocumentError(f"{where} is not a document: {error}.") from None


def read_text(path: Path) -> str:
    """The text in the file at `path`, of at most `LARGEST` bytes.

    Raises:
        DocumentError: for a file that is missing, larger, or no text in UTF-8.
    """
    try:
        with path.open("rb") as stream:
            content = stream.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise DocumentError(f"{path} has more than {LARGEST:,} bytes: it is no document.")
        return content.decode("utf-8")
    except FileNotFoundError:
        raise DocumentError(f"{path} does not exist.") from None
    except (OSError, ValueError) as error:  # no UTF-8, or a path that no system has
        raise DocumentError(f"{path} cannot be read: {error}.") from None


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:24]} is too large a number")
    return number


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")


def write_json(path: Path, value: Any, *, indent: int | None = 1) -> None:
    """Write `value` (dataclasses allowed) to `path` as JSON, atomically; unindented on one line."""
    separators = (",", ": ") if indent else (",", ":")
    text = json.dumps(encode(value), indent=indent, separators=separators, ensure_ascii=False)
    write_text(path, text + "\n")


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically: on failure the old file is left as it was."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path`, renamed to `path` at the end or removed on failure.

    The folder is created. The name keeps the suffix of `path` and is random, not the process id:
    two containers that share a folder may have processes with the same id.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{secrets.token_hex(8)}.{path.name}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
