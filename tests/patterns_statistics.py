"""Patterns of `tests.patterns` that take statistics over channels, or put channels on grids (groups, attention heads).

Importing this module adds them to `PATTERNS`.
"""

from __future__ import annotations

import numpy as np

from tests.patterns import Feature, Net, pattern

__all__: list[str] = []


def tokens_of(net: Net, x: Feature) -> str:
    """(N, C, H, W) -> (N, H*W, C)."""
    flat = net.op("Reshape", x.name, net.const(np.array([0, x.channels, x.size * x.size])))
    return str(net.op("Transpose", flat, perm=[0, 2, 1]))


def image_of(net: Net, x: Feature, tokens: str, channels: int) -> Feature:
    """(N, H*W, C) -> (N, C, H, W)."""
    back = net.op("Transpose", tokens, perm=[0, 2, 1])
    shape = net.const(np.array([0, channels, x.size, x.size]))
    return net.like(x, net.op("Reshape", back, shape), channels=channels)


def linear(net: Net, x: str, width_in: int, width_out: int) -> str:
    return str(net.op("Add", net.op("MatMul", x, net.weight(width_in, width_out)), net.weight(width_out)))


# --- statistics over channels ---------------------------------------------------------------------------------


@pattern
def layer_norm(net: Net, x: Feature) -> Feature:
    tokens = tokens_of(net, net.conv(x, 24))
    normed = net.op("LayerNormalization", tokens, net.weight(24), net.weight(24), axis=-1, epsilon=1e-3)
    return image_of(net, x, normed, 24)


@pattern
def layer_norm_decomposed(net: Net, x: Feature) -> Feature:
    tokens, last = tokens_of(net, net.conv(x, 24)), net.const(np.array([-1]))
    centred = net.op("Sub", tokens, net.op("ReduceMean", tokens, last))
    variance = net.op("ReduceMean", net.op("Pow", centred, net.const(2.0)), last)
    scaled = net.op("Div", centred, net.op("Sqrt", net.op("Add", variance, net.const(1e-3))))
    shifted = net.op("Add", net.op("Mul", scaled, net.weight(24)), net.weight(24))
    return image_of(net, x, shifted, 24)


@pattern
def rms_norm_decomposed(net: Net, x: Feature) -> Feature:
    tokens = tokens_of(net, net.conv(x, 24))
    power = net.op("ReduceMean", net.op("Mul", tokens, tokens), net.const(np.array([-1])))
    scale = net.op("Reciprocal", net.op("Sqrt", net.op("Add", power, net.const(1e-3))))
    return image_of(net, x, net.op("Mul", net.op("Mul", tokens, scale), net.weight(24)), 24)


@pattern
def layer_norm_over_channels_and_places(net: Net, x: Feature) -> Feature:
    """Statistics over (C, H, W); scale and shift have all three axes."""
    y, s = net.conv(x, 16), x.size
    return net.like(y, net.op("LayerNormalization", y.name, net.weight(16, s, s), net.weight(16, s, s), axis=1))


def native_group_norm(net: Net, x: Feature, channels: int, groups: int) -> Feature:
    y = net.conv(x, channels)
    net.needs_opset(21)  # from here on, scale and shift have one entry for each channel
    normed = net.op("GroupNormalization", y.name, net.weight(channels), net.weight(channels), num_groups=groups)
    return net.like(y, normed)


@pattern
def group_norm(net: Net, x: Feature) -> Feature:
    """Eight groups of four: whole groups go, which is exact."""
    return native_group_norm(net, x, 32, 8)


@pattern
def group_norm_of_few_groups(net: Net, x: Feature) -> Feature:
    """Two groups of twelve: parts of both go, and the statistics are those of the rest."""
    return native_group_norm(net, x, 24, 2)


