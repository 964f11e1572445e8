"""A pruned network's folder as a repository that others can use, laid out as their tools expect.

README.md                   the card
config.json                 what it is: classes, images, kept widths, profile
preprocessor_config.json    how a picture becomes its input
pruning.json, model.safetensors
onnx/model.onnx, model_fp16.onnx, model_quantized.onnx
SHA256SUMS                  of all these
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import nn

from zoo.common.documents import (
    encode_document,
    write_json,
    write_text,
)
from zoo.data.images import AnyImages
from zoo.deployment.exporting import ExportResult, export
from zoo.deployment.options import ExportOptions
from zoo.errors import ExportError, ZooError, first_line
from zoo.publishing.checksums import write_checksums
from zoo.publishing.model_card import TAG, model_card
from zoo.publishing.options import FILES, PublishOptions
from zoo.registry.store import digest_of_profile, get_profile
from zoo.spec.plans import PruningRecord
from zoo.storage.artefacts import MODEL, README, read_model
from zoo.storage.checkpoints import RECORD
from zoo.storage.readme import images_of

__all__ = ["CONFIG", "PREPROCESSOR", "config_of", "write_repository"]

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"

MODEL_TYPE = TAG
"""No type of transformers': its classes would build another network, with random weights."""

BOX = 4
"""PIL's number for the resampling by area that `zoo.load_data` uses."""


def write_repository(
    folder: Path, out: Path, reference: str, data: AnyImages | None, options: PublishOptions
) -> None:
    """Write the repository of the pruned network in `folder` into the empty folder `out`.

    Args:
        folder: as `zoo.save` writes it.
        out: an empty folder.
        reference: of the repository, for its card.
        data: images with labels that the files are compared and the accuracy is measured on, and
            whose classes, mean and std are published.
        options: what else to say.

    Raises:
        ZooError: for a folder that is no pruned network, or one of no registered architecture;
            images of other classes; int8 without data.
        ExportError: if an ONNX file does not compute what the network does.
    """
    if not (data is None or (isinstance(data, AnyImages) and len(data))):
        raise ZooError(
            f"data must be images of zoo.load_data with at least one of them, as its .test, got "
            f"{type(data).__name__}."
        )
    raw = PruningRecord.read(folder / RECORD)
    if not raw.architecture:
        raise ZooError(
            f"{folder} holds a network of no registered architecture, which others could not load "
            "without its code: it cannot be published."
        )
    model = read_model(folder)
    digest = _digest_of_profile(raw)
    model.pruning = record = _without_places(raw)  # type: ignore[assignment]
    classes = _class_names(record, data)
    _check_images(record, data, options)
    shutil.copyfile(folder / MODEL, out / MODEL)
    write_json(out / RECORD, encode_document(record))
    exports, lacking = _exports(model, out, data, options)
    config = config_of(record, classes)
    write_json(out / CONFIG, config | ({"profile_sha256": digest} if digest else {}))
    mean, std = _normalisation(data, options)
    if mean and std:
        write_json(out / PREPROCESSOR, _preprocessor(record, mean, std))
    accuracy = None
    if data is not None:
        from zoo.training.finetuning import evaluate

        accuracy = evaluate(model, data).accuracy
    card = model_card(record, reference, exports, lacking, data, accuracy, (mean, std), options)
    write_text(out / README, card)
    write_checksums(out)


def _without_places(record: PruningRecord) -> PruningRecord:
    """The record without the folders of the machine that it was made on."""
    rewind = record.rewind
    return replace(
        record,
        source=replace(record.source, reference=_named(record.source.reference)),
        rewind=rewind and replace(rewind, reference=_named(rewind.reference)),
        plan=replace(record.plan, profile=_named(record.plan.profile)),
    )


def _named(reference: str) -> str:
    """A reference without the folders of a local path."""
    kind, colon, rest = reference.partition(":")
    if colon and kind in ("file", "learned"):
        return f"{kind}:{Path(rest).name}"
    return reference if kind in ("hf", "bundled", "published") else Path(reference).name


