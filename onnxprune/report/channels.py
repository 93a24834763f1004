"""What pruning can reach, and what holds back the rest: equal reasons together, the most parameters first."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from onnxprune.passes.prune import ChannelSummary
from onnxprune.report.figures import part_text

__all__ = ["Held", "Reason", "describe_reason", "group_reasons", "print_channels"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reason:
    """Everything that is left alone for reasons that differ in nothing but names.

    `text` has a sample of the names, `num_texts` says how many different reasons there are, `num_places` how many
    layers or groups, of which `example` is one.
    """

    text: str
    num_texts: int
    num_places: int
    example: str
    channels: int
    parameters: int
    unreachable: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """One thing that is left alone."""

    where: str
    reason: str
    channels: int = 0
    parameters: int = 0
    unreachable: int = 0


def group_reasons(held: Iterable[Held]) -> tuple[Reason, ...]:
    """Equal reasons as one: those that hold back the most parameters first, then the most channels and places."""
    kinds: dict[str, list[Held]] = {}
    for item in held:
        kinds.setdefault(re.sub(r"'[^']*'", "''", item.reason), []).append(item)
    reasons = [
        Reason(
            text=items[0].reason,
            num_texts=len({item.reason for item in items}),
            num_places=len(items),
            example=items[0].where,
            channels=sum(item.channels for item in items),
            parameters=sum(item.parameters for item in items),
            unreachable=sum(item.unreachable for item in items),
        )
        for items in kinds.values()
    ]
    return tuple(sorted(reasons, key=lambda r: (r.unreachable, r.parameters, r.channels, r.num_places), reverse=True))


def print_channels(
    console: Console,
    channels: Sequence[ChannelSummary],
    *,
    parameters: int,
    unlabelled_parameters: int,
    limit: int | None,
) -> None:
    """Print what pruning can reach, why the rest is frozen, and the `limit` groups with the most parameters."""
    free = [row for row in channels if row.frozen_reason is None]
    frozen = [row for row in channels if row.frozen_reason is not None]
    unreachable = unlabelled_parameters + sum(row.unreachable_parameters for row in frozen)
    console.print(
        Text(
            f"\nPruning can reach {part_text(parameters - unreachable, parameters)} of the parameters, through "
            f"{sum(row.num_channels for row in free)} channels in {_groups(len(free))}",
            style="bold",
        )
    )
    if frozen or unlabelled_parameters:
        console.print(
            Text(
                f"\nFrozen are {sum(row.num_channels for row in frozen)} channels in {_groups(len(frozen))}, "
                f"which keep {part_text(unreachable, parameters)} of the parameters",
                style="bold",
            )
        )
        _print_reasons(console, frozen, parameters, unlabelled_parameters)
        if limit is None:
            console.print()
            _print_groups(console, frozen, parameters, limit)
    console.print(Text("\nCan be removed" if free else "\nNothing can be removed", style="bold"))
    _print_groups(console, free, parameters, limit)


def _print_groups(console: Console, rows: Sequence[ChannelSummary], parameters: int, limit: int | None) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("channels", justify="right")
    table.add_column("parameters", justify="right")
    table.add_column("layers")
    largest = sorted(rows, key=lambda row: row.parameters, reverse=True)[:limit]
    shown = {row.name for row in largest}
    for row in rows:
        if row.name not in shown:
            continue
        layers = Text(_some(_layers(row)) or row.name)
        if row.frozen_reason is not None:
            layers.append(f": {row.frozen_reason}", style="dim")
        elif row.approximate:
            layers.append(f"  approximate: {_some(row.approximate, limit=1)}", style="yellow")
        table.add_row(str(row.num_channels), part_text(row.parameters, parameters), layers)
    if rows:
        console.print(table)
    if len(shown) < len(rows):
        console.print(Text(f"and {len(rows) - len(shown)} smaller groups (--all shows them)", style="dim"))


def _print_reasons(
    console: Console, frozen: Sequence[ChannelSummary], parameters: int, unlabelled_parameters: int
) -> None:
    reasons = group_reasons(
        Held(
            where=next(iter(_layers(row)), row.name),
            reason=row.frozen_reason or "",
            channels=row.num_channels,
            parameters=row.parameters,
            unreachable=row.unreachable_parameters,
        )
        for row in frozen
    )
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for header in ("channels", "parameters", "kept"):
        table.add_column(header, justify="right")
    table.add_column("why")
    rows = [
        (
            reason.unreachable,
            str(reason.channels),
            part_text(reason.parameters, parameters),
            describe_reason(reason),
        )
        for reason in reasons
    ]
    if unlabelled_parameters:
        part = part_text(unlabelled_parameters, parameters)
        rows.append((unlabelled_parameters, "", part, Text("in weights that no channel rule says anything about")))
    for kept, channels, part, why in sorted(rows, key=lambda row: row[0], reverse=True):
        table.add_row(channels, part, part_text(kept, parameters), why)
    console.print(table)


def describe_reason(reason: Reason) -> Text:
    """The reason, and where it holds."""
    more_reasons = f" and {reason.num_texts - 1} more of the kind" if reason.num_texts > 1 else ""
    more_places = f" and {reason.num_places - 1} more" if reason.num_places > 1 else ""
    return Text.assemble(reason.text, more_reasons, (f"  ({reason.example}{more_places})", "dim"))


def _layers(row: ChannelSummary) -> list[str]:
    """Modules where the source has them, whose names people know, else nodes."""
    return list(dict.fromkeys(module or layer for layer, module in zip(row.layers, row.modules, strict=True)))


def _groups(count: int) -> str:
    return f"{count} group" if count == 1 else f"{count} groups"


def _some(names: Sequence[str], *, limit: int = 3) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
