"""The fence around onnx_ir and around foreign graph tools.

Only this folder loads, saves, infers shapes, swaps weights and calls foreign graph tools; passes work on
`onnx_ir.Model` itself.
"""

from __future__ import annotations
