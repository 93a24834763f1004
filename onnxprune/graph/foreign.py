"""The fence around foreign graph tools: one function runs any of them.

A tool (onnxsim, onnxscript's rewriter, onnx's version converter ...) runs in a fresh interpreter without torch and
TensorFlow, within a time and a memory limit, on a copy of the model in files. It can abort, hang, eat memory or print
what it likes: here that is a `ForeignToolError`. What comes back is checked and cleaned: the interface must be the
same, module paths return to their nodes, metadata and IR version are ours again. Whether outputs are still equal is
for the caller to see; this folder can't run models.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from onnxprune.errors import ModelError, PassError
from onnxprune.graph.form import MAX_IR_VERSION, MAX_OPSET
from onnxprune.graph.io import load_model
from onnxprune.graph.metadata import MODULE_PATH_KEY
from onnxprune.graph.names import printable
from onnxprune.graph.writer import save_model

__all__ = ["ForeignToolError", "run_foreign_tool"]

_POLL_S = 0.02
_STDERR_LINES = 3
_STDERR_BYTES = 8192


class ForeignToolError(PassError):
    """A foreign tool failed, died, ran too long, took too much memory, or gave back another model than it may.

    `tool` is its name, `reason` says what happened, without the tool's name.
    """

    def __init__(self, tool: str, reason: str) -> None:
        super().__init__(f"The tool '{tool}' {reason}.")
        self.tool = tool
        self.reason = reason


def run_foreign_tool(
    model: ir.Model,
    function: str,
    *,
    arguments: Mapping[str, Any],
    timeout_s: float,
    memory_limit_bytes: int,
) -> ir.Model:
    """The model that `function` makes of `model`; `model` stays as it is.

    Args:
        model: Any model with unique names; weights above 1.5 GB travel as external data.
        function: "package.module:name" of a function `(onnx.ModelProto, **arguments) -> onnx.ModelProto`, or one that
            returns a pair of the model and whether it is right.
        arguments: Plain JSON values for the function.
        timeout_s: The child process is killed after this many seconds.
        memory_limit_bytes: Private memory and resident size that the child may reach.

    Returns:
        A model that is not canonical: shapes, names and constants are as the tool left them. Node metadata are those of
        the node that had the same output, or used the same weight; model metadata and IR version those of `model`.

    Raises:
        ForeignToolError: As above; the child process is gone.
    """
    tool = function.rpartition(":")[2]
    with tempfile.TemporaryDirectory(prefix="onnxprune-tool-") as name:
        folder = Path(name)
        save_model(model, folder / "input.onnx")
        request = {"function": function, "arguments": dict(arguments), "memory_limit_bytes": memory_limit_bytes}
        (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
        reason = _run(folder, timeout_s, memory_limit_bytes)
        if reason:
            raise ForeignToolError(tool, reason)
        try:
            result = load_model(folder / "output.onnx")
        except ModelError as error:
            text = error.message.replace(str(folder / "output.onnx"), "output.onnx")
            raise ForeignToolError(tool, f"gave back a model that can't be read: {text.rstrip('.')}") from error
    difference = _interface_difference(model, result)
    if difference:
        raise ForeignToolError(tool, f"changed the model's interface: {difference}")
    if result.opset_imports.get("", 1) > MAX_OPSET:
        raise ForeignToolError(tool, f"raised the opset to {result.opset_imports['']}, above {MAX_OPSET}")
    _restore_metadata(model, result)
    return result


# --- the child process ------------------------------------------------------------------------------------------


def _run(folder: Path, timeout_s: float, memory_limit_bytes: int) -> str:
    """Run the child to its end; "" if it ended well, else what happened."""
    # The child imports what this process could import, but nothing from the current folder.
    search_path = os.pathsep.join(entry for entry in sys.path if entry)
    with (folder / "log").open("w+b") as log:
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "onnxprune.graph.foreign_child", str(folder)],
            # The child ends when this pipe does: it must not outlive a parent that was killed.
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=log,
            env={**os.environ, "PYTHONPATH": search_path},
            # A group of its own: Ctrl-C comes to this process alone, which then kills the whole group.
            start_new_session=True,
        )
        try:
            reason = _watch(child, timeout_s, memory_limit_bytes)
        finally:
            _kill(child)
        log.seek(0, os.SEEK_END)
        log.seek(max(0, log.tell() - _STDERR_BYTES))
        last_words = _last_lines(log.read().decode("utf-8", "replace"))
    if reason or child.returncode == 0:
        return reason
    return f"{_exit_text(child.returncode)}{last_words}"


def _watch(child: subprocess.Popen[bytes], timeout_s: float, memory_limit_bytes: int) -> str:
    deadline = time.monotonic() + timeout_s
    while child.poll() is None:
        if time.monotonic() > deadline:
            return f"did not end within {timeout_s:g} s and was stopped"
        resident_bytes = _resident_bytes(child.pid)
        if resident_bytes > memory_limit_bytes:
            return (
                f"took {resident_bytes / 2**20:.0f} MiB of memory, more than the {memory_limit_bytes / 2**20:.0f} MiB "
                "it may, and was stopped"
            )
        try:
            child.wait(_POLL_S)
        except subprocess.TimeoutExpired:
            continue
    return ""


def _kill(child: subprocess.Popen[bytes]) -> None:
    # Suppressed: it is gone already, with everything it started.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    if child.stdin is not None:
        child.stdin.close()
    child.wait()


def _resident_bytes(pid: int) -> int:
    """Resident size of a process; 0 where the system does not say (only Linux does this way)."""
    try:
        fields = Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()
    except OSError:
        return 0
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") if len(fields) > 1 else 0


def _exit_text(code: int) -> str:
    if code >= 0:
        return f"failed (exit code {code})"
    try:
        return f"died of signal {signal.Signals(-code).name}"
    except ValueError:
        return f"died of signal {-code}"


def _last_lines(text: str) -> str:
    lines = [printable(line.strip()) for line in text.splitlines() if line.strip()]
    return f": {' | '.join(lines[-_STDERR_LINES:])}" if lines else ""


# --- what comes back --------------------------------------------------------------------------------------------


def _interface_difference(before: ir.Model, after: ir.Model) -> str:
    # IR 3 tools list initializers as inputs; that is not a change of the interface.
    for role, old, new in (
        ("inputs", before.graph.inputs, [v for v in after.graph.inputs if not v.is_initializer()]),
        ("outputs", before.graph.outputs, list(after.graph.outputs)),
    ):
        old_names, new_names = [v.name for v in old], [v.name for v in new]
        if old_names != new_names:
            return f"the {role} were {old_names} and are {new_names}"
        for value, now in zip(old, new, strict=True):
            if now.dtype is not None and value.dtype is not None and value.dtype != now.dtype:
                return f"'{printable(value.name or '')}' was {value.dtype} and is {now.dtype}"
            if _contradict(value.shape, now.shape):
                return f"'{printable(value.name or '')}' had the shape {value.shape} and has {now.shape}"
    return ""


def _contradict(one: ir.Shape | None, other: ir.Shape | None) -> bool:
    if one is None or other is None:
        return False
    if len(one) != len(other):
        return True
    return any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in zip(one, other, strict=True))


def _restore_metadata(before: ir.Model, after: ir.Model) -> None:
    after.ir_version = min(before.ir_version, MAX_IR_VERSION)
    for field in ("producer_name", "producer_version", "domain", "model_version", "doc_string"):
        setattr(after, field, getattr(before, field))
    after.graph.name, after.graph.doc_string = before.graph.name, before.graph.doc_string
    for old, new in ((before, after), (before.graph, after.graph)):
        new.metadata_props.clear()
        new.metadata_props.update(old.metadata_props)
    by_output = {value.name: node for node in before.graph.all_nodes() for value in node.outputs if value.name}
    by_weight = dict(_users_of_weights(before))
    for node in after.graph.all_nodes():
        node.metadata_props.clear()
        origin = next((by_output[v.name] for v in node.outputs if v.name in by_output), None)
        user = next((by_weight[v.name] for v in node.inputs if v is not None and v.name in by_weight), None)
        if origin is not None:
            node.metadata_props.update(origin.metadata_props)
        elif user is not None:
            node.metadata_props.update(user.metadata_props)
        if user is not None and MODULE_PATH_KEY in user.metadata_props and node.op_type == user.op_type:
            # A fused node has the output of the last one, but belongs where its weight does.
            node.metadata_props[MODULE_PATH_KEY] = user.metadata_props[MODULE_PATH_KEY]


def _users_of_weights(model: ir.Model) -> Iterator[tuple[str, ir.Node]]:
    for graph in model.graphs():
        for value in graph.initializers.values():
            users = value.consumers()
            if users and value.name:
                yield value.name, users[0]
