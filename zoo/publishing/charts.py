"""Interactive plots as Vega-Lite specifications: the only importer of Altair and vl-convert."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from zoo.errors import ZooError
from zoo.publishing.catalogue import Exam

try:
    import altair
    import vl_convert
except ImportError:
    raise ZooError("The site needs Altair: pip install 'prunezoo[site]'.") from None

__all__ = ["accuracy_charts", "script"]

AXES = {"params": "parameters", "macs": "multiply-accumulates (MACs)"}

SHAPES = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "stroke")
"""Of the points, by policy; the first is the zoo's own."""

Spec = dict[str, Any]


def script() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script that asks no server for anything."""
    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", _version())


def accuracy_charts(exams: Sequence[tuple[str, Exam]], own: str) -> dict[str, Spec]:
    """Metric -> accuracy against it: a point and its spread for every row of these exams.

    Colours are the page's custom properties, so that light and dark need no second drawing.
    """
    rows = [_point(factor, exam, index) for factor, exam in exams for index in _policies(exam)]
    names = sorted({row["policy"] for row in rows}, key=lambda name: (name != own, name))
    base = next((exam.base for _, exam in exams if exam.base is not None), None)
    dense = None if base is None else base.evidence.mean
    return {
        metric: _chart(rows, names, own, metric, title, dense) for metric, title in AXES.items()
    }


def _policies(exam: Exam) -> range:
    return range(len(exam.policies))


def _point(factor: str, exam: Exam, index: int) -> Spec:
    row = exam.policies[index]
    own = row.evidence
    return {
        "policy": own.policy,
        "profile": factor,
        "params": own.params,
        "macs": own.macs,
        "accuracy": own.mean,
        "low": own.mean - own.sd,
        "high": own.mean + own.sd,
        "sd": own.sd,
        "seeds": len(own.seeds),
        "dominated by": " · ".join(row.dominated_by) or "none",
    }


def _chart(
    rows: list[Spec], names: list[str], own: str, metric: str, title: str, dense: float | None
) -> Spec:
    edges = ["var(--accent)" if name == own else "var(--muted)" for name in names]
    insides = ["var(--accent)" if name == own else "var(--surface)" for name in names]
    across = altair.X(metric, type="quantitative").title(title)
    across = across.axis(format="~s", tickCount=6, grid=False).scale(zero=False, padding=24)
    levels = altair.Y("accuracy", type="quantitative").title(None)
    levels = levels.axis(format=".0%", tickCount=6).scale(zero=False, padding=14)
    colour = altair.Color("policy", type="nominal", title=None)
    colour = colour.scale(domain=names, range=edges)
    shape = altair.Shape("policy", type="nominal", title=None)
    shape = shape.scale(domain=names, range=list(SHAPES[: len(names)]))
    fill = altair.Fill("policy", type="nominal", title=None)
    fill = fill.scale(domain=names, range=insides)
    tips = [
        altair.Tooltip("policy:N"),
        altair.Tooltip("profile:N"),
        altair.Tooltip("accuracy:Q", format=".2%"),
        altair.Tooltip("sd:Q", format=".2%", title="standard deviation"),
        altair.Tooltip("seeds:Q"),
        altair.Tooltip("params:Q", format=",", title="parameters"),
        altair.Tooltip("macs:Q", format=",", title="MACs"),
        altair.Tooltip("dominated by:N"),
    ]
    base = altair.Chart(altair.Data(values=rows)).encode(x=across, color=colour)
    bars = base.mark_rule(strokeWidth=1.4).encode(
        y=altair.Y("low:Q", title=None), y2=altair.Y2("high:Q")
    )
    points = base.mark_point(size=110, strokeWidth=1.7, opacity=1).encode(
        y=levels,
        shape=shape,
        tooltip=tips,
        fill=fill,
        order=altair.Order("rank:Q"),
    )
    points = points.transform_calculate(rank=f"datum.policy == '{own}' ? 1 : 0")
    layers = [bars, points]
    if dense is not None:
        line = altair.Chart(altair.Data(values=[{"accuracy": dense, "name": f"dense {dense:.2%}"}]))
        rule = line.mark_rule(strokeDash=[5, 4], color="var(--muted)").encode(y="accuracy:Q")
        name = line.mark_text(align="right", dy=-7, color="var(--muted)", fontSize=12)
        layers = [
            rule,
            name.encode(y="accuracy:Q", x=altair.value("width"), text="name:N"),
            *layers,
        ]
    drawn = altair.layer(*layers).properties(
        width="container", height=360, background="transparent"
    )
    found: Spec = drawn.configure(**_CONFIG).to_dict()
    return found


_CONFIG: Spec = {
    "font": "inherit",
    "view": {"stroke": None},
    "axis": {
        "labelColor": "var(--muted)",
        "titleColor": "var(--muted)",
        "gridColor": "var(--line)",
        "domain": False,
        "ticks": False,
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "labelPadding": 8,
        "titlePadding": 12,
    },
    "legend": {
        "orient": "bottom",
        "columns": 6,
        "labelColor": "var(--ink)",
        "labelFontSize": 12,
        "symbolSize": 70,
        "symbolStrokeWidth": 1.7,
        "symbolOpacity": 1,
        "columnPadding": 24,
        "rowPadding": 6,
        "offset": 20,
    },
}


def _version() -> str:
    """The Vega-Lite version of Altair's specifications, as vl-convert names it."""
    major, minor, *_ = altair.SCHEMA_VERSION.lstrip("v").split(".")
    return f"{major}.{minor}"
