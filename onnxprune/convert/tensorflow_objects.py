"""Keras models that the caller holds: saved here as a SavedModel, which needs none of their classes any more."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxprune.convert.tensorflow import call_keras, keras_output_names
from onnxprune.errors import ModelError

__all__ = ["SavedKeras", "save_keras_object"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedKeras:
    """A SavedModel, and the order of inputs and outputs, which a SavedModel does not keep."""

    path: Path
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def save_keras_object(model: Any, folder: Path) -> SavedKeras:
    """Save the inference function of `model`, with its Keras names, into `folder`; the model stays as it was.

    Raises:
        ModelError: Keras runs on another backend than TensorFlow, or the model was never built.
    """
    import keras

    if keras.backend.backend() != "tensorflow":
        raise ModelError(
            f"Keras runs on the backend '{keras.backend.backend()}' in this process; a Keras model is converted "
            "through TensorFlow.",
            "Save it (model.save('model.keras')) and convert the file, or set KERAS_BACKEND=tensorflow before keras is "
            "imported.",
        )
    import tensorflow as tf

    if not getattr(model, "inputs", None):
        raise ModelError(
            f"'{type(model).__name__}' does not say what its inputs are: it was never built.",
            "Build it from keras.Input, or call it once on a symbolic input.",
        )
    names = keras_output_names(model)
    specs = [tf.TensorSpec(t.shape, t.dtype, name=t.name) for t in model.inputs]

    def call(*tensors: Any) -> dict[str, Any]:
        return call_keras(model, tensors, names)

    function = tf.function(call, input_signature=specs)
    holder = tf.Module()
    # A SavedModel holds the variables that it can reach from its root.
    holder.model_variables = list(model.variables)
    holder.inference = function
    tf.saved_model.save(holder, str(folder), signatures=function)
    return SavedKeras(path=folder, inputs=tuple(spec.name for spec in specs), outputs=tuple(names))
