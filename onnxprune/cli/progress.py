"""Progress on stderr: bars on a terminal, plain lines elsewhere, nothing with -q."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TypeVar

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from onnxprune.contracts import NullProgress
from onnxprune.contracts import Progress as ProgressProtocol

__all__ = ["make_progress"]

ItemT = TypeVar("ItemT")


class TerminalProgress:
    """Notes as lines; a bar while items are tracked."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def track(self, items: Iterable[ItemT], description: str, total: int | None = None) -> Iterable[ItemT]:
        """The items, with a bar that vanishes when they end."""
        if not self._console.is_terminal:
            yield from items
            return
        columns = (
            TextColumn("  {task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self._console, transient=True) as bars:
            yield from bars.track(items, description=description, total=total)

    def note(self, message: str) -> None:
        """One dim line."""
        self._console.print(message, style="dim", highlight=False, markup=False)


def make_progress(*, verbosity: int) -> ProgressProtocol:
    """Progress, and logging, for `verbosity` -1 (quiet), 0, 1 (-v: what is done) or 2 (-vv: everything)."""
    console = Console(stderr=True)
    level = {-1: logging.ERROR, 0: logging.WARNING, 1: logging.INFO}.get(verbosity, logging.DEBUG)
    logger = logging.getLogger("onnxprune")
    logger.setLevel(level)
    logger.handlers = [RichHandler(console=console, show_path=False, show_time=False)]
    return NullProgress() if verbosity < 0 else TerminalProgress(console)
