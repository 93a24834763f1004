"""Fixtures for all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
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


@pytest.fixture(scope="session", autouse=True)
def timings_of_this_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Timings of this machine are kept for one session of tests, and not in the user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("user-cache")))
        yield
