"""What `onnxprune inspect` shows: layers, figures, and the channel classes with the reasons why some are frozen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from onnxprune.contracts import CanonicalModel, ModelFigures
from onnxprune.evaluate.figures import model_figures
from onnxprune.graph.metadata import module_path
from onnxprune.ops.macs import count_macs_per_sample
from onnxprune.passes.prune import ChannelSummary, analyze_channels, channel_reach, summarize_channels
from onnxprune.report.channels import print_channels
from onnxprune.report.figures import bytes_text, count_text

__all__ = ["Inspection", "LayerRow", "inspect_model", "print_inspection"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRow:
    """One node with weights. `macs` is None where they are unknown; `shape` is that of its first output."""

    name: str
    op_type: str
    module: str
    shape: tuple[int | str | None, ...] | None
    parameters: int
    weight_bytes: int
    macs: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """A model's inputs, outputs, figures and layers; `channels` and `unlabelled_parameters` are None unless asked for.

    `unlabelled_parameters` are those of weights that no channel rule says anything about.
    """

    opset: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    figures: ModelFigures
    layers: tuple[LayerRow, ...]
    channels: tuple[ChannelSummary, ...] | None
    unlabelled_parameters: int | None


def inspect_model(model: CanonicalModel, *, with_channels: bool) -> Inspection:
    """Gather everything that `print_inspection` shows."""
    macs = count_macs_per_sample(model)
    layers = []
    for node in model.graph:
        weights = [value for value in node.inputs if value is not None and value.const_value is not None]
        floats = [value.const_value for value in weights if value.dtype is not None and value.dtype.is_floating_point()]
        parameters = sum(tensor.size for tensor in floats if tensor is not None)
        if not parameters and not macs.per_node.get(node.name or ""):
            continue
        shape = node.outputs[0].shape
        layers.append(
            LayerRow(
                name=node.name or "",
                op_type=node.op_type,
                module=module_path(node),
                shape=None if shape is None else tuple(d if isinstance(d, int) else d.value for d in shape),
                parameters=parameters,
                weight_bytes=sum(tensor.nbytes for tensor in floats if tensor is not None),
                macs=macs.per_node.get(node.name or ""),
            )
        )
    classes = analyze_channels(model) if with_channels else None
    reach = None if classes is None else channel_reach(model, classes)
    return Inspection(
        opset=model.opset_imports.get("", 0),
        inputs=tuple(f"{value.name}: {value.dtype} {value.shape}" for value in model.graph.inputs),
        outputs=tuple(f"{value.name}: {value.dtype} {value.shape}" for value in model.graph.outputs),
        figures=model_figures(model),
        layers=tuple(layers),
        channels=None if reach is None or classes is None else summarize_channels(classes, reach),
        unlabelled_parameters=None if reach is None else reach.unlabelled,
    )


def print_inspection(
    inspection: Inspection, *, max_layers: int | None, max_groups: int | None, console: Console | None = None
) -> None:
    """Print the inspection with the layers that have the most MACs, and the groups that have the most parameters."""
    console = console or Console()
    figures = inspection.figures
    for direction, values in (("input", inspection.inputs), ("output", inspection.outputs)):
        for value in values:
            console.print(Text(f"{direction:7}{value}"))
    macs = "unknown (dynamic shape)" if figures.macs is None else count_text(figures.macs)
    console.print(
        Text(
            f"\nopset {inspection.opset}, {figures.num_nodes} nodes, {count_text(figures.parameters)} parameters "
            f"({count_text(figures.nonzero_parameters)} not zero, {bytes_text(figures.weight_bytes)}), {macs} MACs\n"
        )
    )
    if figures.nonzero_parameters < figures.parameters and figures.sparse_bytes:
        sparse = ", ".join(f"{name} {bytes_text(size)}" for name, size in figures.sparse_bytes.items())
        console.print(Text(f"weights as sparse storage: {sparse} (dense {bytes_text(figures.weight_bytes)})\n"))
    _print_layers(console, inspection.layers, max_layers)
    if figures.uncounted_ops:
        console.print(Text(f"MACs not counted: {', '.join(figures.uncounted_ops)}.", style="dim"))
    if inspection.channels is not None:
        print_channels(
            console,
            inspection.channels,
            parameters=figures.parameters,
            unlabelled_parameters=inspection.unlabelled_parameters or 0,
            limit=max_groups,
        )


def _print_layers(console: Console, layers: Sequence[LayerRow], limit: int | None) -> None:
    with_modules = any(row.module for row in layers)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for header in ("layer", *(["module"] if with_modules else []), "operator", "output"):
        table.add_column(header)
    for header in ("parameters", "bytes", "MACs"):
        table.add_column(header, justify="right")
    ranked = sorted(layers, key=lambda row: (row.macs or 0, row.parameters), reverse=True)[:limit]
    shown = {row.name for row in ranked}
    for row in layers:
        if row.name not in shown:
            continue
        shape = "?" if row.shape is None else "x".join("?" if dim is None else str(dim) for dim in row.shape)
        table.add_row(
            row.name,
            *([row.module] if with_modules else []),
            row.op_type,
            shape,
            count_text(row.parameters),
            bytes_text(row.weight_bytes),
            "" if row.macs is None else count_text(row.macs),
        )
    console.print(table)
    if len(shown) < len(layers):
        console.print(Text(f"and {len(layers) - len(shown)} smaller layers (--all shows them)", style="dim"))
