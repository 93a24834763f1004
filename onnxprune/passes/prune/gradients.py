"""Gradients of a loss by a model's weights, from a file that the user's training code wrote.

One array for each weight, named like the initializer and shaped like it, or with one more axis in front: one gradient
for each minibatch. The mean over minibatches of a squared gradient is something else than the square of the mean, which
is next to nothing where training has converged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from zipfile import BadZipFile, ZipFile

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxprune.errors import BadDataError, MissingExtraError, UsageError, disk_errors, quoted_list
from onnxprune.ops.layout import LAYOUT

if TYPE_CHECKING:
    from onnxprune.passes.prune.analysis import ChannelClasses, ChannelGroup

__all__ = ["Gradients", "open_gradients"]

_HOW_TO = "See docs/howto/prune-criteria.md for a script that writes gradients under the names of the ONNX file."


class _Archive(Protocol):
    """Arrays by name, each read when it is asked for."""

    def names(self) -> Sequence[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str) -> npt.NDArray[Any]: ...


@dataclass(frozen=True, slots=True, eq=False)
class Gradients:
    """The gradients of one model's weights. Only what is asked for is in memory."""

    path: Path
    archive: _Archive
    transposed: frozenset[str]
    """Weights whose gradient lies in the file with its two axes swapped."""
    unused: tuple[str, ...] = ()
    """Arrays in the file for which the model has no weight."""

    def __contains__(self, name: object) -> bool:
        return name in self.archive.names()

    def of(self, weight: ir.Value) -> tuple[npt.NDArray[Any], ...]:
        """The gradients of `weight`, one for each minibatch, each of its shape."""
        name = weight.name or ""
        array = self.archive.read(name)
        if name in self.transposed:
            array = np.swapaxes(array, -1, -2)
        return tuple(array) if array.ndim > len(_shape(weight)) else (array,)

    def require_finite(self) -> None:
        """Read everything once.

        Raises:
            BadDataError: A gradient holds NaN or infinity.
        """
        for name in self.archive.names():
            if not np.isfinite(self.archive.read(name)).all():
                raise BadDataError(
                    f"The gradient of '{name}' in '{self.path}' holds values that are NaN or infinite.",
                    "Look at the loss and the batches that it was computed on.",
                )


def open_gradients(path: Path, model: ir.Model, classes: ChannelClasses) -> Gradients:
    """Open the gradient file at `path` for `model`, and check its names and shapes.

    1. Every array belongs to an initializer of the model, but for biases, which exporters merge where they are equal. A
       file with others was made for another model (one whose BatchNorm was not folded yet, for one), and then the
       weights that seem to fit are others, too.
    2. Its shape is that of the weight, or the same with minibatches in front. Two axes may be swapped (PyTorch's Linear
       stores what a MatMul takes transposed), where the sizes say so; a square weight is taken as it is.
    3. Every weight of a layer whose channels may be pruned has one.

    Raises:
        UsageError: There is no such file, or it has another format.
        MissingExtraError: It is a .safetensors file, and safetensors is not installed.
        BadDataError: One of the above does not hold.
    """
    archive = _open(path)
    weights = {name: value for name, value in model.graph.initializers.items() if value.const_value is not None}
    unused = [name for name in archive.names() if name not in weights]
    telling = _not_merely_merged(unused)
    if telling:
        raise BadDataError(
            f"'{path}' has gradients of {quoted_list(telling)}, which the model has no weight for: it was made for "
            "another model, or for this one before its BatchNorm was folded or its weights were renamed.",
            _HOW_TO,
        )
    missing = [name for name in _wanted(classes.groups, weights) if name not in archive.names()]
    if missing:
        raise BadDataError(f"'{path}' has no gradients of {quoted_list(missing)}.", _HOW_TO)
    known = [name for name in archive.names() if name in weights]
    counts = {name: _num_minibatches(archive.shape(name), weights[name]) for name in known}
    other = next((name for name in known if counts[name] != counts[known[0]]), None)
    if other is not None:
        raise BadDataError(
            f"'{path}' has {counts[known[0]]} minibatches of '{known[0]}' and {counts[other]} of '{other}'.",
            f"All gradients must come from the same minibatches. {_HOW_TO}",
        )
    transposed = {name for name in known if _is_transposed(path, archive.shape(name), weights[name])}
    return Gradients(path, archive, frozenset(transposed), tuple(unused))


