"""Find the network in wrappers, and the tensors in what a checkpoint holds."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from zoo.common.notices import warn
from zoo.errors import CheckpointError

__all__ = ["AVERAGES", "WRAPPERS", "plain_name", "tensors_in", "unwrapped"]

WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
DEPTH = 5
"""Nested wrappers are opened this deep at most: a file can make a dictionary contain itself."""

AVERAGES = ("state_dict_ema", "model_ema", "ema")
"""Keys of averaged weights that stand beside those of `WRAPPERS`: in files of timm, torchvision's
training scripts and Ultralytics, all of which evaluate the average."""

CURRENT = "current_model_state"
"""Key of the weights that are no average in files of Lightning's WeightAveraging, whose average is
under `state_dict`."""

PREFIXES = ("module.", "model.")
"""What stands before all names of DataParallel, DistributedDataParallel and Lightning."""

_WITHIN = re.compile(
    r"(?<![^.])(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\."
)  # of torch.compile, checkpoint_wrapper and FullyShardedDataParallel


def plain_name(name: str) -> str:
    """The name of a tensor in a network none of whose parts is wrapped: compiled, sharded, ..."""
    return _WITHIN.sub("", name)


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside torch.compile, DataParallel and DistributedDataParallel."""
    while True:
        if isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def tensors_in(content: Any, what: str, ema: bool) -> tuple[dict[str, Tensor], bool | None]:
    """The innermost state dict of `content` without name prefixes, and whether it is an average.

    The second is None unless current and averaged weights stand side by side.
    """
    content, averaged = _unwrap(content, what, ema)
    state = {
        name: tensor.detach() if tensor.is_meta else tensor.detach().cpu()
        for name, tensor in _named(content).items()
    }
    if not state:
        keys = ", ".join(map(str, list(content)[:5])) if isinstance(content, Mapping) else ""
        raise CheckpointError(
            f"{what} holds no tensors where weights are looked for (the top level, or one of "
            f"{', '.join((*WRAPPERS, *AVERAGES))}); it has: {keys or type(content).__name__}."
        )
    return state, averaged


def _named(content: Any) -> dict[str, Tensor]:
    """The tensors at the top level of `content`, by their names in an unwrapped network."""
    found = content if isinstance(content, Mapping) else {}
    state = {str(name): item for name, item in found.items() if isinstance(item, Tensor)}
    state.pop("n_averaged", None)  # torch.optim.swa_utils.AveragedModel's counter
    plain = {plain_name(name): tensor for name, tensor in state.items()}
    state = plain if len(plain) == len(state) else state
    while prefix := next(
        (p for p in PREFIXES if state and all(k.startswith(p) for k in state)), None
    ):
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _unwrap(content: Any, what: str, ema: bool) -> tuple[Any, bool | None]:
    """`content` without its wrappers, and whether averaged weights were taken (see `_tensors`)."""
    averaged = None
    for _ in range(DEPTH):
        content, average, current = _opened(content)
        if average and current:
            taken = _chosen(content, average, current, what, ema)
            averaged = taken == average
            content = content[taken]
        elif average and not ema:
            raise CheckpointError(
                f"{what} holds averaged weights alone, in {average!r}; ema=True takes them."
            )
        elif average or current:
            content = content[average or current]
    return _opened(content)[0], averaged


def _opened(content: Any) -> tuple[Any, str | None, str | None]:
    """`content` (of a module, its state dict), and its keys of averaged and current weights."""
    if isinstance(content, nn.Module):
        content = content.state_dict()
    if not isinstance(content, Mapping):
        return content, None, None
    keys = [k for k, v in content.items() if isinstance(v, (Mapping, nn.Module))]
    average = next((key for key in AVERAGES if key in keys), None)
    current = next((key for key in WRAPPERS if key in keys), None)
    if average is None and current == "state_dict" and CURRENT in keys:
        return content, current, CURRENT
    return content, average, current


def _chosen(content: Mapping[str, Any], average: str, current: str, what: str, ema: bool) -> str:
    """The key of the weights to take; a warning says which unless `ema=False` decided it."""
    if not ema:
        return current
    own, averaged = (_named(_innermost(content[key])) for key in (current, average))
    lacking = [n for n in own if n not in averaged and not n.endswith("num_batches_tracked")]
    if lacking:
        warn(
            f"{what}: the weights in {current!r} were taken, because the averaged ones in "
            f"{average!r} lack {len(lacking)} tensors: {', '.join(lacking[:3])}."
        )
        return current
    warn(
        f"{what}: the averaged weights in {average!r} were taken, and those in {current!r} left "
        "out; ema=False takes these."
    )
    return average


def _innermost(content: Any) -> Any:
    """`content` without its wrappers; current weights are preferred to averaged ones."""
    for _ in range(DEPTH):
        content, average, current = _opened(content)
        content = content[current or average] if current or average else content
    return _opened(content)[0]
