"""Foreign graph tools run behind a fence: they may crash, hang, eat memory and lose metadata."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from onnxprune.graph.canonical import CanonicalModel, canonicalize
from onnxprune.graph.foreign import ForeignToolError, run_foreign_tool
from onnxprune.graph.io import model_bytes, model_from_proto
from onnxprune.graph.metadata import module_path
from onnxprune.ops.shapes import SHAPES

GENEROUS = {"timeout_s": 120.0, "memory_limit_bytes": 4 << 30}

_TOOLS = """
import ctypes, os, signal, sys, time
import numpy as np
import onnx

def same(model, **arguments):
    return model

def abort(model):
    print("about to abort", file=sys.stderr, flush=True)
    os.abort()

def segfault(model):
    ctypes.string_at(0)

def raise_error(model):
    raise RuntimeError("no such optimizer")

def hang(model):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    time.sleep(600)

def eat_memory(model):
    pieces = []
    while True:
        pieces.append(np.ones(8 << 20))

def chatter(model):
    print("noise on stdout")
    return model

def wrong(model):
    return model, False

def not_a_model(model):
    return 42

def broken_model(model):
    model.graph.node[0].input[0] = "nowhere"
    return model

def rename_output(model):
    model.graph.node[-1].output[0] = model.graph.output[0].name = "renamed"
    return model

def drop_input(model):
    del model.graph.input[:]
    return model

def change_type(model):
    model.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    return model

def lose_metadata(model):
    for node in model.graph.node:
        del node.metadata_props[:]
        entry = node.metadata_props.add()
        entry.key, entry.value = "tool.note", "was here"
    entry = model.metadata_props.add()
    entry.key, entry.value = "tool.version", "1"
    model.producer_name, model.ir_version = "tool", 14
    return model

def raise_opset(model):
    model.opset_import[0].version = 28
    return model

def import_torch(model):
    import importlib.util
    entry = model.graph.node[0]
    entry.doc_string = f"{importlib.util.find_spec('torch')} {'torch' in sys.modules and sys.modules['torch']}"
    return model

def start_child_and_hang(model, pid_file):
    import subprocess
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    open(pid_file, "w").write(f"{os.getpid()} {child.pid}")
    time.sleep(600)
"""


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Names a function of a module that the child process can import."""
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "hostile_tools.py").write_text(_TOOLS)
    monkeypatch.syspath_prepend(str(tmp_path / "tools"))
    return lambda name: f"hostile_tools:{name}"