@pattern
def group_norm_reshaped(net: Net, x: Feature) -> Feature:
    """Reshape - InstanceNormalization - Reshape, as PyTorch's exporter writes GroupNorm below opset 18."""
    y = net.conv(x, 24)
    grouped = net.op("Reshape", y.name, net.const(np.array([0, 4, -1])))
    ones, zeros = net.const(np.ones(4, np.float32)), net.const(np.zeros(4, np.float32))
    normed = net.op("InstanceNormalization", grouped, ones, zeros)
    back = net.op("Reshape", normed, net.const(np.array([0, 24, x.size, x.size])))
    return net.like(y, net.op("Add", net.op("Mul", back, net.weight(24, 1, 1)), net.weight(24, 1, 1)))


@pattern
def softmax_over_channels(net: Net, x: Feature) -> Feature:
    y = net.conv(x, 16)
    return net.like(y, net.op("Softmax", y.name, axis=1))


@pattern
def lp_norm_over_channels(net: Net, x: Feature) -> Feature:
    y = net.conv(x, 16)
    return net.like(y, net.op("LpNormalization", y.name, axis=1, p=2))


@pattern
def local_response(net: Net, x: Feature) -> Feature:
    y = net.conv(x, 16)
    return net.like(y, net.op("LRN", y.name, size=5, alpha=0.5, beta=0.75))


@pattern
def spatial_attention(net: Net, x: Feature) -> Feature:
    """CBAM: mean and maximum over the channels make a map that scales all of them."""
    y, channels = net.conv(x, 16), net.const(np.array([1]))
    both = net.op("Concat", net.op("ReduceMean", y.name, channels), net.op("ReduceMax", y.name, channels), axis=1)
    gate = net.op("Sigmoid", net.op("Conv", both, net.weight(1, 2, 3, 3), pads=[1] * 4))
    return net.like(y, net.op("Mul", y.name, gate))


@pattern
def global_response_norm(net: Net, x: Feature) -> Feature:
    """ConvNeXt V2: the norm of each channel over its mean over all channels."""
    y = net.conv(x, 16)
    norm = net.op("ReduceL2", y.name, net.const(np.array([2, 3])))
    share = net.op("Div", norm, net.op("Add", net.op("ReduceMean", norm, net.const(np.array([1]))), net.const(1e-3)))
    scaled = net.op("Mul", net.weight(16, 1, 1), net.op("Mul", y.name, share))
    return net.like(y, net.op("Add", net.op("Add", scaled, net.weight(1, 16, 1, 1)), y.name))


# --- attention ------------------------------------------------------------------------------------------------


def scores_and_values(net: Net, query: str, key_transposed: str, value: str, width: int, bias: str = "") -> str:
    """(N, heads, L, width) each, the key with its last axes swapped."""
    scores = net.op("Mul", net.op("MatMul", query, key_transposed), net.const(width**-0.5))
    if bias:
        scores = net.op("Add", scores, bias)
    return str(net.op("MatMul", net.op("Softmax", scores, axis=-1), value))


def heads_of(net: Net, tokens: str, heads: int, width: int, perm: list[int]) -> str:
    split = net.op("Reshape", tokens, net.const(np.array([0, -1, heads, width])))
    return str(net.op("Transpose", split, perm=perm))


def self_attention(net: Net, x: Feature, heads: int, width: int) -> Feature:
    tokens, c = tokens_of(net, x), x.channels
    query = heads_of(net, linear(net, tokens, c, heads * width), heads, width, [0, 2, 1, 3])
    key = heads_of(net, linear(net, tokens, c, heads * width), heads, width, [0, 2, 3, 1])
    value = heads_of(net, linear(net, tokens, c, heads * width), heads, width, [0, 2, 1, 3])
    mixed = net.op("Transpose", scores_and_values(net, query, key, value, width), perm=[0, 2, 1, 3])
    joined = net.op("Reshape", mixed, net.const(np.array([0, -1, heads * width])))
    return image_of(net, x, linear(net, joined, heads * width, 24), 24)


@pattern
def attention_of_many_heads(net: Net, x: Feature) -> Feature:
    """Eight heads of width four: whole heads go."""
    return self_attention(net, x, heads=8, width=4)


