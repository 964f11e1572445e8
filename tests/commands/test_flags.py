"""What the library says in arguments, the command line says in flags."""

from __future__ import annotations

import pytest
import torch

from zoo.cli import main
from zoo.commands.shared import as_flags
from zoo.models import build_model


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("pass cf=.", "pass --cf."),
        ("pass cf=2.5, metric='params', or refit=True to", "pass --cf 2.5, --metric params, or"),
        ("keep={'a': 2}: a keep ratio", "--keep {'a': 2}: a keep ratio"),
        ("profile='best' (or a policy)", "--profile best (or a policy)"),
        ("Ask for precision='fp32'.", "Ask for --precision fp32."),
        ("num_classes= is not given; image_size=32.", "--classes is not given; --size 32."),
        ("the file a.data=3 and zoo.metric=x", "the file a.data=3 and zoo.metric=x"),
        ("lr=0.1,seed=3/base.pt does not exist", "lr=0.1,seed=3/base.pt does not exist"),
        ("/runs/seed=3/cf=4.pt is a folder", "/runs/seed=3/cf=4.pt is a folder"),
        ("seed=3/base.pt, or a-seed=3 or size=8-b", "seed=3/base.pt, or a-seed=3 or size=8-b"),
    ],
)
def test_arguments_become_flags(message: str, told: str) -> None:
    assert as_flags(message).startswith(told)


def test_an_error_of_the_library_names_the_flag(tmp_path, capsys) -> None:
    path = tmp_path / "dense.pt"
    torch.save(build_model("cnet", 10).state_dict(), path)
    prune = ["prune", "cnet", "--weights", str(path), "--out", str(tmp_path / "out")]
    assert main([*prune, "--cf", "4", "--profile", "global"]) == 2
    assert "needs data: pass --data," in capsys.readouterr().err
    assert main(prune) == 2
    assert "pass --cf." in capsys.readouterr().err
    assert main([*prune, "--cf", "8", "--keep", "conv1", "1.0", "--floor", "0.9"]) == 2
    assert "--keep or --floor bound the widths" in capsys.readouterr().err
