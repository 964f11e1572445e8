"""The cache key of a trace: a digest of all that it depends on. Equal keys, equal traces.

The key covers code as compiled in memory, not its source file, which may have been edited since. It
covers installed packages too, because these are edited and reinstalled under the same version. Only
Python, torch, NumPy and the zoo are identified by their versions.
"""

from __future__ import annotations

import dataclasses
import dis
import enum
import functools
import hashlib
import sys
import sysconfig
import types
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.utils.parametrize import is_parametrized

from zoo.surgery.surgery import named_tensors
from zoo.tracing.calls import Inputs, shapes_of
from zoo.tracing.fingerprint import digest, qualified_name, structure

__all__ = ["trace_key"]

PACKAGES = ("prunezoo", "torch", "torchvision", "timm", "numpy")
IDENTIFIED_BY_VERSION = sys.stdlib_module_names | {"zoo", "torch", "numpy"}
CONSTANTS = bool | int | float | complex | str | bytes | None | types.EllipsisType | enum.Enum
CONSTANTS |= torch.dtype | torch.device | torch.layout | torch.memory_format
ROOMS = ("spec", "surgery", "tracing", "models")
"""The folders of the zoo whose code affects a trace."""
METHODS = (types.FunctionType, staticmethod, classmethod, property)
"""What a class defines special methods as; `__doc__`, `__dict__` and such are none."""


def trace_key(module: nn.Module, inputs: Inputs) -> str | None:
    """sha256 of all that the trace of `module` depends on; None if that cannot be determined.

    It covers the structure and attributes, the shape and dtype of every tensor and of the inputs,
    which tensors are tied, versions, the rules of this package, and the code of the classes with
    all that it refers to. It is None for hooks, parametrizations, a `forward` set on an instance,
    and objects of unknown content; those in installed packages, which are many, count by class.
    """
    try:
        return digest(_dependencies(module, inputs))
    except (_UnknownError, ValueError):  # ValueError: an empty cell of a closure
        return None


class _UnknownError(Exception):
    """An object whose content cannot be described."""


def _dependencies(module: nn.Module, inputs: Inputs) -> Iterator[str]:
    yield f"{sys.version_info}{_versions()}{_rules()}"
    yield f"{shapes_of(inputs)}"
    yield from structure(module)
    first: dict[int, str] = {}
    for name, tensor in named_tensors(module).items():
        tied = first.setdefault(id(tensor), name)
        yield f"{name}={tied}:{tuple(tensor.shape)}{tensor.dtype}{type(tensor)}"
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        raise _UnknownError
    described = _Description()
    for layer in module.modules():
        hooked = layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__
        if hooked or is_parametrized(layer):
            raise _UnknownError
        described.add(type(layer))
        described.add(type(layer).forward)
        for name, value in layer.__dict__.items():
            if name not in _skipped_attributes():
                described.add(name)
                described.add(value)
    yield from described.lines


@functools.cache
def _versions() -> list[str]:
    return [version(name) for name in PACKAGES]


