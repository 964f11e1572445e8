"""Sizes of images: pixels per side where they are square, else (height, width). No torch."""

from __future__ import annotations

import re

from zoo.errors import ZooError, integer

__all__ = ["Size", "checked_size", "parsed_size", "resolution", "sides", "spelled"]

Size = int | tuple[int, int]


def checked_size(name: str, value: object) -> Size:
    """`value` as a `Size`; a square becomes one integer: (96, 96) gives 96.

    Raises:
        ZooError: unless it is one or two integers of at least 1; the message names it.
    """
    if isinstance(value, tuple | list) and len(value) == 2:
        height = integer(f"The height of {name}", value[0], 1)
        width = integer(f"The width of {name}", value[1], 1)
        return height if height == width else (height, width)
    try:
        return integer(name, value, 1)
    except ZooError as error:
        raise ZooError(f"{error} For images that are not square, give (height, width).") from None


def parsed_size(name: str, text: str) -> Size:
    """The size written in `text`, such as 96, or 96x320 for a height of 96.

    Raises:
        ZooError: for any other text; the message names the argument.
    """
    found = re.fullmatch(r"([1-9][0-9]*)(?:x([1-9][0-9]*))?", text)
    if found is None:
        raise ZooError(
            f"{name} is the pixels per side, as 96, or height and width, as 96x320; got {text!r}."
        )
    height, width = found.groups()
    return checked_size(name, (int(height), int(width or height)))


def sides(size: Size) -> tuple[int, int]:
    """`size` as (height, width)."""
    return (size, size) if isinstance(size, int) else size


def spelled(size: Size) -> str:
    """`size` as text that `parsed_size` reads: 96, or 96x320."""
    return str(size) if isinstance(size, int) else resolution(size)


def resolution(size: Size) -> str:
    """Both sides as text: 96x96, or 96x320."""
    return "x".join(map(str, sides(size)))
