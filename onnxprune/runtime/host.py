"""What this machine can compute with: its instruction set and the versions of what runs on it."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

__all__ = ["HostIsa", "host_isa", "host_summary", "isa_from_flags", "processor_name", "runtime_versions"]

_ARCHITECTURES = {"x86_64": "x86-64", "amd64": "x86-64", "aarch64": "arm64", "arm64": "arm64"}
# What MLAS asks for before it takes its AVX-512 kernels.
_AVX512_FLAGS = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl"})
_PACKAGES = ("onnxprune", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "onnxsim", "numpy", "ai-edge-litert")


@dataclass(frozen=True, slots=True, kw_only=True)
class HostIsa:
    """Instruction set of a machine, as far as it decides which integer kernels ONNX Runtime takes.

    `arch` is "x86-64", "arm64", or the platform's own name. Where `is_known` is False nothing could be read and all
    flags are False.
    """

    arch: str
    has_avx2: bool = False
    has_avx512: bool = False
    has_vnni: bool = False
    """8-bit dot products that don't saturate at 16 bits: AVX-512 VNNI or AVX-VNNI."""
    has_dotprod: bool = False
    has_i8mm: bool = False
    is_known: bool = True

    @property
    def summary(self) -> str:
        """One line for reports: "x86-64 (AVX2, AVX-512, VNNI)"."""
        names = {
            "AVX2": self.has_avx2,
            "AVX-512": self.has_avx512,
            "VNNI": self.has_vnni,
            "dotprod": self.has_dotprod,
            "i8mm": self.has_i8mm,
        }
        present = ", ".join(name for name, has in names.items() if has)
        return f"{self.arch} ({present})" if present else self.arch


def isa_from_flags(arch: str, flags: frozenset[str] | None) -> HostIsa:
    """The instruction set from Linux's flag names; None: unknown."""
    known = flags or frozenset()
    return HostIsa(
        arch=_ARCHITECTURES.get(arch.lower(), arch.lower()),
        has_avx2="avx2" in known,
        has_avx512=known >= _AVX512_FLAGS,
        has_vnni=bool(known & {"avx512_vnni", "avx_vnni"}),
        has_dotprod="asimddp" in known,
        has_i8mm="i8mm" in known,
        is_known=flags is not None,
    )


@functools.cache
def host_isa() -> HostIsa:
    """The instruction set of this machine, read once (Linux: /proc/cpuinfo, macOS: sysctl, else unknown)."""
    arch = platform.machine()
    match platform.system():
        case "Linux":
            return isa_from_flags(arch, _linux_flags(Path("/proc/cpuinfo")))
        case "Darwin":
            return isa_from_flags(arch, _macos_flags())
        case _:
            return isa_from_flags(arch, None)


@functools.cache
def processor_name() -> str:
    """What the processor calls itself ("AMD EPYC 9354"), or the platform's name for its kind."""
    match platform.system():
        case "Linux":
            name = _cpuinfo_field(Path("/proc/cpuinfo"), ("model name", "CPU part"))
        case "Darwin":
            name = _sysctl("-n", "machdep.cpu.brand_string")
        case _:
            name = None
    return name or platform.processor() or platform.machine()


def host_summary() -> dict[str, str]:
    """Facts about this machine for a report, none of which identifies it."""
    return {
        "instruction_set": host_isa().summary,
        "cpu_count": str(os.cpu_count() or 1),
        "system": platform.system(),
        "python": platform.python_version(),
    }


def runtime_versions() -> dict[str, str]:
    """Versions of the packages that shape an artifact; a package that is not installed is left out."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _linux_flags(path: Path) -> frozenset[str] | None:
    value = _cpuinfo_field(path, ("flags", "Features"))  # x86 and ARM name the line differently
    return None if value is None else frozenset(value.split())


def _cpuinfo_field(path: Path, names: tuple[str, ...]) -> str | None:
    """The value of the first line with one of these names, or None."""
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return None
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in names:
            return value.strip()
    return None


def _macos_flags() -> frozenset[str] | None:
    # Names of sysctl entries with value 1, and the flag that Linux uses for the same.
    entries = {
        "hw.optional.avx2_0": "avx2",
        "hw.optional.avx512f": "avx512f",
        "hw.optional.avx512bw": "avx512bw",
        "hw.optional.avx512dq": "avx512dq",
        "hw.optional.avx512vl": "avx512vl",
        "hw.optional.avx512vnni": "avx512_vnni",
        "hw.optional.arm.FEAT_DotProd": "asimddp",
        "hw.optional.arm.FEAT_I8MM": "i8mm",
    }
    listing = _sysctl("hw.optional")
    if listing is None:
        return None
    present = {line.partition(":")[0].strip() for line in listing.splitlines() if line.rstrip().endswith(": 1")}
    return frozenset(flag for entry, flag in entries.items() if entry in present)


def _sysctl(*arguments: str) -> str | None:
    """What `sysctl` prints, or None where it fails."""
    command = ["/usr/sbin/sysctl", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
