"""What `onnxprune compare` shows: outputs, the tensors inside, and a verdict in one line."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from onnxprune.errors import quoted_list
from onnxprune.evaluate.model_diff import OFF_DB, LayerDifference, ModelComparison

__all__ = ["print_comparison", "verdict"]

TENSORS_SHOWN = 40
WIDE = 100
"""From so many columns on all figures have room beside names of 30 characters."""


def print_comparison(
    found: ModelComparison, *, worst_first: bool, show_all: bool, console: Console | None = None
) -> None:
    """Outputs, then tensors in the order of the graph or the worst first, at most 40 unless `show_all`; the verdict."""
    console = console or Console()
    console.print(
        Text.assemble(
            (found.reference, "bold"),
            " against ",
            (found.actual, "bold"),
            (f", {found.num_samples} samples ({found.data})", "dim"),
        )
    )
    console.print()
    console.print(_outputs(found))
    is_wide = console.width >= WIDE
    if found.layers:
        console.print()
        layers = found.layers
        if worst_first:
            layers = tuple(sorted(layers, key=lambda layer: layer.tensor.snr_db))
        console.print(_tensors(layers if show_all else layers[:TENSORS_SHOWN], is_wide=is_wide))
        if not is_wide:
            console.print(Text(f"(cosine and KL: from {WIDE} columns on, or --json)", style="dim"))
        hidden = 0 if show_all else len(layers) - TENSORS_SHOWN
        if hidden > 0:
            console.print(Text(f"and {hidden} more tensors (--all shows them, --json has all)", style="dim"))
    if found.not_compared:
        console.print(Text(f"{len(found.not_compared)} tensors are not compared:", style="dim"))
        for name, reason in list(found.not_compared.items())[:5]:
            console.print(Text(f"  '{name}': {reason}", style="dim"))
    console.print()
    console.print(Text(verdict(found), style="bold"))


def verdict(found: ModelComparison) -> str:
    """One sentence on the outputs; with tensors, the first that falls off and where most of the error arises."""
    worst = min(found.outputs.per_output.items(), key=lambda item: item[1].snr_db, default=None)
    idle = [name for name, one in found.outputs.per_output.items() if not one.is_compared]
    if idle:
        text = f"Nothing was compared of {quoted_list(idle)}: NaN or infinite throughout in both models."
    elif worst is None or worst[1].snr_db == math.inf:
        text = "All outputs are equal."
    else:
        text = f"The outputs keep {_db(worst[1].snr_db)} ('{worst[0]}' is the worst)."
    if not found.layers:
        return text
    first, most = found.first_off, found.most_added
    if first is None:
        text += f" No tensor falls below {OFF_DB:g} dB."
    else:
        text += f" The first tensor below {OFF_DB:g} dB is '{first.tensor.name}' of {_layer(first)}."
    if most is not None and most.added_db < math.inf:
        text += f" Most error arises in {_layer(most)}: {_db(most.added_db)}."
    return text


def _outputs(found: ModelComparison) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("output")
    for header in ("SNR, worst\nsample", "cosine", "max abs", "max rel"):
        table.add_column(header, justify="right", no_wrap=True)
    for name, one in found.outputs.per_output.items():
        if not one.is_compared:
            table.add_row(name, Text("not finite", style="red"), "", "", "")
            continue
        table.add_row(name, _colored(one.snr_db), f"{one.cosine:.6f}", f"{one.max_abs:.3g}", f"{one.max_rel:.3g}")
    return table


def _tensors(layers: Sequence[LayerDifference], *, is_wide: bool) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("tensor (node)", overflow="fold")
    table.add_column("", no_wrap=True)
    # Of an output the other table has the worst sample.
    figures = ("SNR, all\nsamples", "arises", *(("cosine", "KL") if is_wide else ()), "max abs")
    for header in figures:
        table.add_column(header, justify="right", no_wrap=True)
    for layer in layers:
        one = layer.tensor
        table.add_row(
            _name(layer),
            layer.op_type,
            _colored(one.snr_db),
            "" if layer.added_db == math.inf else _db(layer.added_db),
            *((f"{one.cosine:.5f}", f"{one.kl_nats:.3f}") if is_wide else ()),
            f"{one.max_abs:.3g}",
        )
    return table


def _name(layer: LayerDifference) -> Text:
    """The tensor, and the node that computes it where its name does not say that ("conv1/Conv_output_0" does)."""
    name = layer.tensor.name
    if not layer.node or name.startswith(layer.node):
        return Text(name)
    return Text.assemble(name, (f" ({layer.node})", "dim"))


def _layer(layer: LayerDifference) -> str:
    return f"{layer.op_type} '{layer.node}'"


def _colored(snr_db: float) -> Text:
    style = "red" if snr_db < OFF_DB else "yellow" if snr_db < OFF_DB + 10 else "green"
    return Text(_db(snr_db), style=style)


def _db(snr_db: float) -> str:
    if snr_db == math.inf:
        return "equal"
    return "no signal" if snr_db == -math.inf else f"{snr_db:.1f} dB"
