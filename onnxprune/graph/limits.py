"""The size from which models are handled in another way. Imports nothing, because child processes need it too."""

from __future__ import annotations

__all__ = ["BIG_WEIGHTS_BYTES"]

BIG_WEIGHTS_BYTES = 1_500_000_000
"""Models with more bytes of weights than this travel as files with external data, and are not loaded once more just to
compare or try them. Protobuf ends at 2 GiB; the rest is room for what other tools add."""