@pytest.fixture
def model() -> CanonicalModel:
    proto = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["": 18], producer_name: "tests">
        g (float[N,3,8,8] x) => (float[N,4,8,8] y) {
            c = Conv<pads = [1,1,1,1]>(x, conv_weight)
            n = BatchNormalization(c, scale, bias, mean, var)
            r = Relu(n)
            y = Mul(r, factor)
        }"""
    )
    names = ["/backbone/conv/Conv", "/backbone/norm/BN", "/backbone/act/Relu", "/head/Mul"]
    for node, name in zip(proto.graph.node, names, strict=True):
        node.name = name
    weights = {"conv_weight": (4, 3, 3, 3), "scale": (4,), "bias": (4,), "mean": (4,), "var": (4,), "factor": (1,)}
    rng = np.random.default_rng(0)
    for name, shape in weights.items():
        proto.graph.initializer.append(numpy_helper.from_array(rng.random(shape, np.float32), name))
    result = canonicalize(model_from_proto(proto, Path("model.onnx")), shape_rules=SHAPES)
    result.metadata_props["labels"] = "a,b"
    return result


def failure(model: ir.Model, function: str, **options: Any) -> str:
    arguments = options.pop("arguments", {})
    with pytest.raises(ForeignToolError) as caught:
        run_foreign_tool(model, function, arguments=arguments, **{**GENEROUS, **options})
    assert caught.value.tool == function.split(":")[1]
    return caught.value.reason


# --- deaths -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("abort", "died of signal SIGABRT"),
        ("segfault", "died of signal SIGSEGV"),
        ("raise_error", "RuntimeError: no such optimizer"),
        ("wrong", "the tool's own check says that its result is wrong"),
        ("not_a_model", "the tool returned int, not a model"),
        ("broken_model", "gave back a model that can't be read: 'output.onnx': node '/backbone/conv/Conv'"),
        ("rename_output", "changed the model's interface: the outputs were ['y'] and are ['renamed']"),
        ("drop_input", "gave back a model that can't be read"),
        ("change_type", "changed the model's interface: 'y' was FLOAT and is DOUBLE"),
        ("raise_opset", "raised the opset to 28"),
        ("no_such_function", "no_such_function"),
    ],
)
def test_tool_that_fails_is_an_error_that_says_how(
    model: CanonicalModel, tool: Callable[[str], str], name: str, said: str
) -> None:
    before = model_bytes(model)
    assert said in failure(model, tool(name))
    assert model_bytes(model) == before


def test_last_words_of_a_dying_tool_are_passed_on(model: CanonicalModel, tool: Callable[[str], str]) -> None:
    with pytest.raises(ForeignToolError, match=r"The tool 'abort' died of signal SIGABRT"):
        run_foreign_tool(model, tool("abort"), arguments={}, **GENEROUS)


def test_tool_that_hangs_is_stopped_although_it_ignores_signals(
    model: CanonicalModel, tool: Callable[[str], str]
) -> None:
    assert failure(model, tool("hang"), timeout_s=4.0) == "did not end within 4 s and was stopped"


def test_tool_that_eats_memory_is_stopped_before_the_machine_suffers(
    model: CanonicalModel, tool: Callable[[str], str]
) -> None:
    reason = failure(model, tool("eat_memory"), memory_limit_bytes=600 << 20)
    assert "memory" in reason.lower()


def test_what_a_tool_prints_does_not_reach_stdout(
    model: CanonicalModel, tool: Callable[[str], str], capfd: pytest.CaptureFixture[str]
) -> None:
    run_foreign_tool(model, tool("chatter"), arguments={}, **GENEROUS)
    assert capfd.readouterr() == ("", "")


def wait_until_gone(pid: int) -> bool:
    for _ in range(200):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


_INTERRUPTED = """
import sys
from pathlib import Path
from onnxprune.graph.foreign import run_foreign_tool
from onnxprune.graph.io import load_model
sys.path.insert(0, sys.argv[1])
try:
    run_foreign_tool(load_model(Path(sys.argv[2])), "hostile_tools:start_child_and_hang",
                     arguments={"pid_file": sys.argv[3]}, timeout_s=300, memory_limit_bytes=4 << 30)
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_ctrl_c_ends_the_tool_and_everything_it_started(
    model: CanonicalModel, tool: Callable[[str], str], tmp_path: Path, sent: signal.Signals, code: int
) -> None:
    (tmp_path / "model.onnx").write_bytes(model_bytes(model))
    pid_file = tmp_path / "pids"
    script = [
        sys.executable,
        "-c",
        textwrap.dedent(_INTERRUPTED),
        str(tmp_path / "tools"),
        str(tmp_path / "model.onnx"),
    ]
    parent = subprocess.Popen([*script, str(pid_file)], cwd=Path(__file__).parents[3])
    for _ in range(600):
        if pid_file.exists() and len(pid_file.read_text().split()) == 2:
            break
        time.sleep(0.05)
    tool_pid, grandchild_pid = map(int, pid_file.read_text().split())
    os.kill(parent.pid, sent)
    assert parent.wait(30) == code
    assert wait_until_gone(tool_pid)
    if sent == signal.SIGINT:
        assert wait_until_gone(grandchild_pid)
    else:
        # Nobody was left to end the tool's own child; the tool itself noticed that its parent was gone.
        os.kill(grandchild_pid, signal.SIGKILL)


# --- what comes back --------------------------------------------------------------------------------------------


def test_metadata_that_a_tool_lost_return_and_its_own_go(model: CanonicalModel, tool: Callable[[str], str]) -> None:
    result = run_foreign_tool(model, tool("lose_metadata"), arguments={}, **GENEROUS)
    assert [module_path(node) for node in result.graph] == [module_path(node) for node in model.graph]
    assert all("tool.note" not in node.metadata_props for node in result.graph)
    assert result.metadata_props == {"labels": "a,b"}
    assert result.producer_name == "tests"
    assert result.ir_version == model.ir_version


def test_tool_does_not_find_torch(model: CanonicalModel, tool: Callable[[str], str]) -> None:
    result = run_foreign_tool(model, tool("import_torch"), arguments={}, **GENEROUS)
    assert result.graph[0].doc_string == "None None"


def test_arguments_reach_the_tool(model: CanonicalModel, tool: Callable[[str], str]) -> None:
    run_foreign_tool(model, tool("same"), arguments={"level": 3, "names": ["a"]}, **GENEROUS)
    assert "raise_error() got an unexpected keyword" in failure(model, tool("raise_error"), arguments={"level": 3})


def test_onnxsim_fuses_and_module_paths_survive(model: CanonicalModel) -> None:
    result = run_foreign_tool(model, "onnxsim:simplify", arguments={}, **GENEROUS)
    assert [node.op_type for node in result.graph] == ["Conv", "Relu", "Mul"]
    # The fused node has the output of the normalization and the place of the convolution.
    assert [module_path(node) for node in result.graph] == ["backbone.conv", "backbone.act", "head"]
    assert result.ir_version == model.ir_version
    assert result.metadata_props == {"labels": "a,b"}
    canonicalize(result, shape_rules=SHAPES)


def test_version_converter_runs_behind_the_fence_too(model: CanonicalModel) -> None:
    # By itself it drops the metadata of every node that it touches.
    result = run_foreign_tool(
        model, "onnx.version_converter:convert_version", arguments={"target_version": 21}, **GENEROUS
    )
    assert result.opset_imports[""] == 21
    assert [module_path(node) for node in result.graph] == [module_path(node) for node in model.graph]
