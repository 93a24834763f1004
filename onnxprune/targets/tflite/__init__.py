"""TFLite files, written directly from the ONNX graph (ADR 11).

Stages, each a function from a graph to a graph, none of which reads a later one:

    lowering     canonical ONNX -> `Graph`: one small function an operator (`ops/`), axes in ONNX's order, with an
                 explicit TRANSPOSE around every operator that wants channels last
    layout       where each tensor is stored channels last, so that as few numbers as possible are moved
    fusion       paddings, activations and constant scales into their neighbours
    integers     QUANTIZE and DEQUANTIZE around float operators -> int8 operators; fp16 and dynamic int8 weights
    sparse       the form and the storage of weights that let phones skip zeros, where a whole cluster qualifies
    serialize    `Model` -> flatbuffer, with the schema that ships in ai-edge-litert
"""
