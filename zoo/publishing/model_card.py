"""The card of a published network: what it is, how to use it, what is known of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from zoo.common.sizes import sides
from zoo.data.images import AnyImages
from zoo.deployment.exporting import ExportResult
from zoo.publishing.options import PublishOptions
from zoo.registry.hub import HubReference, card_text
from zoo.spec.plans import PruningRecord
from zoo.storage.readme import cost_table, notes

__all__ = ["TAG", "model_card", "spelled_tag"]

TAG = "prunezoo"
"""The tag, and the library's name, that the zoo's repositories are found by."""


def model_card(
    record: PruningRecord,
    reference: str,
    exports: Sequence[ExportResult],
    lacking: Sequence[str],
    data: AnyImages | None,
    accuracy: float | None,
    normalisation: tuple[tuple[float, ...], tuple[float, ...]],
    options: PublishOptions,
) -> str:
    """The README.md of a repository.

    Args:
        record: of the network.
        reference: of the repository.
        exports: its ONNX files, with how they compare with PyTorch.
        lacking: why there are no others, a line each.
        data: what the accuracy was measured on.
        accuracy: in [0, 1], of the network in PyTorch; None where there are no labels.
        normalisation: (mean, std) of its images; empty where they are not known.
        options: of the publication.
    """
    repo = HubReference.parse(reference).repo
    plan = record.plan
    name = f"{record.architecture}, {plan.got:.3g}x {_counted(plan.metric)}"
    parts = [
        f"# {name}",
        "A channel-pruned network: an ordinary, smaller network of the same architecture, "
        "without masks or sparse kernels, made by [prunezoo](https://pypi.org/project/prunezoo/).",
        cost_table(record),
        _accuracy(data, accuracy),
        "## Use it\n\n`pip install prunezoo`, then:\n\n"
        f"```python\n{python_lines(record, repo)}\n```",
        _inputs(record, normalisation),
        f"As an ONNX file:\n\n```python\n{onnx_lines(record, repo, exports[0])}\n```"
        if exports
        else "",
        f"In JavaScript, with transformers.js:\n\n```js\n{js_lines(repo, exports[0])}\n```"
        if exports and normalisation[0] and record.in_channels == 3
        else "",
        f"## Files\n\n{_files(exports, lacking)}\n\n`zoo verify {reference}` checks all of them "
        "against `SHA256SUMS`, the record and one another.",
        f"## How it was made\n\n{notes(record)}",
    ]
    metadata, results = _front_matter(record, data, accuracy, options, name, bool(exports))
    return card_text(metadata, results, "\n\n".join(part for part in parts if part) + "\n")


def spelled_tag(arch: str) -> str:
    """An architecture's name as a tag, in which the Hub takes a colon for the end of a kind."""
    return arch.replace(":", "-")


def python_lines(record: PruningRecord, repo: str) -> str:
    """Load the network and call it."""
    height, width = sides(record.size)
    shape = f"1, {record.in_channels}, {height}, {width}"
    return "\n".join(
        [
            "import torch",
            "import zoo",
            "",
            f'model = zoo.load_pruned("hf:{repo}")',
            f"logits = model(torch.zeros({shape}))",
        ]
    )


def onnx_lines(record: PruningRecord, repo: str, file: ExportResult) -> str:
    """Run the first ONNX file."""
    height, width = sides(record.size)
    shape = f"1, {record.in_channels}, {height}, {width}"
    place = f"onnx/{file.path.name}"
    return "\n".join(
        [
            "import numpy as np",
            "import onnxruntime",
            "from huggingface_hub import hf_hub_download",
            "",
            f'session = onnxruntime.InferenceSession(hf_hub_download("{repo}", "{place}"))',
            f'(logits,) = session.run(None, {{"pixel_values": np.zeros(({shape}), "float32")}})',
        ]
    )


