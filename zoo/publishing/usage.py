"""Lines that a reader can copy and run as they stand, in Python and in a shell."""

from __future__ import annotations

from zoo.publishing.catalogue import CataloguedArchitecture, CataloguedProfile

__all__ = ["CHECKPOINT", "featured", "python_lines", "reproduction_lines", "shell_lines"]

CHECKPOINT = "my_ckpt.pth"
"""What the shell's lines call the reader's own checkpoint, where no weights are bundled."""


def featured(of: CataloguedArchitecture) -> CataloguedProfile | None:
    """The profile that stands for all: the one nearest to 4x, of parameters before MACs."""
    return min(
        of.profiles,
        key=lambda found: (abs(found.profile.cf - 4), found.profile.metric != "params"),
        default=None,
    )


def python_lines(of: CataloguedArchitecture, found: CataloguedProfile | None) -> str:
    """Load and save; with bundled weights also fine-tune and export, with digits.

    Args:
        of: the architecture.
        found: its profile; None prunes by what `best` takes.
    """
    chosen = [f'profile="{found.reference}"'] if found else ["cf=4", 'metric="macs"']
    if not of.weights:
        dense = f'zoo.create_model("{of.name}", {of.num_classes})'
        return "\n".join(
            [
                "import zoo",
                "",
                f"dense = {dense}  # or the path of your checkpoint",
                _load(of.name, "dense", chosen),
                'print(f"{model.pruning.plan.got:.2f}x {model.pruning.plan.metric}")',
                "# now zoo.finetune(model, train, val), with your images",
                'zoo.save(model, "pruned")  # zoo.load_pruned("pruned") gives it back',
            ]
        )
    weights = of.weights[0]
    return "\n".join(
        [
            "import zoo",
            "",
            f'data = zoo.load_data("digits", size={weights.image_size})  # or "imagefolder:PATH"',
            _load(of.name, f'"{weights.reference}"', chosen),
            'zoo.finetune(model, data.train, data.val, recipe="quick", teacher=None)',
            'print(f"{model.pruning.plan.got:.2f}x {model.pruning.plan.metric}")',
            'print(f"{zoo.evaluate(model, data.test).accuracy:.1%} of the digits")',
            'zoo.save(model, "pruned")  # zoo.load_pruned("pruned") gives it back',
            'zoo.export(model, "pruned.onnx", inputs=data.val)  # checked against ONNX Runtime',
        ]
    )


def _load(name: str, weights: str, chosen: list[str]) -> str:
    """One argument a line, which also fits a phone."""
    lines = [f'"{name}"', f"weights={weights}", *chosen]
    return "model = zoo.load(\n" + "".join(f"    {line},\n" for line in lines) + ")"


def shell_lines(of: CataloguedArchitecture, found: CataloguedProfile | None) -> str:
    """The same for a shell."""
    chosen = f"--profile {found.reference}" if found else "--cf 4 --metric macs"
    if not of.weights:
        return "\n".join(
            [
                *([f"zoo show {found.reference}"] if found else []),
                f"zoo prune {of.name} {chosen} --weights {CHECKPOINT} --out smaller",
            ]
        )
    size = of.weights[0].image_size
    return "\n".join(
        [
            *([f"zoo show {found.reference}"] if found else []),
            f"zoo prune {of.name} {chosen} --weights {of.weights[0].reference} --out smaller",
            f"zoo finetune smaller --data digits --size {size} --epochs 1 --teacher none",
            f"zoo evaluate smaller --data digits --size {size}",
            f"zoo export smaller smaller.onnx --data digits --size {size}",
        ]
    )


def reproduction_lines(found: CataloguedProfile) -> str:
    """The commands behind a searched profile: its search, and the table of its evidence."""
    origin = found.profile.provenance
    search = [origin.command] if origin else []
    return "\n".join([*search, "python scripts/evidence/evidence_table.py --details"])
