"""XNNPACK's sparse inference, on a processor that has it: this one, or an emulated one without AVX."""

from __future__ import annotations

import platform
import shutil
from pathlib import Path

import pytest

from tests.sparse_runs import Comparison

EMULATOR = "qemu-x86_64"


@pytest.fixture(scope="session")
def processor() -> tuple[str, ...]:
    """What a command is put behind, so that it runs where sparse inference is."""
    if platform.machine().lower() in ("arm64", "aarch64"):
        return ()
    if platform.machine().lower() not in ("x86_64", "amd64"):
        pytest.skip(f"sparse inference was not looked at on {platform.machine()}")
    found = shutil.which(EMULATOR) or shutil.which(f"{EMULATOR}-static")
    if found is None:
        pytest.skip(f"needs {EMULATOR} (Debian: qemu-user), because XNNPACK has no sparse inference on x86 with AVX")
    # The last one without AVX; it has the SSE4.2 that NumPy asks for.
    return found, "-cpu", "Nehalem"


@pytest.fixture
def comparison(processor: tuple[str, ...], tmp_path: Path) -> Comparison:
    """Compares graphs on that processor."""
    return Comparison(processor=processor, script=Path(__file__).with_name("pairs.py"), folder=tmp_path)
