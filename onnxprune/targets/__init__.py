"""Graph -> artifact: what a runtime loads, written, loaded and run once."""

from __future__ import annotations
