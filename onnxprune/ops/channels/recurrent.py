"""Channels through recurrent layers: LSTM, GRU and RNN.

Symbols: D directions, H hidden units, I input features, g gates (4, 3, 1), T steps, N batch.
    W (D, g*H, I)   R (D, g*H, H)   B (D, 2*g*H)   P (D, 3*H, LSTM only)   states (D, N, H)
    Y (T, D, N, H)  Y_h, Y_c (D, N, H); with layout = 1 the axes other than H stand in another order
A hidden unit owns one row in each gate's block of W, R and B, and a column of R: the columns are what a step sums over
with the state of the step before. Masking them is what removing the unit means: nobody sees its state any more.
Both directions share one tensor of each kind, so they lose the same units.
"""

from __future__ import annotations

import numpy as np

from onnxprune.ops.channels.flow import CHANNELS, Flow
from onnxprune.ops.channels.labelling import Role
from onnxprune.ops.channels.labels import LabelArray

__all__: list[str] = []

_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
# LSTM: peepholes of the input, output and forget gate.
_PEEPHOLES = 3


@CHANNELS.register("RNN", "GRU", "LSTM")
def _recurrent(flow: Flow) -> None:
    flow.freeze_input(0, f"is a step or batch axis of {flow.where}", axes=[0, 1])
    flow.freeze_input(1, f"is a direction of {flow.where}", axes=[0])
    incoming = flow.axis_labels(0, 2)
    if incoming is not None:
        flow.bind(1, 2, incoming, Role.INPUT)
        flow.contract(0, 2)
    else:
        flow.freeze_input(1, f"meets fixed input features in {flow.where}", axes=[2])
    hidden = _hidden_units(flow)
    if hidden is None:
        for position in (1, 2, 3, 5, 6, 7):
            flow.freeze_input(position, f"holds hidden units of {flow.where}, which stay")
        return
    for index in range(len(flow.node.outputs)):
        rank = 4 if index == 0 else 3
        flow.give([*([None] * (rank - 1)), hidden], index)
    features, units = (flow.dims(1) or ())[2], len(hidden)
    if isinstance(features, int):
        share = features / (features + units)
        own = np.tile(hidden, _GATES[flow.node.op_type])
        flow.macs_sum((share, (own, incoming)), (1 - share, (own, hidden)))


def _hidden_units(flow: Flow) -> LabelArray | None:
    """Labels of the hidden units, bound wherever they are held; None where the sizes don't say how many there are."""
    gates, recurrence = _GATES[flow.node.op_type], flow.dims(2)
    units = recurrence[2] if recurrence is not None and len(recurrence) == 3 else None
    if not isinstance(units, int) or flow.dims(1) is None:
        return None
    hidden = flow.fresh(units)
    blocks = np.tile(hidden, gates)
    flow.bind(1, 1, blocks, Role.FILTER)
    flow.bind(2, 1, blocks, Role.PARAMETER)
    flow.bind(2, 2, hidden, Role.INPUT)
    flow.contract(2, 2)
    if flow.has(3):
        flow.bind(3, 1, np.tile(hidden, 2 * gates), Role.PARAMETER)
    for position in (5, 6):
        if flow.has(position):
            flow.bind(position, 2, hidden, Role.PARAMETER)
            flow.freeze_input(position, f"is a direction or batch axis of {flow.where}", axes=[0, 1])
    if flow.has(7):
        flow.bind(7, 1, np.tile(hidden, _PEEPHOLES), Role.PARAMETER)
    for position in (2, 3, 7):
        flow.freeze_input(position, f"is a direction of {flow.where}", axes=[0])
    flow.count_in_attribute("hidden_size", hidden)
    return hidden