@pattern
def attention_of_two_heads(net: Net, x: Feature) -> Feature:
    """Two heads of width eight: the width goes, of queries and keys apart from values."""
    return self_attention(net, x, heads=2, width=8)


@pattern
def fused_qkv_by_gather(net: Net, x: Feature) -> Feature:
    """timm: one product, reshaped to (N, L, 3, heads, width), and three Gathers."""
    tokens, heads, width = tokens_of(net, x), 4, 4
    fused = linear(net, tokens, x.channels, 3 * heads * width)
    split = net.op("Reshape", fused, net.const(np.array([0, x.size**2, 3, heads, width])))
    parts = net.op("Transpose", split, perm=[2, 0, 3, 1, 4])
    query, key, value = (net.op("Gather", parts, net.const(np.array(index)), axis=0) for index in range(3))
    turned = net.op("Transpose", key, perm=[0, 1, 3, 2])
    mixed = net.op("Transpose", scores_and_values(net, query, turned, value, width), perm=[0, 2, 1, 3])
    joined = net.op("Reshape", mixed, net.const(np.array([0, x.size**2, heads * width])))
    return image_of(net, x, linear(net, joined, heads * width, 16), 16)


@pattern
def fused_qkv_by_split(net: Net, x: Feature) -> Feature:
    """One product, split in three, then into heads; a relative position bias for each head."""
    tokens, heads, width, length = tokens_of(net, x), 4, 6, x.size**2
    fused = linear(net, tokens, x.channels, 3 * heads * width)
    query, key, value = net.op("Split", fused, net.const(np.array([heads * width] * 3)), axis=-1, outputs=3)
    bias = net.weight(1, heads, length, length)
    mixed = scores_and_values(
        net,
        heads_of(net, query, heads, width, [0, 2, 1, 3]),
        heads_of(net, key, heads, width, [0, 2, 3, 1]),
        heads_of(net, value, heads, width, [0, 2, 1, 3]),
        width,
        bias,
    )
    turned = net.op("Transpose", mixed, perm=[0, 2, 1, 3])
    joined = net.op("Reshape", turned, net.const(np.array([0, length, heads * width])))
    return image_of(net, x, linear(net, joined, heads * width, 16), 16)


@pattern
def relative_position_table(net: Net, x: Feature) -> Feature:
    """Swin: a table (distances, heads) is picked from by a matrix of indices and added to the scores."""
    tokens, heads, width, length = tokens_of(net, x), 4, 4, x.size**2
    indices = net.const(net.rng.integers(0, 9, (length * length,)))
    picked = net.op("Gather", net.weight(9, heads), indices, axis=0)
    table = net.op("Reshape", picked, net.const(np.array([length, length, heads])))
    bias = net.op("Unsqueeze", net.op("Transpose", table, perm=[2, 0, 1]), net.const(np.array([0])))
    parts = [
        heads_of(net, linear(net, tokens, x.channels, heads * width), heads, width, perm)
        for perm in ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3])
    ]
    turned = net.op("Transpose", scores_and_values(net, *parts, width, bias), perm=[0, 2, 1, 3])
    joined = net.op("Reshape", turned, net.const(np.array([0, length, heads * width])))
    return image_of(net, x, linear(net, joined, heads * width, 16), 16)


