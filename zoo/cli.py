"""The `zoo` command line: its table of commands and its entry point.

A command is a frozen dataclass, whose fields are its flags, and a function that runs it. Both are
in `zoo.commands`.
"""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import tyro

import zoo
from zoo.commands.deploying import (
    BenchmarkCommand,
    CompareCommand,
    ExportCommand,
    benchmark,
    compare,
    export,
)
from zoo.commands.doctor import DoctorCommand, doctor
from zoo.commands.networks import (
    EvaluateCommand,
    FinetuneCommand,
    PruneCommand,
    TrainCommand,
    evaluate,
    finetune,
    prune,
    train,
)
from zoo.commands.profiles import ListCommand, ShowCommand, list_profiles, show
from zoo.commands.publishing import PublishCommand, VerifyCommand, publish, verify
from zoo.commands.searching import LedgerCommand, SearchCommand, ledger, search
from zoo.commands.shared import INTERRUPTED, as_flags, printable
from zoo.errors import ZooError, unknown

__all__ = ["COMMANDS", "main"]

LONGEST = 4000
"""Characters of an error; a hostile document can make it any length."""

USER_ERROR = 2
"""Exit code after an error that the user can fix."""

COMMANDS: dict[str, tuple[type, Callable[[Any], int | None]]] = {
    "list": (ListCommand, list_profiles),
    "show": (ShowCommand, show),
    "train": (TrainCommand, train),
    "prune": (PruneCommand, prune),
    "finetune": (FinetuneCommand, finetune),
    "evaluate": (EvaluateCommand, evaluate),
    "export": (ExportCommand, export),
    "benchmark": (BenchmarkCommand, benchmark),
    "compare": (CompareCommand, compare),
    "search": (SearchCommand, search),
    "ledger": (LedgerCommand, ledger),
    "publish": (PublishCommand, publish),
    "verify": (VerifyCommand, verify),
    "doctor": (DoctorCommand, doctor),
}
"""Name -> (dataclass of its flags, function that runs it)."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code: 2 after a user's error, 130 after Ctrl-C."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a bar or β is not worth a traceback
        sys.stdout.reconfigure(errors="replace")
    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if given[0] == "--version":
        print(f"zoo {zoo.__version__}")
        return 0
    own, warnings.formatwarning = warnings.formatwarning, _plain_warning
    try:
        if given[0] not in COMMANDS and not given[0].startswith("-"):
            raise unknown("command", given[0], COMMANDS)
        command = tyro.extras.subcommand_cli_from_dict(
            {name: _flags(name, given) for name in COMMANDS},
            prog="zoo",
            description="A model zoo of out-of-the-box channel-pruned networks.",
            args=given,
        )
        return COMMANDS[given[0]][1](command) or 0
    except (ZooError, OSError) as error:
        told = printable(as_flags(" ".join(str(error).split())))
        print(f"zoo: error: {told[:LONGEST]}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("zoo: interrupted", file=sys.stderr)
        return INTERRUPTED
    finally:
        warnings.formatwarning = own


def _plain_warning(message: Warning | str, *_: Any, **__: Any) -> str:
    """A warning as one line, without the line of code that gave it."""
    return f"zoo: warning: {printable(as_flags(' '.join(str(message).split())))}\n"


def _flags(name: str, given: Sequence[str]) -> Any:
    """The dataclass of a command; that of `search` is slow to import, and imported on demand."""
    if name == "search" == given[0]:
        from zoo.search.run import SearchConfig

        return SearchConfig
    return COMMANDS[name][0]
