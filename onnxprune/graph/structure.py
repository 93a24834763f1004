"""The graph of a parsed model file: every value defined once and before use, no cycles, no endless functions."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import onnx

from onnxprune.errors import ModelError, quoted_list
from onnxprune.graph.names import printable

__all__ = ["check_structure"]

_MAX_SUBGRAPH_DEPTH = 16
_MAX_INLINED_NODES = 2_000_000

_FunctionId = tuple[str, str, str]


def check_structure(proto: onnx.ModelProto, path: Path) -> None:
    """Check that names resolve, that nodes can be ordered, and that functions end.

    Raises:
        ModelError: Names the value, node or function at fault.
    """
    checker = _Checker(path)
    functions = checker.functions(proto)
    checker.call_sizes(proto, functions)
    model_domains = _domains(proto.opset_import)
    checker.graph(proto.graph, frozenset(), 0, model_domains | {domain for domain, _, _ in functions})
    for function in functions.values():
        checker.function(function, {domain for domain, _, _ in functions} | model_domains)


def _domain(name: str) -> str:
    return "" if name == "ai.onnx" else name


def _domains(imports: Iterable[onnx.OperatorSetIdProto]) -> frozenset[str]:
    return frozenset(_domain(entry.domain) for entry in imports)


def _bodies(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _shown(node: onnx.NodeProto) -> str:
    return f"node '{printable(node.name or (node.output[0] if node.output else ''))}' ({printable(node.op_type)})"


def _function_id(node: onnx.NodeProto) -> _FunctionId:
    return _domain(node.domain), node.op_type, node.overload


class _Checker:
    def __init__(self, path: Path) -> None:
        self._path = path

    def _error(self, text: str, hint: str = "") -> ModelError:
        return ModelError(f"'{self._path}': {text}", hint)

    # --- functions ---

    def functions(self, proto: onnx.ModelProto) -> dict[_FunctionId, onnx.FunctionProto]:
        """The model's functions by domain, name and overload."""
        functions: dict[_FunctionId, onnx.FunctionProto] = {}
        for function in proto.functions:
            key = (_domain(function.domain), function.name, function.overload)
            if key in functions:
                raise self._error(f"function '{printable(function.name)}' is defined twice.")
            functions[key] = function
        return functions

    def call_sizes(self, proto: onnx.ModelProto, functions: Mapping[_FunctionId, onnx.FunctionProto]) -> None:
        """Refuse functions that call themselves, and those that grow beyond bounds when they are inlined."""
        sizes: dict[_FunctionId, int] = {}
        on_path: dict[_FunctionId, None] = {}
        # Depth first without recursion: a chain of functions may be longer than Python's stack.
        for start in functions:
            stack = [start]
            while stack:
                key = stack[-1]
                if key in sizes:
                    stack.pop()
                    on_path.pop(key, None)
                    continue
                on_path[key] = None
                called = [k for k in map(_function_id, _nodes_within(functions[key].node)) if k in functions]
                looping = next((k for k in called if k in on_path), None)
                if looping is not None:
                    cycle = [*list(on_path)[list(on_path).index(looping) :], looping]
                    raise self._error(
                        f"functions call each other in a circle: {' -> '.join(printable(k[1]) for k in cycle)}.",
                        "ONNX does not allow recursion.",
                    )
                missing = [k for k in called if k not in sizes]
                if missing:
                    stack.extend(missing)
                    continue
                sizes[key] = _inlined_size(functions[key].node, sizes)
                self._bound_size(sizes[key], f"function '{printable(key[1])}'")
        self._bound_size(_inlined_size(proto.graph.node, sizes), "the model")

    def _bound_size(self, num_nodes: int, what: str) -> None:
        if num_nodes > _MAX_INLINED_NODES:
            raise self._error(
                f"{what} becomes {num_nodes:.1e} nodes when its functions are inlined; "
                f"at most {_MAX_INLINED_NODES} are supported."
            )

    def function(self, function: onnx.FunctionProto, domains: frozenset[str] | set[str]) -> None:
        """Check the body of one function; attribute references are allowed in it."""
        names = list(function.input)
        self._unique(names, f"input of function '{printable(function.name)}'")
        self._nodes(
            function.node,
            frozenset(names),
            frozenset(),
            list(function.output),
            depth=0,
            domains=domains | _domains(function.opset_import),
            in_function=True,
        )

    # --- graphs ---

    def graph(
        self,
        graph: onnx.GraphProto,
        outer: frozenset[str],
        depth: int,
        domains: frozenset[str] | set[str],
        *,
        in_function: bool = False,
    ) -> None:
        """Check one graph and the graphs within; `outer` are the names visible from outside."""
        if depth > _MAX_SUBGRAPH_DEPTH:
            raise self._error(f"graphs are nested more than {_MAX_SUBGRAPH_DEPTH} deep.")
        inputs = [value.name for value in graph.input]
        tensors = [t.name for t in graph.initializer] + [s.values.name for s in graph.sparse_initializer]
        outputs = [value.name for value in graph.output]
        self._unique(inputs, "input")
        self._unique(tensors, "initializer")
        self._unique(outputs, "output")
        if "" in tensors:
            raise self._error("an initializer has no name.")
        self._nodes(
            graph.node,
            frozenset(inputs) | frozenset(tensors),
            outer,
            outputs,
            depth=depth,
            domains=domains,
            in_function=in_function,
        )

    def _unique(self, names: Iterable[str], what: str) -> None:
        seen: set[str] = set()
        for name in names:
            if name in seen:
                raise self._error(f"there are two {what}s named '{printable(name)}'.")
            seen.add(name)

    def _nodes(
        self,
        nodes: Iterable[onnx.NodeProto],
        given: frozenset[str],
        outer: frozenset[str],
        outputs: Iterable[str],
        *,
        depth: int,
        domains: frozenset[str] | set[str],
        in_function: bool,
    ) -> None:
        nodes = list(nodes)
        made_by: dict[str, int] = {}
        for index, node in enumerate(nodes):
            if not node.op_type:
                raise self._error(f"{_shown(node)} has no operator.")
            if _domain(node.domain) not in domains:
                raise self._error(
                    f"{_shown(node)} is from the operator domain '{printable(node.domain or 'ai.onnx')}', "
                    "which the model does not import."
                )
            if not in_function and any(attribute.ref_attr_name for attribute in node.attribute):
                raise self._error(f"{_shown(node)} refers to a function's attribute outside of a function.")
            for name in filter(None, node.output):
                if name in made_by or name in given:
                    raise self._error(
                        f"value '{printable(name)}' is defined twice, the second time by {_shown(node)}.",
                        "Every value of a graph must have one producer.",
                    )
                made_by[name] = index
        visible = outer | given | made_by.keys()
        needs: list[set[int]] = []
        for node in nodes:
            free = set(self._free_names(node))
            for name in sorted(free):
                if name not in visible:
                    raise self._error(f"{_shown(node)} uses the value '{printable(name)}', which nothing defines.")
            needs.append({made_by[name] for name in free if name in made_by})
        self._refuse_cycle(nodes, needs)
        for name in outputs:
            if name not in visible or (depth == 0 and not name):
                raise self._error(f"output '{printable(name)}' is not defined by any node.")
        for node in nodes:
            for body in _bodies(node):
                self.graph(body, visible, depth + 1, domains, in_function=in_function)

    def _free_names(self, node: onnx.NodeProto) -> Iterator[str]:
        """Names that `node` takes from its graph, those captured by its subgraphs included."""
        yield from filter(None, node.input)
        for body in _bodies(node):
            yield from _captured(body, 0)

    def _refuse_cycle(self, nodes: list[onnx.NodeProto], needs: list[set[int]]) -> None:
        users: list[list[int]] = [[] for _ in nodes]
        waiting = [len(need) for need in needs]
        for index, need in enumerate(needs):
            for producer in need:
                users[producer].append(index)
        ready = deque(index for index, count in enumerate(waiting) if count == 0)
        num_ordered = 0
        while ready:
            num_ordered += 1
            for user in users[ready.popleft()]:
                waiting[user] -= 1
                if waiting[user] == 0:
                    ready.append(user)
        if num_ordered == len(nodes):
            return
        # Walk backwards among the unordered nodes until one comes again: that is a cycle.
        index = next(i for i, count in enumerate(waiting) if count)
        trail: dict[int, None] = {}
        while index not in trail:
            trail[index] = None
            index = next(i for i in sorted(needs[index]) if waiting[i])
        cycle = list(trail)[list(trail).index(index) :]
        names = quoted_list(printable(nodes[i].name or nodes[i].op_type) for i in cycle)
        raise self._error(
            f"the graph has a cycle through {names}.",
            "A graph must not depend on its own results; loops need a Loop or Scan node.",
        )


def _captured(graph: onnx.GraphProto, depth: int) -> set[str]:
    """Names that `graph` takes from outside."""
    if depth > _MAX_SUBGRAPH_DEPTH:
        return set()
    own = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    own |= {sparse.values.name for sparse in graph.sparse_initializer}
    used: set[str] = {value.name for value in graph.output}
    for node in graph.node:
        own.update(node.output)
        used.update(node.input)
        for body in _bodies(node):
            used |= _captured(body, depth + 1)
    return used - own - {""}


def _nodes_within(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        yield node
        waiting.extend(inner for body in _bodies(node) for inner in body.node)


def _inlined_size(nodes: Iterable[onnx.NodeProto], sizes: Mapping[_FunctionId, int]) -> int:
    return sum(sizes.get(_function_id(node), 1) for node in _nodes_within(nodes))
