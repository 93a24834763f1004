"""Source file -> graph: ONNX, PyTorch, TensorFlow, Keras and TFLite."""
