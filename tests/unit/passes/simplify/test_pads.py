"""Explicit padding as part of the operator that reads it."""

from __future__ import annotations

import numpy as np
import pytest

W = np.random.default_rng(0).standard_normal((4, 3, 3, 3)).astype(np.float32)
LOWEST = np.array(np.finfo(np.float32).min)


def pads(*sizes):
    return np.array(sizes, np.int64)


SPATIAL = pads(0, 0, 1, 1, 0, 0, 1, 2)
FOLDED = {
    "Conv": ("Pad(x, p)", "Conv(a, w)", {"p": SPATIAL, "w": W}),
    "Conv with pads of its own": ("Pad(x, p, zero)", "Conv<pads=[1,0,1,0]>(a, w)", {"p": SPATIAL, "w": W}),
    "Conv that says VALID": ("Pad(x, p)", 'Conv<auto_pad="VALID">(a, w)', {"p": SPATIAL, "w": W}),
    "Conv, axes given": ("Pad(x, p, zero, axes)", "Conv(a, w)", {"p": pads(2, 1), "axes": pads(-1), "w": W}),
    "AveragePool": ("Pad(x, p)", "AveragePool<kernel_shape=[3,3]>(a)", {"p": SPATIAL}),
    "AveragePool that counts padding": (
        "Pad(x, p)",
        "AveragePool<kernel_shape=[4,4],count_include_pad=1,pads=[1,1,1,1]>(a)",
        {"p": SPATIAL},
    ),
    "MaxPool, lowest number": ("Pad(x, p, lowest)", "MaxPool<kernel_shape=[3,3],strides=[2,2]>(a)", {"p": SPATIAL}),
    "MaxPool of what is not negative": ("Pad(r, p)", "MaxPool<kernel_shape=[3,3],strides=[2,2]>(a)", {"p": SPATIAL}),
}
KEPT = {
    "another value than 0": ("Pad(x, p, one)", "Conv(a, w)", {"p": SPATIAL, "w": W}),
    "channels": ("Pad(x2, p)", "Conv(a, w)", {"p": pads(0, 1, 0, 0, 0, 0, 0, 0), "w": W}),
    "cropping": ("Pad(x, p)", "Conv(a, w)", {"p": pads(0, 0, -1, 1, 0, 0, 1, 1), "w": W}),
    "reflection": ('Pad<mode="reflect">(x, p)', "Conv(a, w)", {"p": SPATIAL, "w": W}),
    "a reader that pads by itself": ("Pad(x, p)", 'Conv<auto_pad="SAME_UPPER">(a, w)', {"p": SPATIAL, "w": W}),
    "MaxPool of anything": ("Pad(x, p)", "MaxPool<kernel_shape=[3,3]>(a)", {"p": SPATIAL}),
    "MaxPool with windows in the padding alone": (
        "Pad(r, p)",
        "MaxPool<kernel_shape=[2,2]>(a)",
        {"p": pads(0, 0, 2, 2, 0, 0, 2, 2)},
    ),
    "AveragePool that does not count its own padding": (
        "Pad(x, p)",
        "AveragePool<kernel_shape=[3,3],pads=[1,1,1,1]>(a)",
        {"p": SPATIAL},
    ),
    "rounding up": ("Pad(x, p)", "AveragePool<kernel_shape=[2,2],strides=[2,2],ceil_mode=1>(a)", {"p": SPATIAL}),
    "transposed Conv": ("Pad(x, p)", "ConvTranspose(a, w)", {"p": SPATIAL, "w": W.swapaxes(0, 1).copy()}),
}


def build(make_model, pad, reader, constants):
    used = {"zero": np.zeros((), np.float32), "one": np.ones((), np.float32), "lowest": LOWEST}
    text = f"""g (float[1,3,6,7] x, float[1,2,6,7] x2) => (float[A,B,C,D] y, float[1,3,6,7] r, float[1,2,6,7] s) {{
        r = Relu(x)  s = Relu(x2)  a = {pad}  y = {reader}
    }}"""
    return make_model(text, {**{k: v for k, v in used.items() if f" {k})" in pad or f" {k}," in pad}, **constants})


@pytest.mark.parametrize("name", FOLDED)
def test_padding_becomes_part_of_the_reader(make_model, simplified, op_types, name):
    assert "Pad" not in op_types(simplified(build(make_model, *FOLDED[name]), "pads"))


@pytest.mark.parametrize("name", KEPT)
def test_padding_that_is_something_else_stays(make_model, simplified, op_types, name):
    assert "Pad" in op_types(simplified(build(make_model, *KEPT[name]), "pads"))


def test_padding_that_two_nodes_read_stays(make_model, simplified, op_types):
    model = make_model(
        "g (float[1,3,6,7] x) => (float[A,B,C,D] y, float[E,F,G,H] z) { a = Pad(x, p)  y = Conv(a, w)  z = Relu(a) }",
        {"p": SPATIAL, "w": W},
    )
    assert "Pad" in op_types(simplified(model, "pads"))
