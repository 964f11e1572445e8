"""The metadata of an exported ONNX file: its facts, as ONNX's key-value pairs of strings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields

from zoo.common.documents import decode, parse_json
from zoo.errors import DocumentError, ExportError

__all__ = ["Metadata"]

_VERSION = "prunezoo"
"""The key that marks a file of this package; its value is the version of the metadata."""


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """Facts of a file; the defaults stand for what is unknown.

    Attributes:
        architecture: a registered name.
        profile: the reference of the profile, or the name of the policy.
        metric, compression_factor: the metric, and the factor that was reached.
        source_sha256: of the dense checkpoint.
        precision: of weights and arithmetic.
        num_classes: number of logits.
        classes: their names.
        image_shape: (channels, height, width) of the images it was exported for.
        mean, std: per channel, to normalise images in [0, 1] with.
        folded: whether the graph itself normalises.
        pad: widths were padded with channels of zeros to multiples of this; 1 for none.
    """

    architecture: str = ""
    profile: str = ""
    metric: str = ""
    compression_factor: float = 0.0
    source_sha256: str = ""
    precision: str = ""
    num_classes: int = 0
    classes: tuple[str, ...] = ()
    image_shape: tuple[int, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    folded: bool = False
    pad: int = 1

    def properties(self) -> dict[str, str]:
        """The known facts as strings, which ONNX stores; other types are written as JSON."""
        facts = ((field.name, getattr(self, field.name), field.default) for field in fields(self))
        known = {name: value for name, value, default in facts if value != default}
        texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in known.items()}
        return {_VERSION: "1", **texts}

    @classmethod
    def read(cls, properties: Mapping[str, str], name: str) -> Metadata:
        """The facts in the `properties` of the file `name`; defaults if another tool wrote it.

        Raises:
            ExportError: for a value of the wrong type, or an unknown version.
        """
        if _VERSION not in properties:
            return cls()
        if properties[_VERSION] != "1":
            raise ExportError(
                f"{name} was exported by a newer prunezoo, whose metadata have version "
                f"{properties[_VERSION]!r}; this one knows '1'."
            )
        kinds = {field.name: field.type for field in fields(cls)}
        try:
            raw = {
                key: text if kinds[key] == "str" else parse_json(text, f"{name}.{key}")
                for key, text in properties.items()
                if key in kinds
            }
            return decode(cls, raw, name)
        except DocumentError as error:
            raise ExportError(f"The metadata cannot be read: {error}") from None
