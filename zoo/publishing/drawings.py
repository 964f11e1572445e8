"""Small SVG pictures, written here: the same bytes on every machine.

A network is drawn as a silhouette: a column for each channel group in order, as high as the square
root of its channels; the outline is the dense network, the fill the share that is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

from zoo.publishing.catalogue import CataloguedArchitecture, Exam, Layer, Row

__all__ = ["accuracy_plot", "network", "silhouette", "standalone"]

STYLE = """
.outline{fill:#f3eef2;stroke:#b9a9b5;stroke-width:1}
.kept{fill:#86346a}
.rule{stroke:#d9d0d6;stroke-width:1}
.dense{stroke:#7d7079;stroke-width:1.2;stroke-dasharray:5 4}
.own{fill:#86346a;stroke:#86346a}
.rival{fill:none;stroke:#6c626a;stroke-width:1.6}
.bar{stroke-width:1.2}
text{fill:#5d545b;font:12px system-ui,sans-serif}
.strong{fill:#86346a;font-weight:600}
@media (prefers-color-scheme:dark){
.outline{fill:#2a2430;stroke:#6b5f73}.kept,.own{fill:#e39ac6;stroke:#e39ac6}
.rule{stroke:#3b343f}.dense{stroke:#9d93a2}.rival{stroke:#b4abb9}
text{fill:#b9b0be}.strong{fill:#e39ac6}}
"""

MARKERS = (
    "M-4-4h8v8h-8z",
    "M0-5.5L5 4h-10z",
    "M0-6L6 0L0 6L-6 0z",
    "M0 5.5L5-4h-10z",
    "M-4-4L4 4M-4 4L4-4",
    "M0-5.5V5.5M-5.5 0H5.5",
)
"""Shapes of the rivals' points, around (0, 0)."""

Scale = Callable[[float], float]

HEIGHT = 132
"""of the highest column, in units of the picture"""


def silhouette(
    layers: Sequence[Layer], kept: Mapping[str, int], size: tuple[float, float] = (720, HEIGHT)
) -> str:
    """The columns alone, as SVG elements; `kept` may be empty, for the dense network."""
    width, height = size
    step = width / len(layers)
    gap = min(4.0, 0.28 * step)
    scale = height / math.sqrt(max(layer.size for layer in layers))
    parts = []
    for index, layer in enumerate(layers):
        full = max(3.0, scale * math.sqrt(layer.size))
        title = _title(layer, kept)
        left, across = index * step + gap / 2, step - gap
        columns = [_column("outline", left, height, across, full)]
        if layer.name in kept:
            share = kept[layer.name] / layer.size
            columns.append(_column("kept", left, height, across, max(1.0, full * share)))
        parts.append(f"<g><title>{title}</title>{''.join(columns)}</g>")
    return "".join(parts)


def network(of: CataloguedArchitecture, kept: Mapping[str, int], label: str) -> str:
    """The silhouette of an architecture above the sizes of its maps, as an `<svg>` element."""
    width = 720.0
    step = width / len(of.layers)
    marks = []
    for stage in of.stages:
        left, right = stage.first * step + 1, (stage.last + 1) * step - 1
        name = f"{stage.side}²"
        if right - left < 14 * len(name):
            name = ""
        marks.append(
            f'<line class="rule" x1="{left:.1f}" x2="{right:.1f}" y1="146" y2="146"/>'
            f'<text x="{(left + right) / 2:.1f}" y="166" text-anchor="middle">{name}</text>'
        )
    drawn = silhouette(of.layers, kept)
    return _svg(width, 174, label, f'<g transform="translate(0 4)">{drawn}</g>{"".join(marks)}')


def accuracy_plot(exams: Sequence[tuple[str, Exam]], own: str, label: str) -> str:
    """Accuracy against parameters: a point for each row of these exams, with its rivals.

    Args:
        exams: (factor as text, exam) of each profile; all on the same data.
        own: the policy to be set off, as `searched`.
        label: what a reader who sees no picture is told.
    """
    rows = [(factor, row) for factor, exam in exams for row in exam.policies]
    bases = [exam.base for _, exam in exams if exam.base is not None]
    tops = [row.evidence.mean + row.evidence.sd for _, row in rows]
    tops += [row.evidence.mean for row in bases]
    low = min(row.evidence.mean - row.evidence.sd for _, row in rows)
    ticks = _ticks(low, max(tops))
    bottom, top = ticks[0], ticks[-1]
    sizes = _ticks(0, max(row.evidence.params for _, row in rows))

    def x(params: float) -> float:
        return 62 + 480 * params / sizes[-1]

    def y(accuracy: float) -> float:
        return 300 - 276 * (accuracy - bottom) / (top - bottom)

    parts = [
        f'<line class="rule" x1="62" x2="542" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
        f'<text x="54" y="{y(tick) + 4:.1f}" text-anchor="end">{100 * tick:.0f} %</text>'
        for tick in ticks
    ]
    parts += [
        f'<text x="{x(size):.1f}" y="320" text-anchor="middle">{_short(size)}</text>'
        for size in sizes
    ]
    parts.append('<text x="302" y="342" text-anchor="middle">parameters</text>')
    if bases:
        at = y(bases[0].evidence.mean)
        parts.append(f'<line class="dense" x1="62" x2="542" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="542" y="{at - 6:.1f}" text-anchor="end">dense</text>')
    names = sorted({row.evidence.policy for _, row in rows}, key=lambda name: (name != own, name))
    for factor, row in sorted(rows, key=lambda item: item[1].evidence.policy == own):
        parts.append(_point(row, x, y, names.index(row.evidence.policy), own, factor))
    for index, name in enumerate(names):
        kind = "own" if name == own else "rival"
        parts.append(_marker(index, 568, 40 + 22 * index, kind))
        strong = ' class="strong"' if name == own else ""
        parts.append(f'<text{strong} x="582" y="{44 + 22 * index}">{escape(name)}</text>')
    return _svg(720, 350, label, "".join(parts))


def standalone(svg: str) -> str:
    """The picture as a file of its own, with its colours for light and dark surroundings."""
    head, _, rest = svg.partition(">")
    return f"{head}><style>{STYLE}</style>{rest}\n"


def _svg(width: float, height: float, label: str, inner: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img" '
        f'aria-label="{escape(label)}">{inner}</svg>'
    )


def _title(layer: Layer, kept: Mapping[str, int]) -> str:
    if layer.name not in kept:
        return escape(f"{layer.name}: {layer.size} channels")
    count = kept[layer.name]
    return escape(
        f"{layer.name}: {count} of {layer.size} channels kept, β {count / layer.size:.3f}"
    )


def _column(kind: str, left: float, total: float, width: float, height: float) -> str:
    """A rectangle in the middle of the height."""
    top, round_ = (total - height) / 2, min(2.0, width / 4)
    return (
        f'<rect class="{kind}" x="{left:.2f}" y="{top:.2f}" width="{width:.2f}" '
        f'height="{height:.2f}" rx="{round_:.2f}"/>'
    )


def _point(row: Row, x: Scale, y: Scale, index: int, own: str, factor: str) -> str:
    evidence = row.evidence
    kind = "own" if evidence.policy == own else "rival"
    at, middle = x(evidence.params), y(evidence.mean)
    ends = y(evidence.mean + evidence.sd), y(evidence.mean - evidence.sd)
    title = f"{evidence.policy} at {factor}: {evidence.mean:.2%} ± {100 * evidence.sd:.2f}"
    bar = (
        f'<line class="bar {kind}" x1="{at:.1f}" x2="{at:.1f}" '
        f'y1="{ends[0]:.1f}" y2="{ends[1]:.1f}"/>'
    )
    return f"<g><title>{escape(title)}</title>{bar}{_marker(index, at, middle, kind)}</g>"


def _marker(index: int, x: float, y: float, kind: str) -> str:
    """One of seven shapes around a point; the first is a disc."""
    if index == 0:
        return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="5"/>'
    path = MARKERS[(index - 1) % len(MARKERS)]
    return f'<path class="{kind}" transform="translate({x:.1f} {y:.1f})" d="{path}"/>'


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from below `low` to above `high`, four to eight of them."""
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [step * count for count in range(first, last + 1)]


def _short(number: float) -> str:
    """A count in three digits or so: 250 k, 1.5 M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}"