@pattern
def grouped_query_attention(net: Net, x: Feature) -> Feature:
    """Eight query heads share four key-value heads, which Expand repeats."""
    tokens, heads, shared, width, length = tokens_of(net, x), 8, 4, 4, x.size**2

    def repeated(projected: str, perm: list[int]) -> str:
        split = heads_of(net, projected, shared, width, [0, 2, 1, 3])
        spread = net.op("Unsqueeze", split, net.const(np.array([2])))
        target = net.const(np.array([1, shared, heads // shared, length, width]))
        joined = net.op("Reshape", net.op("Expand", spread, target), net.const(np.array([-1, heads, length, width])))
        return str(net.op("Transpose", joined, perm=perm))

    query = heads_of(net, linear(net, tokens, x.channels, heads * width), heads, width, [0, 2, 1, 3])
    key = repeated(linear(net, tokens, x.channels, shared * width), [0, 1, 3, 2])
    value = repeated(linear(net, tokens, x.channels, shared * width), [0, 1, 2, 3])
    turned = net.op("Transpose", scores_and_values(net, query, key, value, width), perm=[0, 2, 1, 3])
    joined = net.op("Reshape", turned, net.const(np.array([0, length, heads * width])))
    return image_of(net, x, linear(net, joined, heads * width, 16), 16)


# --- grids ----------------------------------------------------------------------------------------------------


@pattern
def pixel_shuffle_by_reshape(net: Net, x: Feature) -> Feature:
    """(N, C*2*2, H, W) -> (N, C, H*2, W*2) with a Transpose of six axes."""
    y, s = net.conv(x, 32), x.size
    split = net.op("Reshape", y.name, net.const(np.array([0, 8, 2, 2, s, s])))
    turned = net.op("Transpose", split, perm=[0, 1, 4, 2, 5, 3])
    joined = net.op("Reshape", turned, net.const(np.array([0, 8, 2 * s, 2 * s])))
    return net.like(x, joined, channels=8, size=2 * s)


@pattern
def picked_by_a_table(net: Net, x: Feature) -> Feature:
    """A matrix of indices, as `as_strided` is exported: (N, C, H, W) -> (N, 4, 6, H, W) -> (N, 24, H, W)."""
    y, s = net.conv(x, 24), x.size
    table = net.op("Gather", y.name, net.const(np.arange(24).reshape(4, 6)[:, ::-1]), axis=1)
    return net.like(y, net.op("Reshape", table, net.const(np.array([0, 24, s, s]))))


@pattern
def standardized_weight(net: Net, x: Feature) -> Feature:
    """BiT, NF-Net: a filter is normalized before it is used."""
    raw, axes = net.weight(16, x.channels, 1, 1), net.const(np.array([1, 2, 3]))
    centred = net.op("Sub", raw, net.op("ReduceMean", raw, axes))
    deviation = net.op("Sqrt", net.op("ReduceMean", net.op("Mul", centred, centred), axes))
    filters = net.op("Div", centred, net.op("Add", deviation, net.const(1e-3)))
    return net.like(x, net.op("Conv", x.name, filters), channels=16)


@pattern
def pointwise_over_places(net: Net, x: Feature) -> Feature:
    """A convolution with a kernel of size 1 whose places are channels (CoaT's class tokens)."""
    y = net.conv(x, 16)
    turned = net.op("Transpose", y.name, perm=[0, 2, 1, 3])
    mixed = net.op("Conv", turned, net.weight(x.size, x.size, 1, 1), net.weight(x.size))
    return net.like(y, net.op("Transpose", mixed, perm=[0, 2, 1, 3]))


@pattern
def talking_heads(net: Net, x: Feature) -> Feature:
    """CaiT: scores of all heads are mixed by a matrix before and after the Softmax."""
    tokens, heads, width = tokens_of(net, x), 4, 4
    parts = [
        heads_of(net, linear(net, tokens, x.channels, heads * width), heads, width, perm)
        for perm in ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3])
    ]
    scores = net.op("Transpose", net.op("MatMul", parts[0], parts[1]), perm=[0, 2, 3, 1])
    mixed = net.op("Transpose", linear(net, scores, heads, heads), perm=[0, 3, 1, 2])
    weights = net.op("Transpose", net.op("Softmax", mixed, axis=-1), perm=[0, 2, 3, 1])
    again = net.op("Transpose", linear(net, weights, heads, heads), perm=[0, 3, 1, 2])
    turned = net.op("Transpose", net.op("MatMul", again, parts[2]), perm=[0, 2, 1, 3])
    joined = net.op("Reshape", turned, net.const(np.array([0, x.size**2, heads * width])))
    return image_of(net, x, linear(net, joined, heads * width, 16), 16)
