"""Arrays in plans: small text that JSON can hold, and that gives the same array back everywhere."""

from __future__ import annotations

import base64
import binascii
import zlib

import numpy as np
import numpy.typing as npt

from onnxprune.errors import UsageError

__all__ = ["pack_integers", "unpack_integers"]


def pack_integers(array: npt.NDArray[np.integer]) -> str:
    """int8 numbers, compressed, in base64."""
    return base64.b64encode(zlib.compress(np.ascontiguousarray(array, dtype=np.int8).tobytes(), 9)).decode("ascii")


def unpack_integers(text: str, shape: tuple[int, ...]) -> npt.NDArray[np.int8]:
    """What `pack_integers` was given.

    Raises:
        UsageError: The text is damaged, or holds another number of integers.
    """
    try:
        # One byte more than there should be is enough to see that there are too many.
        expected = int(np.prod(shape, dtype=np.int64))
        content = zlib.decompressobj().decompress(base64.b64decode(text, validate=True), expected + 1)
    except (binascii.Error, zlib.error) as error:
        raise UsageError(f"The plan's packed integers are damaged: {error}.", "Make the plan anew.") from error
    if len(content) != expected:
        raise UsageError(
            f"The plan's packed integers are not the {expected} of a weight of shape {list(shape)}.",
            "Use a plan that was made for this model.",
        )
    return np.frombuffer(content, dtype=np.int8).reshape(shape)
