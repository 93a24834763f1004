"""Writing operators and integer weights into a graph, one node after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxprune.contracts import QuantizationPlan, WeightQuantization
from onnxprune.graph.metadata import MODULE_PATH_KEY, module_path
from onnxprune.graph.names import UniqueNames
from onnxprune.graph.weights import add_initializer, constant_array
from onnxprune.ops.affine import largest_symmetric_integer, quantize_array
from onnxprune.targets.qdq.spelling import Spelling

__all__ = ["GraphWriter"]


class GraphWriter:
    """Writes new operators beside the node given to `start`, and remembers what several of them share."""

    def __init__(self, model: ir.Model, plan: QuantizationPlan, spelling: Spelling) -> None:
        self._model = model
        self._plan = plan
        self._spelling = spelling
        self._value_names = UniqueNames.of_values(model)
        self._node_names = UniqueNames.of_nodes(model)
        self._position: ir.Node | None = None
        self._is_behind = False
        self._quantized: dict[ir.Value, tuple[ir.Value, ir.Value, ir.Value]] = {}
        self._dropped: list[ir.Value] = []
        # Scales and zero points recur: each is stored once.
        self._scalars: dict[tuple[str, float], ir.Value] = {}

    @property
    def spelling(self) -> Spelling:
        """The processor that is written for."""
        return self._spelling

    @property
    def plan(self) -> QuantizationPlan:
        """Scales of weights."""
        return self._plan

    def start(self, node: ir.Node) -> None:
        """Write before `node` from now on."""
        self._position, self._is_behind = node, False

    def continue_behind(self, node: ir.Node) -> None:
        """Write behind `node` from now on, one operator behind the other."""
        self._position, self._is_behind = node, True

    def integers(
        self, weight: ir.Value, planned: WeightQuantization, *, for_arithmetic: bool
    ) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
        """The integers of a weight in its shape, and their scales.

        Args:
            weight: A constant that this node needs no more; it is dropped when nobody else reads it.
            planned: Its scales in the plan.
            for_arithmetic: The integers are multiplied as such, so that a processor may need fewer bits; False: they
                become float first, and all bits count.
        """
        scales, bits = np.asarray(planned.scales, dtype=np.float32), planned.num_bits
        if for_arithmetic:
            scales, bits = self._spelling.weight_scales(planned), self._spelling.weight_bits(planned)
        largest = largest_symmetric_integer(bits)
        integers = quantize_array(
            np.asarray(constant_array(weight), dtype=np.float32),
            scales.tolist(),
            axis=planned.axis,
            smallest=-largest,
            largest=largest,
            dtype=np.int8,
        )
        self._dropped.append(weight)
        return integers.astype(np.int8, copy=False), scales

    def quantized_input(self, value: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        """uint8 integers, scale and zero point of an activation as each run finds them; shared by all its readers."""
        if value not in self._quantized:
            name = value.name or "tensor"
            outputs = self.emit(
                "DynamicQuantizeLinear",
                [value],
                names=(f"{name}_quantized", f"{name}_scale", f"{name}_zero_point"),
                like=self._current(),
            )
            self._quantized[value] = (outputs[0], outputs[1], outputs[2])
        return self._quantized[value]

    def emit(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
        *,
        names: Sequence[str],
        like: ir.Node,
        domain: str = "",
    ) -> tuple[ir.Value, ...]:
        """The outputs of a new operator in the module of `like`, called `names` or the next free names.

        Of its metadata only the module is copied: an exporter's stack traces (1 to 3 KB a node) would outweigh what
        small weights save.
        """
        node = ir.node(
            op_type,
            inputs,
            attributes=attributes or {},
            domain=domain,
            num_outputs=len(names),
            name=self._node_names.claim(f"{like.name}_{op_type}"),
            metadata_props={MODULE_PATH_KEY: module_path(like)} if module_path(like) else {},
        )
        if self._is_behind:
            self._model.graph.insert_after(self._current(), node)
            self._position = node
        else:
            self._model.graph.insert_before(self._current(), node)
        if domain:
            self._model.opset_imports.setdefault(domain, 1)
        for output, name in zip(node.outputs, names, strict=True):
            output.name = self._value_names.claim(name) if name else ""
        return tuple(node.outputs)

    def to_float(self, integers: ir.Value, name: str, *, like: ir.Node) -> ir.Value:
        """`integers` as float32 numbers, by Cast."""
        (real,) = self.emit("Cast", [integers], {"to": ir.DataType.FLOAT.value}, names=[name], like=like)
        return real

    def free_name(self, wanted: str) -> str:
        """`wanted` or the next free name for a tensor; nothing else gets it from now on."""
        return self._value_names.claim(wanted)

    def constant(self, array: npt.NDArray[Any], name: str) -> ir.Value:
        """A new initializer."""
        return add_initializer(self._model.graph, name, array, self._value_names)

    def scalar(self, number: npt.NDArray[Any], name: str) -> ir.Value:
        """The initializer of a number of one type, made once."""
        key = (number.dtype.name, number.item())
        if key not in self._scalars:
            self._scalars[key] = self.constant(number, name)
        return self._scalars[key]

    def replace(self, node: ir.Node, outputs: Sequence[ir.Value], *, named: ir.Value) -> None:
        """Let `outputs` take the place, the names and the shapes of the outputs of `node`, and remove it.

        The operator that makes `named` takes over its name and metadata.
        """
        for old, new in zip(node.outputs, outputs, strict=True):
            new.type, new.shape = old.type, old.shape
            new.metadata_props.update(old.metadata_props)
            old.replace_all_uses_with(new, replace_graph_outputs=True)
            name, old.name = old.name, self._value_names.claim(f"{old.name}_replaced") if old.name else old.name
            new.name = name
        maker = named.producer()
        if maker is not None:
            maker.metadata_props.update(node.metadata_props)
            maker.name, node.name = node.name, self._node_names.claim(f"{node.name}_replaced")
        self._model.graph.remove(node, safe=True)

    def drop_unused_weights(self) -> None:
        """Remove the float weights whose integers took their place."""
        initializers = self._model.graph.initializers
        for value in dict.fromkeys(self._dropped):
            name = value.name or ""
            if not value.uses() and not value.is_graph_output() and name in initializers:
                del initializers[name]

    def _current(self) -> ir.Node:
        if self._position is None:
            raise ValueError("`start` must be called before anything is written.")
        return self._position
