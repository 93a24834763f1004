"""Reading `.npy` and `.npz` sample by sample, and refusing hostile ones."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from onnxprune.data import arrays
from onnxprune.data.arrays import open_array_file
from onnxprune.errors import BadDataError


def npy_bytes(array: np.ndarray, *, allow_pickle: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=allow_pickle)
    return buffer.getvalue()


def header_bytes(description: str) -> bytes:
    text = description.ljust(117).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed], ids=["stored", "deflated"])
def test_chosen_rows_of_an_archive_are_read_in_order(tmp_path: Path, save: object) -> None:
    values, other = np.arange(60, dtype=np.float32).reshape(10, 2, 3), np.arange(10)
    save(tmp_path / "a.npz", x=values, n=other)  # type: ignore[operator]
    rows = list(open_array_file(tmp_path / "a.npz").rows(["n", "x"], [0, 3, 4, 9]))
    assert [int(row["n"]) for row in rows] == [0, 3, 4, 9]
    np.testing.assert_array_equal(np.stack([row["x"] for row in rows]), values[[0, 3, 4, 9]])


def test_fortran_order_big_endian_and_text_are_read(tmp_path: Path) -> None:
    values = np.arange(12, dtype=">f4").reshape(4, 3)
    np.savez(tmp_path / "a.npz", x=np.asfortranarray(values), s=np.array(["a", "bc", "", "d"]))
    rows = list(open_array_file(tmp_path / "a.npz").rows(["x", "s"], [1, 3]))
    assert [row["x"].tolist() for row in rows] == [[3, 4, 5], [9, 10, 11]]
    assert [str(row["s"]) for row in rows] == ["bc", "d"]


def test_npy_file_holds_one_array_without_a_name(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(6).reshape(3, 2))
    file = open_array_file(tmp_path / "a.npy")
    assert list(file.arrays) == [""]
    assert [row[""].tolist() for row in file.rows([""], [2])] == [[4, 5]]


def test_one_sample_is_in_memory_at_a_time(tmp_path: Path) -> None:
    sample_bytes = 1 << 17
    np.savez_compressed(tmp_path / "a.npz", x=np.zeros((64, sample_bytes), np.uint8))
    tracemalloc.start()
    for row in open_array_file(tmp_path / "a.npz").rows(["x"], range(64)):
        assert row["x"].nbytes == sample_bytes
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # The row, the one before, and buffers of the decompressor; the whole array would be 64.
    assert peak < 12 * sample_bytes


def test_pickled_objects_are_never_loaded(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([{"x": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(BadDataError, match="pickled Python objects, which can run code"):
        open_array_file(tmp_path / "a.npy")
    np.savez(tmp_path / "a.npz", x=np.zeros(3), evil=np.array([print], dtype=object))
    with pytest.raises(BadDataError, match=r"member 'evil\.npy' holds pickled Python objects"):
        open_array_file(tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is no NumPy array"),
        (b"hello world, this is text", "is no NumPy array"),
        (npy_bytes(np.arange(100))[:300], "is cut off: its header announces 800 bytes"),
        (npy_bytes(np.zeros(3, dtype=[("a", "<f4")])), "which no model takes"),
        (npy_bytes(np.zeros(3, dtype=complex)), "is of type complex128"),
        (npy_bytes(np.zeros(3, dtype="datetime64[s]")), "which no model takes"),
        (header_bytes("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 2)}"), "impossible shape"),
        (header_bytes("{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999, 9)}"), "is cut off"),
        (header_bytes("{'descr': '<f4', 'fortran_order': False}"), "is no NumPy array"),
        (header_bytes("__import__('os').system('true')"), "is no NumPy array"),
        (b"\x93NUMPY\x09\x00" + b" " * 100, "unsupported version of the format"),
    ],
    ids=["empty", "text", "cut", "struct", "complex", "date", "negative", "huge", "header", "code", "version"],
)
def test_damaged_and_unusable_files_are_refused(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(BadDataError) as caught:
        open_array_file(tmp_path / "a.npy")
    assert says in str(caught.value)
    assert "a.npy" in str(caught.value)


def test_archive_with_other_members_or_none_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(BadDataError, match=r"member 'readme\.txt' is no array"):
        open_array_file(tmp_path / "a.npz")
    with zipfile.ZipFile(tmp_path / "b.npz", "w"):
        pass
    with pytest.raises(BadDataError, match="holds no arrays"):
        open_array_file(tmp_path / "b.npz")


def test_truncated_archive_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.arange(1000))
    content = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(BadDataError, match=r"a\.npz' is damaged"):
        open_array_file(tmp_path / "a.npz")


def test_flipped_bits_in_an_archive_are_found_at_the_latest_at_its_end(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros(1000, np.uint8))
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[700] ^= 1
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(BadDataError, match="is damaged"):
        list(open_array_file(tmp_path / "a.npz").rows(["x"], range(1000)))


def test_archive_that_unpacks_to_far_more_than_its_size_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrays, "BOMB_BYTES", 1 << 20)
    np.savez_compressed(tmp_path / "bomb.npz", x=np.zeros((4, 1 << 20), np.uint8))
    with pytest.raises(BadDataError, match=r"unpacks from .* to .* bytes, which no real data do"):
        open_array_file(tmp_path / "bomb.npz")
    rng = np.random.default_rng(0)
    np.savez_compressed(tmp_path / "real.npz", x=rng.integers(0, 256, (2, 1 << 20), np.uint8))
    assert open_array_file(tmp_path / "real.npz").arrays["x"].shape == (2, 1 << 20)


def test_one_sample_of_more_than_a_gigabyte_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    path.write_bytes(header_bytes("{'descr': '<f4', 'fortran_order': False, 'shape': (1, 1000, 1000, 1000)}"))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + 4 * 10**9)  # sparse: takes no disk
    with pytest.raises(BadDataError, match=r"one sample .* takes 4,000,000,000 bytes"):
        open_array_file(path)


def test_member_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", npy_bytes(np.zeros(2)))
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("x.npy", npy_bytes(np.ones(2)))
    with pytest.raises(BadDataError, match="is there twice"):
        open_array_file(tmp_path / "a.npz")


@pytest.mark.parametrize("kind", ["stored", "deflated", "npy"])
def test_files_with_random_damage_are_read_or_refused_and_nothing_else(tmp_path: Path, kind: str) -> None:
    values = np.arange(40, dtype=np.float32).reshape(10, 4)
    buffer = io.BytesIO()
    {"stored": np.savez, "deflated": np.savez_compressed, "npy": np.save}[kind](buffer, values)
    path = tmp_path / ("a.npy" if kind == "npy" else "a.npz")
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        content = bytearray(buffer.getvalue())
        for position in rng.integers(0, len(content), rng.integers(1, 6)):
            content[position] = rng.integers(0, 256)
        path.write_bytes(content)
        try:
            file = open_array_file(path)
            name = next(iter(file.arrays))
            list(file.rows([name], range(file.arrays[name].shape[0])))
        except BadDataError:
            refused += 1
    assert refused > 50


def test_packed_in_a_way_that_zip_readers_do_not_know_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros(3))
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 0x20  # "compressed patched data"
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(BadDataError, match="compressed patched data"):
        open_array_file(tmp_path / "a.npz")
