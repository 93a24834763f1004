"""How a folder of models fares as TFLite: does it convert, agree with ONNX Runtime, how fast, in how much memory.

    python tflite_zoo.py FOLDER [--only PATTERN] [--limit N] [--threads N] [--seconds S] [--list FILE] [--timed]

Each model runs in a process of its own: loaded, emitted as fp32 and written (timed together, without Python's imports;
"CPU s" is the processor time of that, which other work on the machine does not lengthen), then run in LiteRT and in
ONNX Runtime on random inputs. A model agrees when every float output is within 1e-3 of the output's range, every other
output equal, and the largest element along the last axis is at the same place. With --timed LiteRT is timed against
ONNX Runtime in turn.

Goals: at least 0.95 of the convolutional networks and 0.85 of all agree; ResNet-50 converts in less than 2 s and 1 GiB,
MobileNetV2 and EfficientNet-B0 in less than 1 s.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from model_folder import Found, folder_arguments, measured_in_a_process, model_paths

_LIMIT_S = 900
_MAX_ERROR = 1e-3
# Scores of an untrained network may be equal but for rounding: where the two largest are this near, relative to the
# output's range, either may come first.
_TIE = 1e-4


def main() -> None:
    options = arguments()
    if options.one:
        print(json.dumps(measure(options.folder, options)))
        return
    families = families_of(options.list)
    more = ["--timed"] if options.timed else []
    print(
        f"{'model':34} {'convert s':>9} {'CPU s':>6} {'RSS MiB':>8} {'error':>8} {'TRANSPOSE':>9} {'ops':>5}  remarks"
    )
    all_found = []
    for path in model_paths(options):
        if families and path.stem not in families:
            continue
        found = measured_in_a_process(__file__, path, options, more, limit_s=_LIMIT_S)
        found["family"] = families.get(path.stem, "all")
        print(line(found), flush=True)
        all_found.append(found)
    summarize(all_found)


def arguments() -> argparse.Namespace:
    parser = folder_arguments(__doc__)
    parser.add_argument("--list", type=Path, default=None, help="CSV with name,family: only these, and by family")
    parser.add_argument("--timed", action="store_true", help="time LiteRT against ONNX Runtime as well")
    return parser.parse_args()


def families_of(listing: Path | None) -> dict[str, str]:
    if listing is None:
        return {}
    rows = [row.split(",") for row in listing.read_text().splitlines()[1:]]
    return {row[0]: row[1] for row in rows}


def measure(path: Path, options: argparse.Namespace) -> Found:
    """Figures of one model, measured in this process."""
    from onnxprune.convert.onnx_file import load_onnx
    from onnxprune.runtime.feeds import working_feeds
    from onnxprune.runtime.latency import interleaved_ratio
    from onnxprune.runtime.litert import litert_runner_from_path
    from onnxprune.runtime.memory import peak_rss_bytes
    from onnxprune.runtime.sessions import ort_runner_from_path
    from onnxprune.targets.tflite.emit import emit
    from onnxprune.targets.tflite.ops import load_emitters
    from onnxprune.targets.tflite.schema import schema
    from onnxprune.targets.tflite.serialize import write_tflite

    load_emitters()
    schema()
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "model.tflite"
        start, cpu_start = time.perf_counter(), time.process_time()
        model = load_onnx(path)
        loaded = time.perf_counter()
        emitted = emit(model)
        write_tflite(emitted.model, built)
        found: Found = {
            "name": path.stem,
            "load_s": loaded - start,
            "convert_s": time.perf_counter() - start,
            "cpu_s": time.process_time() - cpu_start,
            "rss_mib": peak_rss_bytes() / 2**20,
            "bytes_ratio": built.stat().st_size / path.stat().st_size,
        }
        kinds = Counter(operator.kind for operator in emitted.model.main.operators)
        found |= {"transposes": kinds["TRANSPOSE"], "operators": sum(kinds.values())}
        reference = ort_runner_from_path(path, threads=options.threads)
        litert = litert_runner_from_path(built, threads=options.threads)
        feeds = working_feeds(reference, seed=0)
        found |= agreement(reference.run(feeds), litert.run(feeds))
        if options.timed:
            timed = interleaved_ratio(reference, litert, feeds, min_seconds=options.seconds, threads=options.threads)
            found["ort_over_litert"] = timed.ratio
    return found


def agreement(expected: dict[str, npt.NDArray[Any]], actual: dict[str, npt.NDArray[Any]]) -> Found:
    """The worst error of a float output, relative to its range, and whether all largest elements are in place."""
    worst, is_top_equal, other_equal = 0.0, True, True
    for name, wanted in expected.items():
        got = actual[name]
        if wanted.shape != got.shape:
            return {"difference": f"'{name}' is {got.shape} instead of {wanted.shape}", "worst": float("inf")}
        if wanted.dtype.kind != "f":
            other_equal &= bool(np.array_equal(wanted, got))
            continue
        spread = float(np.ptp(wanted)) or 1.0
        error = float(np.abs(wanted.astype(np.float64) - got).max(initial=0.0)) / spread
        worst = max(worst, error if np.isfinite(error) else float("inf"))
        is_top_equal &= tops_agree(wanted, got, spread)
    return {"worst": worst, "top_equal": is_top_equal, "other_equal": other_equal}


def tops_agree(wanted: npt.NDArray[Any], got: npt.NDArray[Any], spread: float) -> bool:
    if wanted.ndim == 0 or wanted.shape[-1] < 2:
        return True
    rows, others = wanted.reshape(-1, wanted.shape[-1]), got.reshape(-1, got.shape[-1])
    top, other = rows.argmax(axis=1), others.argmax(axis=1)
    lost = rows.max(axis=1) - np.take_along_axis(rows, other[:, None], axis=1)[:, 0]
    return bool(np.all((top == other) | (lost <= _TIE * spread)))


def agrees(found: Found) -> bool:
    return (
        "error" not in found
        and "difference" not in found
        and found["worst"] <= _MAX_ERROR
        and found["top_equal"]
        and found["other_equal"]
    )


def line(found: Found) -> str:
    if "error" in found:
        return f"{found['name']:34} FAILS: {found['error']}"
    remarks = [] if agrees(found) else ["DIFFERS"]
    remarks += [found["difference"]] if "difference" in found else []
    if "ort_over_litert" in found:
        remarks.append(f"ONNX Runtime / LiteRT {found['ort_over_litert']:.2f}")
    return (
        f"{found['name']:34} {found['convert_s']:>9.2f} {found['cpu_s']:>6.2f} {found['rss_mib']:>8.0f} "
        f"{found['worst']:>8.1e} {found['transposes']:>9} {found['operators']:>5}  {', '.join(remarks)}"
    )


def summarize(all_found: list[Found]) -> None:
    for family in sorted({found["family"] for found in all_found}):
        members = [found for found in all_found if found["family"] == family]
        print(f"{family}: {sum(map(agrees, members))} of {len(members)} convert and agree")
    print(f"together: {sum(map(agrees, all_found))} of {len(all_found)}")
    done = [found["convert_s"] for found in all_found if "convert_s" in found]
    if done:
        print(f"converting: median {statistics.median(done):.2f} s, longest {max(done):.2f} s")


if __name__ == "__main__":
    main()
