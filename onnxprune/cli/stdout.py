"""Printing results to a reader that may have gone (`| head`)."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["nothing_on_stdout", "results_on_stdout"]


@contextmanager
def results_on_stdout() -> Iterator[None]:
    """Print inside the block; a reader that closes the pipe ends the printing, and nothing else."""
    try:
        yield
        sys.stdout.flush()
    except (BrokenPipeError, SystemExit):
        # rich answers a closed pipe with SystemExit. The interpreter must not flush into the pipe again at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def nothing_on_stdout() -> Iterator[None]:
    """Send to stderr whatever is written to stdout inside the block, by child processes and native code as well."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