def _digest_of_profile(record: PruningRecord) -> str | None:
    """sha256 of the profile's document, if it is at hand and gives the widths of the record."""
    reference = record.plan.profile
    if (digest := digest_of_profile(reference)) is None:
        return None
    return digest if get_profile(reference).kept == record.plan.widths else None


def _check_images(record: PruningRecord, data: AnyImages | None, options: PublishOptions) -> None:
    """Refuse images of another size than the network's, and a mean of other channels."""
    if data is not None and tuple(data[0][0].shape[1:]) != tuple(_sides(record)):
        height, width = data[0][0].shape[1:]
        raise ZooError(
            f"{data.name} has images of {height}x{width} pixels, the network is for "
            f"{images_of(record)}: load the data with size={record.size}."
        )
    if options.mean is not None and len(options.mean) != record.in_channels:
        raise ZooError(
            f"mean= has {len(options.mean)} numbers, the images {record.in_channels} channels."
        )


def config_of(record: PruningRecord, classes: Sequence[str]) -> dict[str, Any]:
    """The config.json of a network: facts of its record, and the names of its classes."""
    plan = record.plan
    return {
        "model_type": MODEL_TYPE,
        "architecture": record.architecture,
        "num_labels": record.num_classes,
        "id2label": {str(number): name for number, name in enumerate(classes)},
        "label2id": {name: number for number, name in enumerate(classes)},
        "num_channels": record.in_channels,
        "image_size": _sides(record),
        "kept": plan.widths,
        "profile": plan.profile,
        "metric": plan.metric,
        "compression_factor": plan.got,
        "criterion": plan.criterion,
        "seed": plan.seed,
        "params": asdict(plan.pruned)["params"],
        "macs": asdict(plan.pruned)["macs"],
        "prunezoo_version": record.versions.get("prunezoo", ""),
    }


def _sides(record: PruningRecord) -> list[int]:
    from zoo.common.sizes import sides

    return list(sides(record.size))


def _class_names(record: PruningRecord, data: AnyImages | None) -> tuple[str, ...]:
    """The data's, or the names that transformers gives to classes without any."""
    if data is None:
        return tuple(f"LABEL_{number}" for number in range(record.num_classes))
    if len(data.classes) != record.num_classes:
        raise ZooError(
            f"{data.name} has {len(data.classes)} classes, the network {record.num_classes}: give "
            f"the data that it was trained for."
        )
    if len(set(data.classes)) < len(data.classes):
        return tuple(f"{name} ({number})" for number, name in enumerate(data.classes))
    return data.classes


def _exports(
    model: nn.Module, out: Path, data: AnyImages | None, options: PublishOptions
) -> tuple[list[ExportResult], list[str]]:
    """The ONNX files, and why others are left out.

    Raises:
        ExportError: for a file in fp32, or one that the options ask for, that does not compute what
            the network does.
    """
    wanted = options.precisions
    mean, std = _normalisation(data, options)
    (out / FILES["fp32"]).parent.mkdir(parents=True, exist_ok=True)
    made, lacking = list[ExportResult](), list[str]()
    for precision, place in FILES.items():
        if precision not in (FILES if wanted is None else wanted):
            continue
        if precision == "int8" and data is None and wanted is None:
            continue
        try:
            made.append(
                export(
                    model,
                    out / place,
                    inputs=data,
                    precision=precision,
                    options=ExportOptions(mean=mean or None, std=std or None),
                )
            )
        except ExportError as error:
            if wanted is not None or precision == "fp32":
                raise
            lacking.append(f"There is no `{place}`: {first_line(error)}")
    return made, lacking


def _normalisation(
    data: AnyImages | None, options: PublishOptions
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std), or nothing where neither the data nor the options tell them."""
    if options.mean is not None and options.std is not None:
        return options.mean, options.std
    return (data.mean, data.std) if data is not None else ((), ())


def _preprocessor(
    record: PruningRecord, mean: tuple[float, ...], std: tuple[float, ...]
) -> dict[str, Any]:
    height, width = _sides(record)
    return {
        "image_processor_type": "ViTImageProcessor",  # resizes, rescales and normalises
        "do_convert_rgb": record.in_channels == 3,
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": BOX,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }
