from __future__ import annotations

import platform
from pathlib import Path

import pytest

from onnxprune.runtime import host
from onnxprune.runtime.host import (
    HostIsa,
    _cpuinfo_field,
    host_isa,
    host_summary,
    isa_from_flags,
    processor_name,
    runtime_versions,
)


@pytest.mark.parametrize(
    ("arch", "flags", "summary"),
    [
        ("x86_64", {"sse2", "avx2"}, "x86-64 (AVX2)"),
        ("AMD64", {"avx2", "avx_vnni"}, "x86-64 (AVX2, VNNI)"),
        (
            "x86_64",
            {"avx2", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"},
            "x86-64 (AVX2, AVX-512, VNNI)",
        ),
        ("x86_64", {"avx2", "avx512f"}, "x86-64 (AVX2)"),
        ("aarch64", {"asimd", "asimddp", "i8mm"}, "arm64 (dotprod, i8mm)"),
        ("arm64", set(), "arm64"),
        ("riscv64", set(), "riscv64"),
    ],
)
def test_instruction_set_follows_from_the_flags(arch: str, flags: set[str], summary: str) -> None:
    assert isa_from_flags(arch, frozenset(flags)).summary == summary


def test_unreadable_flags_are_said_to_be_unknown_and_none_is_assumed() -> None:
    assert isa_from_flags("x86_64", None) == HostIsa(arch="x86-64", is_known=False)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "processor\t: 0\nflags\t\t: fpu avx2 avx_vnni\n\nprocessor\t: 1\nflags\t\t: fpu\n",
            {"fpu", "avx2", "avx_vnni"},
        ),
        ("processor\t: 0\nFeatures\t: fp asimd asimddp\n", {"fp", "asimd", "asimddp"}),
        ("processor\t: 0\n", None),
    ],
    ids=["x86", "arm", "neither"],
)
def test_cpuinfo_of_x86_and_arm_is_read(tmp_path: Path, text: str, expected: set[str] | None) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(text)
    assert host._linux_flags(path) == expected
    assert host._linux_flags(tmp_path / "none") is None


def test_macos_flags_come_from_sysctl(monkeypatch: pytest.MonkeyPatch) -> None:
    class Done:
        stdout = "hw.optional.arm.FEAT_DotProd: 1\nhw.optional.arm.FEAT_I8MM: 0\nhw.optional.neon: 1\n"

    monkeypatch.setattr(host.subprocess, "run", lambda *args, **options: Done)
    assert host._macos_flags() == {"asimddp"}


def test_this_machine_is_described_without_saying_which_it_is() -> None:
    assert host_isa().arch == {"x86_64": "x86-64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    summary = host_summary()
    assert set(summary) == {"instruction_set", "cpu_count", "system", "python"}
    assert platform.node() not in summary.values()


def test_versions_name_what_shapes_an_artifact() -> None:
    versions = runtime_versions()
    assert set(versions) == {
        "onnxprune",
        "onnx",
        "onnx-ir",
        "onnxscript",
        "onnxruntime",
        "onnxsim",
        "numpy",
        "ai-edge-litert",
    }
    assert all(version[0].isdigit() for version in versions.values())


def test_the_processor_has_a_name() -> None:
    assert processor_name().strip()


def test_the_name_of_the_processor_is_read_from_the_first_line_that_has_it(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("vendor_id : A\nmodel name\t: AMD EPYC 9354\nmodel name\t: other\n", encoding="utf-8")
    assert _cpuinfo_field(file, ("model name",)) == "AMD EPYC 9354"
    assert _cpuinfo_field(file, ("CPU part",)) is None
    assert _cpuinfo_field(tmp_path / "missing", ("model name",)) is None
