"""How a command ends: interrupts are remembered, errors shown, missed budgets described."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, NoReturn

import click

from onnxprune.errors import BudgetMissedError, OnnxPruneError

if TYPE_CHECKING:
    from pathlib import Path

    from onnxprune.contracts import RunReport

__all__ = ["Interrupts", "is_interrupted", "missed_budget", "show_error"]


class Interrupts:
    """Turns SIGINT and SIGTERM into KeyboardInterrupt, and remembers that it did."""

    def __init__(self) -> None:
        self.seen = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._raise)

    def _raise(self, _number: int, _frame: object) -> NoReturn:
        self.seen = True
        raise KeyboardInterrupt


def is_interrupted() -> bool:
    """True when an interrupt came: native code and children may turn it into an error of their own."""
    context = click.get_current_context(silent=True)
    return context is not None and isinstance(context.obj, Interrupts) and context.obj.seen


def show_error(error: OnnxPruneError, *, of: str = "") -> None:
    """Print an error and its hint on stderr; `of` names the model where there are several."""
    place = f"{of}: " if of else ""
    click.echo(click.style("error: ", fg="red", bold=True) + place + error.message, err=True)
    if error.hint:
        click.echo(click.style("  try: ", fg="cyan", bold=True) + error.hint, err=True)


def missed_budget(report: RunReport, out: Path) -> BudgetMissedError | None:
    """The error for the budgets that `report` misses, or None."""
    missed = [outcome for outcome in report.budgets if not outcome.met]
    if not missed:
        return None
    described = "; ".join(
        f"{outcome.name} of '{outcome.target}' is "
        f"{'not measured' if outcome.actual is None else format(outcome.actual, '.6g')}, limit {outcome.limit:.6g}"
        for outcome in missed
    )
    return BudgetMissedError(f"Budget missed: {described}.", f"The artifact is kept in '{out}'.")
