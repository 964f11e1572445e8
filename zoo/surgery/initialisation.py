"""Re-initialisation of a pruned network with random weights."""

from __future__ import annotations

from torch import nn

from zoo.common.seeding import seeded
from zoo.errors import ZooError

__all__ = ["reinitialise"]


def reinitialise(module: nn.Module, seed: int) -> None:
    """Re-initialise `module` in place, by the `reset_parameters` of its layers.

    Raises:
        ZooError: if a layer with parameters has no such method.
    """
    with seeded(seed):
        for name, layer in module.named_modules():
            reset = getattr(layer, "reset_parameters", None)
            if callable(reset):
                reset()
            elif own := [key for key, _ in layer.named_parameters(recurse=False)]:
                raise ZooError(
                    f"init='random' does not know how to initialise {own[0]!r} of the "
                    f"{type(layer).__name__} {name!r}, which has no reset_parameters()."
                )
