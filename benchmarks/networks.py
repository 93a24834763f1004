"""Networks for the benchmarks, made from the topologies that ship in the onnx wheel with seeded weights.

The wheel's light models hold `ConstantOfShape` in place of weights. Here they get He-normal weights and sane BatchNorm
statistics, so that activations stay in a range and zeros mean nothing.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

LIGHT = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"


def write_light_network(name: str, path: Path, *, seed: int = 0) -> Path:
    """The topology `name` ("resnet50", "squeezenet", ...) with seeded weights, at `path`."""
    model = onnx.load(LIGHT / f"light_{name}.onnx")
    rng = np.random.default_rng(seed)
    shapes = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    roles = {
        input_name: (node.op_type, index) for node in model.graph.node for index, input_name in enumerate(node.input)
    }
    kept = []
    for node in model.graph.node:
        if node.op_type != "ConstantOfShape" or node.input[0] not in shapes:
            kept.append(node)
            continue
        shape = tuple(int(size) for size in shapes[node.input[0]])
        op_type, index = roles[node.output[0]]
        model.graph.initializer.append(numpy_helper.from_array(_values(rng, shape, op_type, index), node.output[0]))
    del model.graph.node[:]
    model.graph.node.extend(kept)
    read = {input_name for node in kept for input_name in node.input}
    for field in (model.graph.initializer, model.graph.input):
        used = [entry for entry in field if entry.name in read]
        del field[:]
        field.extend(used)
    onnx.save(model, path)
    return path


def _values(rng: np.random.Generator, shape: tuple[int, ...], op_type: str, index: int) -> np.ndarray:
    if op_type == "BatchNormalization":
        # inputs 1 to 4: scale, bias, mean, variance
        centre, spread = {1: (1.0, 0.1), 2: (0.0, 0.1), 3: (0.0, 0.1), 4: (1.0, 0.1)}[index]
        return (
            np.abs(rng.normal(centre, spread, shape)).astype(np.float32)
            if index in (1, 4)
            else rng.normal(centre, spread, shape).astype(np.float32)
        )
    fan_in = int(np.prod(shape[1:])) if len(shape) > 1 else shape[0]
    return rng.normal(0, np.sqrt(2 / fan_in), shape).astype(np.float32)
