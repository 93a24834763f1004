"""What runs in the interpreter that has onnx-neural-compressor: `python neural_compressor_child.py FOLDER`.

Stand-alone: it imports nothing of onnxprune and runs on Python 3.8 with numpy 1. FOLDER holds `job.json`, and gets
`answer.json` with either {"value": ...} or {"error": {"type": "", "message": ..., "hint": ""}}.

    {"task": "probe"}     versions, missing packages, and what its ONNX Runtime reads
    {"task": "quantize"}  quantizes model.onnx with samples/*.npz, and writes quantized.onnx in the QDQ format
"""

from __future__ import annotations

import functools
import json
import os
import sys
import threading
import traceback
import types
from importlib import metadata, util
from pathlib import Path
from typing import Any

# What version 1.0 imports; its package metadata name neither scipy nor prettytable.
MODULES = (
    "onnx_neural_compressor",
    "onnx",
    "onnxruntime",
    "numpy",
    "scipy",
    "prettytable",
    "psutil",
    "cpuinfo",
    "pydantic",
)
DISTRIBUTIONS = ("onnx-neural-compressor", "onnx", "onnxruntime", "numpy")
NEWEST_OPSET = 40
NEWEST_IR_VERSION = 20
OLDEST_OPSET = 18
"""onnxprune's models are never older, and every ONNX Runtime that reads this opset reads IR version 8."""
OLDEST_IR_VERSION = 8


def main(folder: Path) -> Any:
    """Do what the job of `folder` says; the value of the answer."""
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    return probe() if job["task"] == "probe" else quantize(job, folder)


# --- what is here ---------------------------------------------------------------------------------------------


def probe() -> dict[str, Any]:
    """Versions and missing packages; what can be read, and the files that change with an installation, if all is here.

    The engine itself is not imported: that takes seconds.
    """
    missing = [module for module in MODULES if util.find_spec(module) is None]
    found: dict[str, Any] = {"python": "{}.{}.{}".format(*sys.version_info[:3]), "missing": missing}
    if missing:
        return found
    found["versions"] = {name: metadata.version(name) for name in DISTRIBUTIONS if _is_installed(name)}
    found["files"] = [str(file.locate()) for name in DISTRIBUTIONS if _is_installed(name) for file in _record_of(name)]
    found["max_opset"], found["max_ir_version"] = _readable()
    return found


def _is_installed(name: str) -> bool:
    # onnxruntime has other distributions (onnxruntime-gpu) of the same module.
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _record_of(name: str) -> list[Any]:
    return [file for file in metadata.files(name) or () if file.name == "RECORD"]