@functools.cache
def _rules() -> str:
    """A digest of the code that derives channel groups, and of the zoo's own networks."""
    home = Path(__file__).parents[1]
    files = [file for room in ROOMS for file in (home / room).glob("*.py")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()


@functools.cache
def _skipped_attributes() -> frozenset[str]:
    """Attributes to skip: those of every module, in the structure already, and the record."""
    return frozenset((*nn.Module().__dict__, "pruning"))


def _identified_by_version(name: str) -> bool:
    """Whether the module of this name is Python's, torch's, NumPy's or the zoo's."""
    return name.partition(".")[0] in IDENTIFIED_BY_VERSION and name != "__main__"


@functools.cache
def _installed(name: str) -> bool:
    """Whether the module of this name belongs to an installed package."""
    file = getattr(sys.modules.get(name), "__file__", None) or ""
    return any(Path(file).is_relative_to(sysconfig.get_path(key)) for key in ("purelib", "platlib"))


class _Description:
    """Lines that describe values, functions and classes, with all that they refer to."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.seen: dict[int, tuple[int, Any]] = {}
        self.waiting: list[tuple[str, Iterable[Any], bool]] = []
        self.tolerant = False

    def add(self, value: Any) -> None:
        """Describe `value` and all that it refers to.

        Raises:
            _UnknownError: if an object of an unknown kind is among them.
        """
        self._add(value)
        while self.waiting:  # not by recursion: packages refer to one another without end
            name, parts, self.tolerant = self.waiting.pop()
            self._add_all(name, parts)
        self.tolerant = False

    def _add(self, value: Any) -> None:
        if isinstance(value, CONSTANTS):
            self.lines.append(f"{type(value).__name__} {value!r}")
        elif isinstance(value, tuple | frozenset):  # equal ones may or may not be one object
            items = value if isinstance(value, tuple) else sorted(value, key=repr)
            self._add_all(type(value).__name__, items)
        elif id(value) in self.seen:
            self.lines.append(f"again {self.seen[id(value)][0]}")
        else:
            self.seen[id(value)] = len(self.seen), value
            self._add_new(value)

    def _add_new(self, value: Any) -> None:
        if isinstance(value, list):
            self._add_all("list", value)
        elif isinstance(value, set):
            self._add(frozenset(value))
        elif isinstance(value, dict):
            self._add_all("dict", [item for pair in value.items() for item in pair])
        elif isinstance(value, functools.partial):
            self._add_all("partial", (value.func, value.args, value.keywords))
        elif isinstance(value, property):
            self._add_all("property", (value.fget,))
        elif isinstance(value, staticmethod | classmethod):
            self._add_all(type(value).__name__, (value.__func__,))
        elif isinstance(value, types.CodeType):
            self._add_all(value.co_name, (value.co_code, value.co_names, value.co_consts))
        elif isinstance(value, type | types.FunctionType | types.BuiltinFunctionType):
            self._add_named(value)
        elif dataclasses.is_dataclass(value):
            self._add_all("dataclass", (type(value), vars(value)))
        elif self.tolerant:
            self.lines.append(qualified_name(type(value)))
        else:
            raise _UnknownError

    def _add_all(self, kind: str, values: Iterable[Any]) -> None:
        self.lines.append(f"{kind} (")
        for value in values:
            self._add(value)
        self.lines.append(")")

    def _add_named(self, value: Any) -> None:
        place, name = value.__module__ or "builtins", qualified_name(value)
        self.lines.append(name)
        if _identified_by_version(place):
            return
        tolerant = self.tolerant or _installed(place)
        if isinstance(value, types.FunctionType):
            self.waiting.append((name, _parts(value), tolerant))
        elif isinstance(value, type):
            own = [
                item
                for key, member in vars(value).items()
                if _may_run(value, key, member)
                for item in (key, member)
            ]
            self.waiting.append((name, (*value.__mro__[1:], *own), tolerant))
        elif not tolerant:
            raise _UnknownError


def _may_run(owner: type, name: str, member: Any) -> bool:
    """Whether a forward pass may use what a class defines: of special names, the methods.

    A module's `__init__` has run already, and that of a dataclass follows from its fields.
    """
    if name == "__init__":
        params = getattr(owner, "__dataclass_params__", None)
        return not (issubclass(owner, nn.Module) or (params is not None and params.init))
    return not name.startswith("__") or name == "__call__" or isinstance(member, METHODS)


def _parts(function: types.FunctionType) -> Iterator[Any]:
    """The code, defaults and closure of a function, and the globals that it refers to."""
    code = function.__code__
    yield from (code, function.__defaults__, function.__kwdefaults__)
    yield from (cell.cell_contents for cell in function.__closure__ or ())
    codes = list(_codes(code))
    names = {i.argval for c in codes for i in dis.get_instructions(c) if "GLOBAL" in i.opname}
    spaces = [function.__globals__]
    for space in spaces:
        for name in sorted(names):
            value = space.get(name)
            if not isinstance(value, types.ModuleType):
                yield value
            elif not _identified_by_version(value.__name__) and all(
                vars(value) is not s for s in spaces
            ):
                spaces.append(vars(value))
        names = {name for c in codes for name in c.co_names}  # any may be a module's attribute


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """`code` and the code objects nested in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)
