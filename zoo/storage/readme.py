"""A pruned network's record in words: the README of its folder."""

from __future__ import annotations

from zoo.spec.plans import PruningRecord, Source

__all__ = ["cost_table", "images_of", "notes", "readme"]


def readme(record: PruningRecord) -> str:
    """The README.md of a folder."""
    argument = "" if record.architecture else ", skeleton=dense_network"
    return f"""# {record.architecture or "A network"}, channel-pruned

{cost_table(record)}

{notes(record)}

```python
import zoo

model = zoo.load_pruned("path/to/this/folder"{argument})
```
"""


def notes(record: PruningRecord) -> str:
    """How the network was made, as a list in Markdown."""
    plan = record.plan
    weights = record.init if record.rewind is None else f"rewound to {_named(record.rewind)}"
    origin = "; the classifier is new, because the source has none for them"
    lines = [
        f"Asked for {plan.asked:g}x {plan.metric} with the profile `{plan.profile}`: "
        f"got {plan.got:.3f}x.",
        f"Channels chosen by `{plan.criterion}`, seed {plan.seed}; weights: {weights}.",
        f"Classes: {record.num_classes}{origin if record.new_classifier else ''}.",
        f"Pruned from: {_named(record.source)}.",
    ]
    if (on := plan.latency) is not None:
        lines.insert(
            1,
            f"Latency of {on.batch} image(s) of {plan.input_size}, {on.dtype}, "
            f"predicted from layers timed on {on.where}.",
        )
    return "\n".join(f"- {line}" for line in lines)


def cost_table(record: PruningRecord) -> str:
    """Parameters, MACs and latency, dense and pruned, as a table in Markdown."""
    plan = record.plan
    rows: list[tuple[str, float, float, str]] = [
        ("parameters", plan.dense.params, plan.pruned.params, ","),
        (f"MACs at {images_of(record)}", plan.dense.macs, plan.pruned.macs, ","),
    ]
    if plan.dense.latency and plan.pruned.latency:
        rows.append(("latency in ms", plan.dense.latency, plan.pruned.latency, ".3g"))
    lines = [
        f"| {what} | {dense:{form}} | {pruned:{form}} | {dense / pruned:.2f}x |"
        for what, dense, pruned, form in rows
    ]
    head = ["| | dense | pruned | compression factor |", "|---|---|---|---|"]
    return "\n".join([*head, *lines])


def images_of(record: PruningRecord) -> str:
    """The size of its inputs; those of an unregistered network may have any shape."""
    if record.plan.inputs:
        return record.plan.input_size
    size = record.image_size
    return f"{record.in_channels}x{size}x{size}" if record.architecture else "the example input"


def _named(source: Source) -> str:
    kind = {True: ", the averaged weights", False: ", not the averaged weights", None: ""}
    digest = f" (sha256 {source.sha256})" if source.sha256 else ""
    return f"{source.reference}{digest}{kind[source.averaged]}"