def _readable() -> tuple[int, int]:
    """The newest opset and IR version that both onnx and onnxruntime take; 0 where there is none."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4

    def loads(opset: int, ir_version: int) -> bool:
        values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy"]
        graph = onnx.helper.make_graph(
            [onnx.helper.make_node("Identity", ["x"], ["y"])], "probe", values[:1], values[1:]
        )
        model = onnx.ModelProto(ir_version=ir_version, graph=graph)
        model.opset_import.add(domain="", version=opset)
        try:
            onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        except Exception:  # noqa: BLE001 - refusing is what it is asked for, and its errors have no common base
            return False
        return True

    opsets = range(min(onnx.defs.onnx_opset_version(), NEWEST_OPSET), OLDEST_OPSET - 1, -1)
    opset = next((opset for opset in opsets if loads(opset, OLDEST_IR_VERSION)), 0)
    versions = range(min(int(onnx.IR_VERSION), NEWEST_IR_VERSION), OLDEST_IR_VERSION - 1, -1)
    return opset, next((version for version in versions if loads(OLDEST_OPSET, version)), 0)


# --- quantizing -----------------------------------------------------------------------------------------------


def quantize(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Write quantized.onnx; the operators that were to be quantized."""
    _limit_memory(job["memory_limit_bytes"])
    _limit_threads(job["threads"])
    # Only read where a config.json lies beside the model, and a quarter of the time that the engine takes to start.
    sys.modules["transformers"] = types.ModuleType("transformers")
    import onnxruntime
    from onnx_neural_compressor import constants, data_reader
    from onnx_neural_compressor.algorithms.post_training_quant import calibrator
    from onnx_neural_compressor.quantization import CalibrationMethod, QuantFormat, config
    from onnx_neural_compressor.quantization import quantize as engine_quantize

    class Samples(data_reader.CalibrationDataReader):  # type: ignore[misc]
        """One batch at a time, from files."""

        def __init__(self) -> None:
            self.number = 0

        def get_next(self) -> Any:
            import numpy as np

            path = folder / "samples" / f"{self.number}.npz"
            if not path.exists():
                return None
            self.number += 1
            with np.load(path, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}

        def rewind(self) -> None:
            self.number = 0

    known = list(constants.STATIC_QOPERATOR_CPU_OP_LIST)
    unknown = [name for name in job["op_types"] if name not in known]
    if unknown:
        raise ValueError(
            f"its static quantization does not know the operator '{unknown[0]}'. It knows: {', '.join(known)}"
        )
    calibrator.CALIBRATOR["Percentile"] = functools.partial(
        calibrator.PercentileCalibrator, percentile=job["percentile"]
    )
    settings = config.StaticQuantConfig(
        calibration_data_reader=Samples(),
        calibrate_method=CalibrationMethod[job["calibration_method"]],
        # Its default format: only this one takes Add and Mul.
        quant_format=QuantFormat.QOperator,
        op_types_to_quantize=list(job["op_types"]) or known,
        nodes_to_exclude=list(job["nodes_to_exclude"]),
        per_channel=job["per_channel"],
        extra_options={"ActivationSymmetric": job["activation_symmetric"]},
        calibration_sampling_size=job["num_batches"],
        quant_last_matmul=job["quantize_last_matmul"],
        execution_provider="CPUExecutionProvider",
    )
    # It inserts QuantizeLinear and DequantizeLinear first, and fuses them with what is between afterwards. That second
    # step is left out: all scales can be read from what the first one leaves.
    settings.quant_format = QuantFormat.QDQ
    engine_quantize(
        str(folder / "model.onnx"),
        str(folder / "quantized.onnx"),
        settings,
        # The graph stays as it is, so that every tensor is found again.
        optimization_level=onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    )
    return {"op_types": settings.op_types_to_quantize}


def _limit_memory(limit_bytes: int | None) -> None:
    try:
        import resource
    except ImportError:  # Windows has no such limits
        return
    # A crash is expected here; gigabytes of core dumps are not.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if limit_bytes is None:
        return
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    soft = limit_bytes if hard == resource.RLIM_INFINITY else min(limit_bytes, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _limit_threads(threads: int) -> None:
    """Let every session take `threads`; the engine makes its options itself and has no setting for that."""
    import onnxruntime

    make_options = onnxruntime.SessionOptions

    def options() -> Any:
        made = make_options()
        made.intra_op_num_threads = threads
        made.log_severity_level = 3
        return made

    onnxruntime.SessionOptions = options


# --- the process ----------------------------------------------------------------------------------------------


def _end_with_parent() -> None:
    # Nothing is ever written to the pipe: it closes when the parent is gone.
    os.read(0, 1)
    os._exit(1)


def _message(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return "ended by itself: it found nothing that it can quantize"
    if isinstance(error, MemoryError):
        return "ran out of memory"
    return f"failed: {type(error).__name__}: {error}"


if __name__ == "__main__":
    job_folder = Path(sys.argv[1])
    threading.Thread(target=_end_with_parent, daemon=True).start()
    code = 1
    try:
        answer: dict[str, Any] = {"value": main(job_folder)}
        code = 0
    except BaseException as problem:  # noqa: BLE001 - the engine raises and exits as it likes; the parent says it
        traceback.print_exc()
        answer = {"error": {"type": "", "message": _message(problem), "hint": ""}}
    (job_folder / "answer.json").write_text(json.dumps(answer), encoding="utf-8")
    sys.stdout.flush()
    sys.stderr.flush()
    # Without the interpreter's own end: destructors of native libraries may crash after the work is done.
    os._exit(code)
