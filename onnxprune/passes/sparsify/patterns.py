"""Patterns: what a unit of zeros is, how it is scored, and which weights belong to it.

Notation: a weight has O outputs along `out_axis`, I inputs along `in_axis`, and R positions along all other axes
together (kernel positions, LSTM directions). The structured patterns see it as an array of shape (R, O, I).

| pattern | unit | units of one weight, in index order | score |
|---|---|---|---|
| unstructured | one weight | as stored | magnitude |
| "n:m" | one weight | (R, O, I) | magnitude; only the m - n smallest of each group of m along I can be chosen |
| "rxc" | r outputs x c inputs at one position | (R, ceil(O/r), ceil(I/c)) | L2 norm |
| unit | everything that makes one output | (O,) | L2 norm |

"n:m" means, as in NVIDIA's 2:4, *at most n non-zeros in m consecutive inputs*. A last group of fewer than m keeps the
same promise. Which weights of a group can be chosen does not depend on the level, so levels nest for every pattern.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from onnxprune.passes.sparsify.select import INELIGIBLE, Keys, keys_of

__all__ = [
    "Block",
    "NOfM",
    "Pattern",
    "Unit",
    "UnitAxes",
    "Unstructured",
    "parse_pattern",
    "unit_keys",
    "unit_mask",
    "window_keys",
]


@dataclass(frozen=True, slots=True)
class Unstructured:
    """Single weights, anywhere."""


@dataclass(frozen=True, slots=True)
class NOfM:
    """At most `keep` non-zeros in each group of `group` consecutive inputs."""

    keep: int
    group: int


@dataclass(frozen=True, slots=True)
class Block:
    """Blocks of `outputs` x `inputs` weights."""

    outputs: int
    inputs: int


@dataclass(frozen=True, slots=True)
class Unit:
    """Whole filters or neurons."""


Pattern: TypeAlias = Unstructured | NOfM | Block | Unit


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitAxes:
    """Which axes of a weight count outputs and inputs."""

    out_axis: int
    in_axis: int


def parse_pattern(text: str) -> Pattern:
    """The pattern that `text` spells: "unstructured", "unit", "2:4", "4x1".

    Raises:
        ValueError: It spells none; the message says what would.
    """
    if text == "unstructured":
        return Unstructured()
    if text == "unit":
        return Unit()
    if match := re.fullmatch(r"(\d{1,4}):(\d{1,4})", text):
        keep, group = int(match[1]), int(match[2])
        if not 0 < keep < group:
            raise ValueError(f"pattern '{text}' must keep at least one and fewer than all of each group, as '2:4' does")
        return NOfM(keep, group)
    if match := re.fullmatch(r"(\d{1,4})x(\d{1,4})", text):
        outputs, inputs = int(match[1]), int(match[2])
        if outputs < 1 or inputs < 1 or outputs * inputs == 1:
            raise ValueError(f"pattern '{text}' must hold at least two weights, as '4x1' (outputs x inputs) does")
        return Block(outputs, inputs)
    raise ValueError(
        f"unknown pattern '{text}'; known: 'unstructured', 'unit', n:m as in '2:4', "
        "and blocks of outputs x inputs as in '4x1'"
    )


def unit_keys(pattern: Pattern, weight: npt.NDArray[np.generic], axes: UnitAxes) -> Keys:
    """The key of every unit of `weight` in index order; `INELIGIBLE` where the pattern forbids the choice."""
    if isinstance(pattern, Unstructured):
        return keys_of(_as_float32(weight).ravel())
    view = _as_float32(_output_input_view(weight, axes))
    match pattern:
        case NOfM(keep, group):
            return _keys_in_groups(view, keep, group).ravel()
        case Block(outputs, inputs):
            return keys_of(_block_norms(view, outputs, inputs).ravel())
        case Unit():
            squares = np.square(view, dtype=np.float64)
            return keys_of(np.sqrt(squares.sum(axis=(0, 2))).astype(np.float32))


def unit_mask(
    pattern: Pattern, chosen: npt.NDArray[np.bool_], shape: tuple[int, ...], axes: UnitAxes
) -> npt.NDArray[np.bool_]:
    """Which weights of an array of `shape` belong to the `chosen` units (booleans in index order)."""
    if isinstance(pattern, Unstructured):
        return chosen.reshape(shape)
    outer = _output_input_shape(shape, axes)  # (other axes..., O, I)
    num_outputs, num_inputs = outer[-2:]
    num_positions = int(np.prod(outer[:-2], dtype=np.int64))
    match pattern:
        case NOfM():
            mask = chosen.reshape(outer)
        case Block(outputs, inputs):
            rows, columns = -(-num_outputs // outputs), -(-num_inputs // inputs)
            blocks = chosen.reshape(num_positions, rows, columns)
            mask = blocks.repeat(outputs, axis=1)[:, :num_outputs].repeat(inputs, axis=2)[:, :, :num_inputs]
        case Unit():
            mask = np.broadcast_to(chosen[None, :, None], (num_positions, num_outputs, num_inputs))
    return np.moveaxis(mask.reshape(outer), (-2, -1), (axes.out_axis, axes.in_axis))


def window_keys(window: npt.NDArray[np.generic]) -> Keys:
    """Keys of single weights in a window of one dimension."""
    return keys_of(_as_float32(window))


def _as_float32(weight: npt.NDArray[np.generic]) -> npt.NDArray[np.float32]:
    # float16 and bfloat16 fit; float64 is ranked at float32's precision, and equal ranks fall back to index order.
    return weight.astype(np.float32, copy=False)


def _output_input_view(weight: npt.NDArray[np.generic], axes: UnitAxes) -> npt.NDArray[np.generic]:
    """(R, O, I)."""
    moved = np.moveaxis(weight, (axes.out_axis, axes.in_axis), (-2, -1))
    return moved.reshape(-1, *moved.shape[-2:])


def _output_input_shape(shape: tuple[int, ...], axes: UnitAxes) -> tuple[int, ...]:
    others = [size for axis, size in enumerate(shape) if axis not in (axes.out_axis, axes.in_axis)]
    return (*others, shape[axes.out_axis], shape[axes.in_axis])


def _keys_in_groups(view: npt.NDArray[np.float32], keep: int, group: int) -> Keys:
    """(R, O, I) -> keys of the same shape, the `keep` largest of each group made ineligible."""
    keys = keys_of(view)
    num_inputs = view.shape[-1]
    padding = -num_inputs % group
    # What is missing in the last group counts as zeros that are there already, so it is ranked before all keys.
    ranked = np.full((*view.shape[:-1], num_inputs + padding), -1, np.int64)
    ranked[..., :num_inputs] = keys
    grouped = ranked.reshape(*view.shape[:-1], -1, group)  # (R, O, I/m, m)
    order = np.argsort(grouped, axis=-1, kind="stable")
    kept = np.zeros(grouped.shape, np.bool_)
    np.put_along_axis(kept, order[..., group - keep :], values=True, axis=-1)
    keys[kept.reshape(ranked.shape)[..., :num_inputs]] = INELIGIBLE
    return keys


def _block_norms(view: npt.NDArray[np.float32], outputs: int, inputs: int) -> npt.NDArray[np.float32]:
    """(R, O, I) -> (R, ceil(O/r), ceil(I/c)): L2 norms; blocks at the edge hold fewer weights."""
    num_positions, num_outputs, num_inputs = view.shape
    padded = np.zeros((num_positions, num_outputs + -num_outputs % outputs, num_inputs + -num_inputs % inputs))
    padded[:, :num_outputs, :num_inputs] = view
    blocks = padded.reshape(num_positions, padded.shape[1] // outputs, outputs, padded.shape[2] // inputs, inputs)
    norms: npt.NDArray[np.float64] = np.sqrt(np.square(blocks).sum(axis=(2, 4)))
    return norms.astype(np.float32)
