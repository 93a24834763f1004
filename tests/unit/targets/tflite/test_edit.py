from __future__ import annotations

from onnxprune.targets.tflite.edit import Editor
from onnxprune.targets.tflite.graph import Graph, Operator, Tensor


def test_output_that_another_tensor_takes_over_keeps_its_own_layout() -> None:
    tensors = {
        "x": Tensor(name="x", type="FLOAT32", shape=(2, 3)),
        "inner": Tensor(name="inner", type="FLOAT32", shape=(2, 3), layout=(1, 0)),
        "y": Tensor(name="y", type="FLOAT32", shape=(2, 3)),
    }
    operators = (
        Operator(kind="RELU", inputs=("x",), outputs=("inner",)),
        Operator(kind="RESHAPE", inputs=("inner",), outputs=("y",)),
    )
    editor = Editor(Graph(name="g", tensors=tensors, operators=operators, inputs=("x",), outputs=("y",)))

    editor.redirect("y", "inner")

    made = editor.graph()
    assert [(operator.kind, operator.outputs) for operator in made.operators] == [("RELU", ("y",))]
    # Else a runner would transpose what comes out.
    assert made.tensors["y"].layout is None
