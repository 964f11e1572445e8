"""Libraries are kept quiet without a trace in the process, and without a word of other threads."""

from __future__ import annotations

import logging
import sys
import threading
import warnings

import pytest

from zoo.common.quiet import quiet


def test_threads_leave_the_streams_the_log_and_the_filters_as_they_were() -> None:
    before = sys.stdout, sys.stderr, logging.root.manager.disable, list(warnings.filters)
    start = threading.Barrier(8)

    def work() -> None:
        start.wait()
        for _ in range(50):
            with quiet(), quiet():
                sys.stdout.write("noise")
                logging.getLogger("noise").critical("noise")
                warnings.warn("noise", stacklevel=1)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (sys.stdout, sys.stderr, logging.root.manager.disable, list(warnings.filters)) == before


def test_what_another_thread_prints_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with quiet():
        sys.stdout.write("noise")
        other = threading.Thread(target=print, args=("news",))
        other.start()
        other.join()
        sys.stderr.writelines(["noise"])
        assert sys.stdout.isatty() is False
    assert capsys.readouterr() == ("news\n", "")


def test_a_failure_restores_too() -> None:
    streams = sys.stdout, sys.stderr
    with pytest.raises(ValueError, match="raised"), quiet():
        raise ValueError("raised")
    assert (sys.stdout, sys.stderr) == streams
