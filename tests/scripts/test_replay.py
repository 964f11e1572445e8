"""scripts/evidence/replay.py: options that no search can be replayed by."""

from __future__ import annotations

import pytest
import replay

pytest.importorskip("pyarrow")
pytest.importorskip("gymnasium")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "nosuch"}, "Unknown architecture 'nosuch'"),
        ({"cf": 0.0}, "A params factor of 0 cannot be reached"),
        ({"network": "zzz"}, "no evaluations of cnet whose base network begins with 'zzz'"),
        ({"agents": ("random", "nosuch")}, "Unknown agent 'nosuch'"),
        ({"at": (0,)}, "--at must be numbers of at least 1"),
        ({"seeds": ()}, "--seeds must be numbers of at least 0"),
    ],
)
def test_options_that_no_search_can_be_replayed_by(options, message):
    with pytest.raises(SystemExit, match=message):
        replay.main(replay.Options(**{"arch": "cnet", **options}))
