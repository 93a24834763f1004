"""Optional packages that converters need."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Sequence

from onnxprune.errors import MissingExtraError

__all__ = ["installed_versions", "require_packages"]

_EXTRA_OF = {
    "torch": "torch",
    "safetensors": "torch",
    "tensorflow": "tensorflow",
    "keras": "tensorflow",
    "h5py": "tensorflow",
    "tf2onnx": "tensorflow",
}


def require_packages(packages: Sequence[str], *, needed_for: str) -> None:
    """Check that `packages` are installed, without importing them.

    Raises:
        MissingExtraError: Names the first one that is not, and the extra that brings it.
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(package=package, extra=_EXTRA_OF[package], needed_for=needed_for)


def installed_versions(distributions: Sequence[str]) -> dict[str, str]:
    """Versions of those of `distributions` that are installed."""
    versions = {}
    for name in distributions:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
