"""What `prune` with ratio 0.5 does to networks: parameters, MACs, speed on one thread, exactness, time and memory.

    python pruning.py                 the topologies of the onnx wheel, and stacks of 10 to 1,000 blocks
    python pruning.py FOLDER ...      every .onnx file in these folders as well, each in a process of its own

Goals: every model comes out and runs; median of parameters removed 0.70; geometric mean of the speed-up 2.3; difference
from the oracle at most 1e-4; a ResNet-50 under 5 s; time no worse than linear in the number of blocks.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
from networks import LIGHT, write_light_network
from onnx import TensorProto, helper, numpy_helper

_LIMIT_S = 900


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(prune_one(Path(sys.argv[2]))))
        return
    with tempfile.TemporaryDirectory() as scratch:
        networks = [
            write_light_network(path.stem.removeprefix("light_"), Path(scratch) / path.name)
            for path in sorted(LIGHT.glob("light_*.onnx"))
        ]
        networks += [path for folder in sys.argv[1:] for path in sorted(Path(folder).glob("*.onnx"))]
        summarize([in_a_process(path) for path in networks])
        print("\nStacks: a residual block of two convolutions, and one of LayerNorm, attention of 8 heads and an MLP")
        for kind, write in (("residual", write_residual_stack), ("attention", write_attention_stack)):
            for blocks in (10, 100, 1000):
                found = in_a_process(write(Path(scratch) / f"{kind}_{blocks}.onnx", blocks), quiet=True)
                print(f"{kind:10} {blocks:5} blocks {found['nodes']:6} nodes  {found['prune_s']:7.2f} s", flush=True)


def prune_one(path: Path) -> dict[str, float | str]:
    """Figures of one model, measured in this process."""
    import onnxprune
    from onnxprune.graph.weights import weight_bytes
    from onnxprune.runtime.feeds import working_feeds
    from onnxprune.runtime.latency import interleaved_ratio
    from onnxprune.runtime.sessions import ort_runner_from_model

    state = onnxprune.load(path)
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    pruned, _ = onnxprune.apply(state, "prune", {"ratio": 0.5})
    prune_s = time.perf_counter() - start
    extra_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib) / 1e3
    _, report = onnxprune.apply(state, "prune", {"ratio": 0.5, "verify_oracle": True})
    figures = report.figures
    found: dict[str, float | str] = {
        "name": path.stem,
        "nodes": len(state.model.graph),
        "weights_mb": weight_bytes(state.model) / 1e6,
        "prune_s": prune_s,
        "extra_mb": extra_mb,
        "parameters": 1 - figures["parameters_after"] / max(figures["parameters_before"], 1),
        "oracle": figures.get("oracle_difference", float("nan")),
    }
    if "macs_after" in figures:
        found["macs"] = 1 - figures["macs_after"] / max(figures["macs_before"], 1)
    before = ort_runner_from_model(state.model, threads=1)
    after = ort_runner_from_model(pruned.model, threads=1)
    found["speed_up"] = interleaved_ratio(before, after, working_feeds(before, seed=0), min_runs=10, threads=1).ratio
    return found


def in_a_process(path: Path, *, quiet: bool = False) -> dict[str, float | str]:
    command = [sys.executable, __file__, "--one", str(path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_LIMIT_S)
    except subprocess.TimeoutExpired:
        return {"name": path.stem, "error": f"took more than {_LIMIT_S} s"}
    if done.returncode:
        found: dict[str, float | str] = {"name": path.stem, "error": done.stderr.strip().splitlines()[-1][:200]}
    else:
        found = json.loads(done.stdout.splitlines()[-1])
    if not quiet:
        print(line(found), flush=True)
    return found


def line(found: dict[str, float | str]) -> str:
    if "error" in found:
        return f"{found['name']:44} FAILED {found['error']}"
    macs = f"{found['macs']:.3f}" if "macs" in found else "  -  "
    return (
        f"{found['name']:44} parameters -{found['parameters']:.3f}  MACs -{macs}  {found['speed_up']:5.2f}x  "
        f"oracle {found['oracle']:.0e}  {found['prune_s']:6.2f} s  {found['nodes']:5} nodes  "
        f"{found['weights_mb']:6.1f} MB  +{found['extra_mb']:.0f} MB"
    )


def summarize(all_found: list[dict[str, float | str]]) -> None:
    good = [found for found in all_found if "error" not in found]
    removed = [float(found["parameters"]) for found in good]
    speed_ups = [float(found["speed_up"]) for found in good]
    print(
        f"\n{len(good)} of {len(all_found)} models; parameters removed: median {statistics.median(removed):.3f}, "
        f"least {min(removed):.3f}, {sum(value < 0.45 for value in removed)} under 0.45; speed-up: geometric mean "
        f"{statistics.geometric_mean(speed_ups):.2f}, least {min(speed_ups):.2f}; largest difference from the oracle "
        f"{np.nanmax([float(found['oracle']) for found in good]):.1e}"
    )


class Stack:
    """Collects nodes and weights of a long network."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def op(self, op_type: str, *inputs: str, **attributes: object) -> str:
        """A node; returns the name of its output."""
        name = f"{op_type}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, list(inputs), [f"{name}_out"], name=name, **attributes))
        return f"{name}_out"

    def constant(self, array: np.ndarray) -> str:
        """An initializer."""
        name = f"constant_{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(array, name))
        return name

    def weight(self, *shape: int) -> str:
        """Random weights that keep the scale of what goes through them."""
        scale = 1 / np.sqrt(max(np.prod(shape[:-1]), 1))
        return self.constant((self.rng.standard_normal(shape) * scale).astype(np.float32))

    def save(self, path: Path, shape: list[int], output: str, out_shape: list[int]) -> Path:
        """The network from 'x' to `output`, written to `path`."""
        graph = helper.make_graph(
            self.nodes,
            "stack",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, out_shape)],
            self.weights,
        )
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
        return path


