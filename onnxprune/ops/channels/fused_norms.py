"""Channels through ONNX Runtime's fused additions, embeddings and normalizations of transformer blocks."""

from __future__ import annotations

from onnxprune.ops.channels.broadcasting import broadcast
from onnxprune.ops.channels.flow import CHANNELS, Flow
from onnxprune.ops.channels.labelling import Role
from onnxprune.ops.channels.labels import LabelArray

__all__: list[str] = []

_MS = "com.microsoft"
_STATISTICS = "is averaged over"


@CHANNELS.register("SkipLayerNormalization", "SkipSimplifiedLayerNormalization", domain=_MS)
def _skip_normalization(flow: Flow) -> None:
    """Input + skip (+ bias), normalized over the last axis; outputs are Y, mean, deviation and the sum."""
    labels = broadcast(flow, (0, 1))
    channels = _scaled(flow, labels[-1] if labels else None, range(2, flow.num_inputs))
    for index in (0, 3):
        flow.give([*labels[:-1], channels], index)
    for index in (1, 2):
        flow.give([*labels[:-1], None], index)


@CHANNELS.register("EmbedLayerNormalization", domain=_MS)
def _embedding(flow: Flow) -> None:
    """Rows of up to three tables, picked by index and added, then normalized over their width.

    Ids, segment ids, word table, position table, segment table, scale, shift, mask, position ids.
    """
    channels = flow.own(2, 1)
    if channels is None:
        for position in range(3, 7):
            flow.freeze_input(position, f"meets a table of fixed width in {flow.where}")
        return
    for position in (3, 4):
        if flow.has(position):
            flow.bind(position, 1, channels, Role.PARAMETER)
    channels = _scaled(flow, channels, (5, 6))
    for index in (0, 2):
        flow.give([None, None, channels], index)


def _scaled(flow: Flow, channels: LabelArray | None, positions: range | tuple[int, ...]) -> LabelArray | None:
    """Statistics over the channels, which scale, shift and bias have one entry for."""
    given = [position for position in positions if flow.has(position)]
    if channels is None:
        for position in given:
            flow.freeze_input(position, f"scales fixed channels in {flow.where}")
        return None
    flow.measure(channels, _STATISTICS)
    for position in given:
        flow.bind(position, 0, channels, Role.PARAMETER)
    return channels
