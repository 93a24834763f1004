"""Keeps what native libraries print on stderr off the terminal, where no setting of theirs does.

LiteRT says "INFO: Created TensorFlow Lite XNNPACK delegate for CPU." for every model, whatever the environment says.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
import threading
from collections.abc import Iterator

__all__ = ["without_native_log"]

_LOG_LINE = re.compile(rb"^(VERBOSE|INFO|WARNING|ERROR): .*\n?", re.MULTILINE)
_STDERR = 2
_lock = threading.Lock()


@contextlib.contextmanager
def without_native_log() -> Iterator[None]:
    """Drop the lines that LiteRT logs inside the block; anything else that arrives on stderr is printed afterwards.

    The whole process's stderr is held back: keep blocks short. Only errors of LiteRT get lost, which it raises as well.
    """
    with _lock, tempfile.TemporaryFile() as held:
        _flush()
        try:
            terminal = os.dup(_STDERR)
        except OSError:  # closed: nothing is printed anyway
            yield
            return
        os.dup2(held.fileno(), _STDERR)
        try:
            yield
        finally:
            _flush()
            os.dup2(terminal, _STDERR)
            held.seek(0)
            rest = _LOG_LINE.sub(b"", held.read())
            if rest:
                os.write(terminal, rest)
            os.close(terminal)


def _flush() -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stderr.flush()
