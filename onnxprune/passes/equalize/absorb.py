"""High biases: what a channel never falls below, moved behind the Relu, where it widens no range.

With c at most the smallest number of a channel before the Relu, relu(x) = relu(x - c) + c for c >= 0, and c can join
the bias of the next layers as the sum of their kernels over c (Nagel et al. 2019, section 4.1.3). There, c is
max(0, mean - 3 std); here it is also no larger than anything that calibration saw, so that the function stays on it. A
layer that pads its input with zeros would see c missing at the border, so it absorbs nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxprune.passes.equalize.sites import Site
from onnxprune.passes.layerwise.layers import BiasPlace, find_bias
from onnxprune.passes.layerwise.statistics import ChannelStatistics

__all__ = ["absorbable"]

Array = npt.NDArray[Any]

_DEVIATIONS = 3.0
# A share of the channel's range that is worth moving.
_SMALLEST_SHARE = 0.01


def absorbable(site: Site, raw: ChannelStatistics, factors: Array) -> Array:
    """What can be taken off each channel of the producer, divided by `factors`; zeros where nothing can.

    Args:
        site: Where.
        raw: Statistics of what the producer gives, before `factors`.
        factors: Of the site.
    """
    nothing = np.zeros(site.channels)
    if not site.is_direct or site.bias is None or not all(map(_can_take_it, site.consumers)):
        return nothing
    shift = np.maximum(0.0, np.minimum(raw.low, raw.mean - _DEVIATIONS * raw.std))
    worth = shift > _SMALLEST_SHARE * np.maximum(raw.high, 0.0)
    found: Array = np.where(worth, shift, 0.0) / factors
    return found


def _can_take_it(node: ir.Node) -> bool:
    place = find_bias(node)
    if not isinstance(place, BiasPlace) or place.holder != (node.name or "") or node.op_type == "ConvTranspose":
        return False
    is_padded = any(node.attributes.get_ints("pads", ())) or node.attributes.get_string("auto_pad", "NOTSET") not in (
        "NOTSET",
        "VALID",
    )
    return not is_padded