def write_residual_stack(path: Path, blocks: int) -> Path:
    stack = Stack()
    stream = stack.op("Conv", "x", stack.weight(32, 3, 3, 3), pads=[1] * 4)
    for _ in range(blocks):
        hidden = stack.op("Relu", stack.op("Conv", stream, stack.weight(32, 32, 3, 3), pads=[1] * 4))
        stream = stack.op("Add", stream, stack.op("Conv", hidden, stack.weight(32, 32, 1, 1)))
    pooled = stack.op("Flatten", stack.op("GlobalAveragePool", stream))
    return stack.save(path, [1, 3, 8, 8], stack.op("Gemm", pooled, stack.weight(32, 10)), [1, 10])


def write_attention_stack(path: Path, blocks: int, *, width: int = 64, heads: int = 8, length: int = 16) -> Path:
    stack = Stack()
    stream = stack.op("MatMul", "x", stack.weight(16, width))
    split = stack.constant(np.array([0, length, heads, width // heads]))
    joined = stack.constant(np.array([0, length, width]))
    for _ in range(blocks):
        normed = stack.op("LayerNormalization", stream, stack.weight(width), stack.weight(width), axis=-1)
        parts = [stack.op("Reshape", stack.op("MatMul", normed, stack.weight(width, width)), split) for _ in range(3)]
        query, value = (stack.op("Transpose", part, perm=[0, 2, 1, 3]) for part in (parts[0], parts[2]))
        scores = stack.op("MatMul", query, stack.op("Transpose", parts[1], perm=[0, 2, 3, 1]))
        mixed = stack.op("MatMul", stack.op("Softmax", scores, axis=-1), value)
        back = stack.op("Reshape", stack.op("Transpose", mixed, perm=[0, 2, 1, 3]), joined)
        stream = stack.op("Add", stream, stack.op("MatMul", back, stack.weight(width, width)))
        normed = stack.op("LayerNormalization", stream, stack.weight(width), stack.weight(width), axis=-1)
        hidden = stack.op("Relu", stack.op("MatMul", normed, stack.weight(width, 2 * width)))
        stream = stack.op("Add", stream, stack.op("MatMul", hidden, stack.weight(2 * width, width)))
    return stack.save(path, [1, length, 16], stack.op("MatMul", stream, stack.weight(width, 10)), [1, length, 10])


if __name__ == "__main__":
    main()
