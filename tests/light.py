"""The nine light topologies of the onnx wheel: real graphs whose weights are left out, with seeded weights.

They are opset 9 and IR 3. Their `ConstantOfShape` nodes stand for weights; here these become initializers. Weights are
one row of random numbers repeated in shuffled scale, which is quick to make for a VGG as well and still ranks channels.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnx.backend.test
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper, version_converter

from onnxprune.graph.canonical import CanonicalModel, canonicalize
from onnxprune.ops.shapes import SHAPES

FOLDER = Path(onnx.backend.test.__file__).parent / "data" / "light"
LIGHT_TOPOLOGIES = tuple(sorted(path.stem.removeprefix("light_") for path in FOLDER.glob("light_*.onnx")))


def light_topology(name: str, *, seed: int = 0) -> CanonicalModel:
    """One of `LIGHT_TOPOLOGIES` in canonical form."""
    proto = onnx.load(FOLDER / f"light_{name}.onnx")
    proto.ir_version = 8
    # Converted while the weights are not there yet: upgrading a VGG with weights takes a minute.
    proto = version_converter.convert_version(proto, 18)
    shapes = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    weight_nodes = [node for node in proto.graph.node if node.op_type == "ConstantOfShape" and node.input[0] in shapes]
    weight_shapes = {node.output[0]: tuple(int(size) for size in shapes[node.input[0]]) for node in weight_nodes}
    nodes = [node for node in proto.graph.node if node.output[0] not in weight_shapes]
    used = {name for node in nodes for name in node.input}
    constants = [tensor for tensor in proto.graph.initializer if tensor.name in used]
    inputs = [value for value in proto.graph.input if value.name in used and value.name not in shapes]
    inputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in weight_shapes.items()]
    del proto.graph.node[:], proto.graph.initializer[:], proto.graph.input[:], proto.graph.value_info[:]
    proto.graph.node.extend(nodes)
    proto.graph.initializer.extend(constants)
    proto.graph.input.extend(inputs)
    model = ir.from_proto(proto)
    rng = np.random.default_rng(seed)
    for value in [value for value in model.graph.inputs if value.name in weight_shapes]:
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(_weight(weight_shapes[value.name or ""], rng), name=value.name)
        model.graph.register_initializer(value)
    return canonicalize(model, shape_rules=SHAPES)


def _weight(shape: tuple[int, ...], rng: np.random.Generator) -> npt.NDArray[np.float32]:
    if len(shape) < 2:
        # Also BatchNorm's variances: positive.
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    fan_in = int(np.prod(shape[1:]))
    row = rng.standard_normal((1, *shape[1:]), dtype=np.float32) / np.float32(np.sqrt(fan_in))
    scales = rng.uniform(0.5, 1.5, (shape[0], *([1] * (len(shape) - 1)))).astype(np.float32)
    return row * scales
