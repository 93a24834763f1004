"""Runs a recipe: from the source to artifacts, measurements and a report."""

from __future__ import annotations
