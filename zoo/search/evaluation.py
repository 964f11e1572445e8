"""The accuracies of candidates, measured many at a time and each only once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from zoo.errors import ZooError
from zoo.search.fidelities import Fidelity
from zoo.search.ledger import Key, Ledger, Row
from zoo.search.tasks import (
    Candidate,
)
from zoo.search.workers import InProcess, Pool

__all__ = ["Evaluate", "Evaluator"]

Evaluate = Callable[[Sequence[Candidate]], Sequence[float]]
"""Candidates -> their validation accuracies in [0, 1], in the same order."""


class Evaluator:
    """Accuracies of candidates at a fidelity, each measured once and kept in a ledger.

    Args:
        ledger: the known rows; each new row is added at once.
        pool: where evaluations run; this process by default.

    Attributes:
        measured: how many evaluations were run.
        replayed: the rows asked for that the ledger had from an earlier run.
    """

    def __init__(self, ledger: Ledger, pool: Pool | None = None) -> None:
        self.ledger, self.pool = ledger, pool or InProcess()
        self.measured = 0
        self.replayed: dict[Key, Row] = {}
        self._earlier = {row.key for row in ledger}

    @property
    def spent(self) -> tuple[int, float]:
        """The number of evaluations, replayed ones included, and the replayed ones' seconds."""
        seconds = sum(row.seconds for row in self.replayed.values())
        return self.measured + len(self.replayed), seconds

    def __call__(
        self,
        candidates: Sequence[Candidate],
        fidelity: Fidelity,
        source: str | Sequence[str] | None = None,
    ) -> list[float]:
        """The accuracies in [0, 1] of `candidates`, in order.

        Args:
            candidates: what to measure; equal ones are measured once.
            fidelity: how to measure.
            source: the agent or policy that asks (`ppo`, `equal`, ...), of all or of each, for the
                ledger's summary.

        Raises:
            ZooError: for an accuracy that is not a number in [0, 1]; it is not kept.
        """
        keys = [_key(candidate, fidelity) for candidate in candidates]
        if source is None or isinstance(source, str):
            source = [source or ""] * len(keys)
        missing: dict[Key, tuple[Candidate, str]] = {}
        for key, candidate, asking in zip(keys, candidates, source, strict=True):
            known = self.ledger.get(key)
            if known is None:
                missing.setdefault(key, (candidate, asking))
            elif key in self._earlier:
                self.replayed[key] = known
        for key, accuracy, seconds in self._measured(missing, fidelity):
            self.ledger.add(Row(key, accuracy, round(seconds, 3), missing[key][1] or None))
            self.measured += 1
        rows = [self.ledger.get(key) for key in keys]
        return [row.accuracy for row in rows if row is not None]

    def _measured(
        self, missing: dict[Key, tuple[Candidate, str]], fidelity: Fidelity
    ) -> Iterator[tuple[Key, float, float]]:
        keys, candidates = list(missing), [candidate for candidate, _ in missing.values()]
        for index, accuracy, seconds in self.pool.run(candidates, fidelity):
            if not math.isfinite(accuracy) or not 0 <= accuracy <= 1:
                raise ZooError(
                    f"{candidates[index].task.name} pruned to {list(keys[index].widths)} was given "
                    f"an accuracy of {accuracy} by {fidelity.name}; it must be in [0, 1]."
                )
            yield keys[index], accuracy, seconds


def _key(candidate: Candidate, fidelity: Fidelity) -> Key:
    task = candidate.task
    return Key(
        network=task.network,
        split=task.data_digest,
        classes=len(task.val.classes),
        image_size=task.val.images.shape[-1],
        widths=tuple(int(width) for width in candidate.widths),
        criterion=candidate.criterion,
        seed=candidate.seed,
        fidelity=fidelity.name,
    )
