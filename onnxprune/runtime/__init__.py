"""Running models and measuring them: sessions, feeds, latency, memory, per-op profiles, the host."""

from __future__ import annotations
