"""Fixtures for all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real trained models and data beside the repository; the test is skipped where it is missing."""
    folder = Path(os.environ.get("ONNXPRUNE_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"needs the real models and data of '{folder.name}', which are not on this machine")
    return folder