def js_lines(repo: str, file: ExportResult) -> str:
    """Classify a picture with transformers.js, by the first ONNX file."""
    dtype = {"int8": "q8"}.get(file.precision, file.precision)
    return "\n".join(
        [
            'import { AutoModel, AutoProcessor, RawImage } from "@huggingface/transformers";',
            "",
            f'const processor = await AutoProcessor.from_pretrained("{repo}");',
            f'const model = await AutoModel.from_pretrained("{repo}", {{ dtype: "{dtype}" }});',
            'const { logits } = await model(await processor(await RawImage.read("picture.png")));',
            "const best = logits.data.indexOf(Math.max(...logits.data));",
            "console.log(model.config.id2label[best]);",
        ]
    )


def _counted(metric: str) -> str:
    return {"params": "fewer parameters", "macs": "fewer MACs"}.get(metric, f"less {metric}")


def _accuracy(data: AnyImages | None, accuracy: float | None) -> str:
    if data is None or accuracy is None:
        return "Its accuracy was not measured when it was published."
    return f"Top-1 accuracy {accuracy:.2%} on {len(data):,} images of {_line(data.name)}."


def _inputs(
    record: PruningRecord, normalisation: tuple[tuple[float, ...], tuple[float, ...]]
) -> str:
    mean, std = normalisation
    height, width = sides(record.size)
    shape = f"(N, {record.in_channels}, {height}, {width})"
    if not mean:
        return (
            f"Images are {shape}, normalised as in the training of the network; the publication "
            "does not say how."
        )
    told = [", ".join(f"{value:.4g}" for value in values) for values in (mean, std)]
    return f"Images are {shape} in [0, 1], minus the mean ({told[0]}), divided by ({told[1]})."


def _files(exports: Sequence[ExportResult], lacking: Sequence[str]) -> str:
    rows = [
        "| file | bytes | images | largest difference | same top class | accuracy | PyTorch's |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for each in exports:
        same = "" if each.top1_agreement is None else f"{each.top1_agreement:.2%}"
        accuracy, own = (
            "" if share is None else f"{share:.2%}"
            for share in (each.accuracy, each.module_accuracy)
        )
        rows.append(
            f"| `onnx/{each.path.name}` | {each.bytes:,} | {each.images} "
            f"| {each.max_abs_difference:.2g} | {same} | {accuracy} | {own} |"
        )
    if not exports:
        return "There are no ONNX files."
    told = f"Compared with PyTorch in ONNX Runtime, on images of: {_line(exports[0].inputs)}."
    if len({(each.images, each.module_accuracy) for each in exports}) > 1:
        told += (
            " An int8 file is compared on others than those that set its ranges, so that only the "
            "two accuracies of one row are of the same images."
        )
    return "\n".join([*rows, "", told, *lacking])


def _front_matter(
    record: PruningRecord,
    data: AnyImages | None,
    accuracy: float | None,
    options: PublishOptions,
    name: str,
    exported: bool,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What the Hub reads: (metadata, results)."""
    plan = record.plan
    base = options.base_model or _hub_model(record)
    metadata: dict[str, Any] = {
        "library_name": TAG,
        "pipeline_tag": "image-classification",
        "tags": [
            TAG, "pruned", *(["onnx"] if exported else []), spelled_tag(record.architecture),
            f"{plan.asked:g}x-{plan.metric}",
        ],
        "model_name": name,
    }  # fmt: skip
    if options.license:
        metadata["license"] = options.license
    if base:
        metadata |= {"base_model": base, "base_model_relation": "finetune"}
    if options.datasets:
        metadata["datasets"] = list(options.datasets)
    if data is None or accuracy is None:
        return metadata, []
    result = {
        "task_type": "image-classification",
        "dataset_type": options.datasets[0] if options.datasets else _slug(data.name),
        "dataset_name": _line(data.name),
        "metric_type": "accuracy",
        "metric_value": round(accuracy, 4),
    }
    return metadata | {"metrics": ["accuracy"]}, [result]


def _hub_model(record: PruningRecord) -> str | None:
    """The model of the Hub that the dense checkpoint came from, if it did."""
    source = record.source.reference
    if not source.startswith("hf:"):
        return None
    reference = HubReference.parse(source)
    return None if reference.dataset else reference.repo


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "own"


def _line(text: str) -> str:
    """A name on one line."""
    return " ".join(text.split())
