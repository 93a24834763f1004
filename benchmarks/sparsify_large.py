"""`sparsify` on a model whose weights stand in a data file of several GB, against copying and hashing that file.

Goals for 4 GB: peak resident memory under 1.5 GB, and at most 3 times as long (page cache warm for both).
Needs twice the model's size on the disk of `TMPDIR`.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnx.helper
from process_figures import ProcessFigures, measure_command

COLUMNS = 8192
CHUNK_BYTES = 8 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, default=4.0, help="size of the weights in GB (10**9 bytes)")
    parser.add_argument("--tensor-mb", type=float, default=256.0, help="size of one weight in MB")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--child", choices=("copy", "sparsify"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child == "copy":
        copy_and_hash(arguments.folder)
    elif arguments.child == "sparsify":
        sparsify(arguments.folder)
    else:
        compare(arguments.gb, arguments.tensor_mb, arguments.rounds)


def compare(size_gb: float, tensor_mb: float, rounds: int) -> None:
    with tempfile.TemporaryDirectory(prefix="onnxprune-bench-") as name:
        folder = Path(name)
        write_model(folder, size_bytes=int(size_gb * 1e9), tensor_bytes=int(tensor_mb * 1e6))
        copied: list[ProcessFigures] = []
        sparse: list[ProcessFigures] = []
        run_child("copy", folder)  # warms the page cache
        for _ in range(rounds):
            copied.append(run_child("copy", folder))
            sparse.append(run_child("sparsify", folder))
        # The fastest of each: what is left is the least disturbed by other work on the machine.
        copy_s, sparsify_s = min(f.wall_s for f in copied), min(f.wall_s for f in sparse)
        peak_gb = max(f.peak_tree_rss_bytes for f in sparse) / 1e9
        print(f"weights                {size_gb:.1f} GB in tensors of {tensor_mb:.0f} MB")
        print(f"copy and hash          {copy_s:.1f} s")
        print(f"load, sparsify, save   {sparsify_s:.1f} s")
        print(f"ratio                  {sparsify_s / copy_s:.2f}   (goal: at most 3)")
        print(f"peak resident memory   {peak_gb:.2f} GB   (goal: under 1.5)")


def run_child(what: str, folder: Path) -> ProcessFigures:
    figures = measure_command([sys.executable, __file__, "--child", what, "--folder", str(folder)])
    for path in folder.glob("written*"):
        path.unlink()
    return figures


def write_model(folder: Path, *, size_bytes: int, tensor_bytes: int) -> None:
    """A chain of MatMuls with normally distributed weights, written chunk by chunk."""
    rng = np.random.default_rng(0)
    rows = max(1, round(tensor_bytes / 4 / COLUMNS))
    layers = max(1, round(size_bytes / (rows * COLUMNS * 4)))
    nodes, initializers, offset = [], [], 0
    with (folder / "model.onnx.data").open("wb") as data:
        for layer in range(layers):
            weight = onnx.TensorProto(name=f"w{layer}", data_type=onnx.TensorProto.FLOAT, dims=[COLUMNS, rows])
            weight.data_location = onnx.TensorProto.EXTERNAL
            size = rows * COLUMNS * 4
            for key, value in (("location", "model.onnx.data"), ("offset", offset), ("length", size)):
                weight.external_data.add(key=key, value=str(value))
            for start in range(0, size, CHUNK_BYTES):
                count = min(CHUNK_BYTES, size - start) // 4
                data.write(rng.standard_normal(count, dtype=np.float32).tobytes())
            offset += size
            initializers.append(weight)
            nodes.append(onnx.helper.make_node("MatMul", ["x", f"w{layer}"], [f"y{layer}"], name=f"matmul{layer}"))
    graph = onnx.helper.make_graph(
        nodes,
        "large",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, COLUMNS])],
        [onnx.helper.make_tensor_value_info(f"y{i}", onnx.TensorProto.FLOAT, [1, rows]) for i in range(layers)],
        initializers,
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    (folder / "model.onnx").write_bytes(model.SerializeToString())


def copy_and_hash(folder: Path) -> None:
    source, target = folder / "model.onnx.data", folder / "written.data"
    shutil.copyfile(source, target)
    with source.open("rb") as file:
        hashlib.file_digest(file, "sha256")


def sparsify(folder: Path) -> None:
    from onnxprune.contracts import ModelState, PassContext
    from onnxprune.convert.onnx_file import load_onnx
    from onnxprune.graph.io import save_model
    from onnxprune.passes.harness import run_pass
    from onnxprune.passes.sparsify import SparsifyConfig, SparsifyPass

    state = ModelState(model=load_onnx(folder / "model.onnx"))
    outcome = run_pass(SparsifyPass(SparsifyConfig(sparsity=0.5)), state, PassContext())
    save_model(outcome.state.model, folder / "written.onnx")


if __name__ == "__main__":
    main()