def _not_merely_merged(unused: Sequence[str]) -> list[str]:
    """Of the arrays without a weight, those that an exporter doesn't lose by merging equal biases.

    A bias alone may be merged with another one. Where its weight is gone, too, a normalization was folded.
    """
    gone = set(unused)
    return [name for name in unused if not name.endswith(".bias") or f"{name.removesuffix('bias')}weight" in gone]


def _wanted(groups: Sequence[ChannelGroup], weights: Mapping[str, ir.Value]) -> list[str]:
    """Main weights of layers on which channels lie that may be removed."""
    names: dict[str, None] = {}
    for group in groups:
        for slices in group.slices if group.frozen_reason is None else ():
            name = slices.weight.name or ""
            if name in weights and any(_is_main_weight(use.node, use.idx) for use in slices.weight.uses()):
                names[name] = None
    return list(names)


def _is_main_weight(node: ir.Node, position: int) -> bool:
    layout = LAYOUT.get(node)
    return layout is not None and layout.weight_input == position


def _num_minibatches(shape: tuple[int, ...], weight: ir.Value) -> int:
    return shape[0] if len(shape) == len(_shape(weight)) + 1 else 1


def _is_transposed(path: Path, shape: tuple[int, ...], weight: ir.Value) -> bool:
    """True when the gradient has the weight's two axes swapped.

    Raises:
        BadDataError: The shape does not fit either way.
    """
    wanted = _shape(weight)
    own = shape[1:] if len(shape) == len(wanted) + 1 else shape
    if own == wanted:
        return False
    if len(wanted) == 2 and own == wanted[::-1]:
        return True
    raise BadDataError(
        f"The gradient of '{weight.name}' in '{path}' has shape {list(shape)}, the weight has {list(wanted)}.",
        f"It must be that shape, or that with minibatches in front. {_HOW_TO}",
    )


def _shape(weight: ir.Value) -> tuple[int, ...]:
    return () if weight.const_value is None else tuple(int(size) for size in weight.const_value.shape.numpy())


def _open(path: Path) -> _Archive:
    if not path.is_file():
        raise UsageError(f"There is no gradient file '{path}'.", "Check `prune.gradients`.")
    if path.suffix == ".npz":
        return _NpzArchive(path)
    if path.suffix == ".safetensors":
        return _SafetensorsArchive(path)
    raise UsageError(f"Gradient file '{path}' is neither .npz nor .safetensors.", _HOW_TO)


class _NpzArchive:
    """A NumPy archive; headers are read at once, arrays when asked for."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with disk_errors(f"Reading '{path}'"):
            try:
                with ZipFile(path) as archive:
                    self._shapes = {name.removesuffix(".npy"): _npy_shape(archive, name) for name in archive.namelist()}
            except (BadZipFile, ValueError, EOFError) as error:
                raise BadDataError(f"'{path}' can't be read as .npz: {error}.", _HOW_TO) from error

    def names(self) -> Sequence[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str) -> npt.NDArray[Any]:
        with disk_errors(f"Reading '{self._path}'"), np.load(self._path, allow_pickle=False) as file:
            found: npt.NDArray[Any] = file[name]
            return found


def _npy_shape(archive: ZipFile, member: str) -> tuple[int, ...]:
    """The shape in the header of one array; raises ValueError where it is none."""
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
        if dtype.kind != "f":
            raise ValueError(f"'{member}' holds {dtype}, not floating point numbers")
        return tuple(int(size) for size in shape)


class _SafetensorsArchive:
    def __init__(self, path: Path) -> None:
        try:
            import safetensors
        except ImportError:
            raise MissingExtraError(
                package="safetensors", extra="torch", needed_for=f"Gradient file '{path}'"
            ) from None
        self._path = path
        self._open = safetensors.safe_open
        with disk_errors(f"Reading '{path}'"):
            try:
                with self._open(path, framework="numpy") as file:
                    self._shapes: dict[str, tuple[int, ...]] = {
                        name: tuple(file.get_slice(name).get_shape()) for name in list(file.keys())
                    }
            except safetensors.SafetensorError as error:
                raise BadDataError(f"'{path}' can't be read as .safetensors: {error}.", _HOW_TO) from error

    def names(self) -> Sequence[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str) -> npt.NDArray[Any]:
        with disk_errors(f"Reading '{self._path}'"), self._open(self._path, framework="numpy") as file:
            found: npt.NDArray[Any] = file.get_tensor(name)
            return found
