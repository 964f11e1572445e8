"""Recipes: how to train, as data. The named ones are the TOML files beside this one."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Literal, get_args

from zoo.common.documents import decode
from zoo.errors import DocumentError, ZooError, integer, unknown

__all__ = ["RECIPES", "Recipe", "read_recipe"]


Optimizer = Literal["sgd", "adamw"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class Recipe:
    """How to train: everything but the data, the teacher and the seed.

    Raises:
        ZooError: for a value out of its range.
    """

    epochs: int = 10
    """passes over the training data"""
    batch_size: int = 128
    """images per batch and process"""
    optimizer: Optimizer = "sgd"
    """sgd (with Nesterov momentum) or adamw"""
    lr: float = 0.1
    """peak learning rate"""
    momentum: float = 0.9
    """of sgd"""
    weight_decay: float = 5e-4
    """on weights of two and more dimensions; biases and norms have none"""
    warmup: float = 0.2
    """share of all steps in which the learning rate rises linearly; then it falls as a cosine"""
    label_smoothing: float = 0.0
    """of the cross-entropy"""
    clip_norm: float | None = 5.0
    """largest gradient norm; inf or None clips nothing"""
    augment: bool = True
    """random crops and mirroring, for the zoo's own image sets"""
    crop_scale: float = 1.0
    """smallest share of an image's area that a random crop takes and resizes (0.08 in Szegedy et
    al., 2015); 1 shifts images by up to an eighth of their side instead"""
    distill: float = 0.7
    """weight of the teacher's term in the loss, if there is one (Hinton et al., temperature 4)"""
    precision: Precision = "auto"
    """auto: bf16 where a CUDA device has it, else fp32; fp16 is not for CPUs"""
    accumulate: int = 1
    """batches whose mean gradient makes one step"""
    ema: float = 0.0
    """decay per step of a moving average of the weights, which is then measured and kept; the decay
    rises from 0 to this value; 0 for no average"""
    mixup: float = 0.0
    """alpha of mixup, 0 for none (Zhang et al., 2018); with cutmix, each batch gets one of them"""
    cutmix: float = 0.0
    """alpha of cutmix, 0 for none (Yun et al., 2019)"""
    rand_augment: int = 0
    """magnitude of RandAugment's two operations per image, 1 to 30, 0 for none (Cubuk et al.,
    2020), for the zoo's own image sets"""
    compile: bool = False
    """compile the network with torch.compile"""

    def __post_init__(self) -> None:
        for name, choices in (("optimizer", Optimizer), ("precision", Precision)):
            if (value := getattr(self, name)) not in get_args(choices):
                raise unknown(name, value, get_args(choices))
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if name in _WHOLE:
                integer(f"A recipe's {name}", value)
            elif value is not None and (isinstance(value, bool) or not isinstance(value, Real)):
                raise ZooError(f"A recipe's {name} must be a number, got {value!r}.")
            if value is not None and not low <= value <= high:
                bounds = f"at least {low:g}" if high == _ANY else f"from {low:g} to {high:g}"
                raise ZooError(f"A recipe's {name} must be {bounds}, got {value!r}.")


_ANY = float("inf")
_WHOLE = {"epochs", "batch_size", "accumulate", "rand_augment"}
_RANGES = {
    "epochs": (1, _ANY),
    "batch_size": (1, _ANY),
    "lr": (0, _ANY),
    "momentum": (0, 1),
    "weight_decay": (0, _ANY),
    "warmup": (0, 1),
    "label_smoothing": (0, 1),
    "clip_norm": (0, _ANY),
    "crop_scale": (0.01, 1),
    "distill": (0, 1),
    "accumulate": (1, _ANY),
    "ema": (0, 1),
    "mixup": (0, _ANY),
    "cutmix": (0, _ANY),
    "rand_augment": (0, 30),
}


def read_recipe(recipe: str | Path | Recipe) -> Recipe:
    """The recipe of a name in `RECIPES`, or of a TOML file; a `Recipe` is returned as it is.

    Raises:
        ZooError: for an unknown name, or a recipe of another type.
        DocumentError: for a file that is unreadable or malformed, an unknown key, or a value of the
            wrong type or out of its range.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Path) or str(recipe).endswith(".toml"):
        return _read(Path(recipe).expanduser())
    if not isinstance(recipe, str):
        raise ZooError(
            f"A recipe is {', '.join(RECIPES)}, the path of a .toml file, or a zoo.Recipe, as "
            f"zoo.Recipe(epochs=10); got {type(recipe).__name__} {recipe!r}."
        )
    if recipe not in RECIPES:
        raise unknown("recipe", recipe, [*RECIPES, "a path that ends in .toml"])
    return RECIPES[recipe]


def _read(path: Path) -> Recipe:
    try:
        return decode(Recipe, tomllib.loads(path.read_text(encoding="utf-8")), str(path))
    except tomllib.TOMLDecodeError as error:
        raise DocumentError(f"{path} is not valid TOML: {error}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DocumentError(f"The recipe {path} cannot be read: {error}.") from None
    except DocumentError:
        raise
    except ZooError as error:
        raise DocumentError(f"{path}: {error}") from None


RECIPES: dict[str, Recipe] = {
    name: _read(Path(__file__).with_name(f"{name}.toml")) for name in ("quick", "standard", "long")
}
"""The recipes that have a name."""
