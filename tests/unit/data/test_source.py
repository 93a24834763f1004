"""`open_data`: every form of data, and what is refused."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from onnxprune.contracts import Batch, CalibrationSource, TensorSpec
from onnxprune.data.preprocess import Preprocess
from onnxprune.data.source import DataSource, open_data
from onnxprune.errors import BadDataError, MissingExtraError, PluginError, UsageError

IMAGE = TensorSpec(name="image", dtype="float32", shape=("batch", 3, 8, 8))
FEATURES = TensorSpec(name="x", dtype="float32", shape=("batch", 4))
FIXED = TensorSpec(name="x", dtype="float32", shape=(1, 4))
TOKENS = (
    TensorSpec(name="input_ids", dtype="int64", shape=("batch", "length")),
    TensorSpec(name="attention_mask", dtype="int64", shape=("batch", "length")),
)


def opened(path: object, *inputs: TensorSpec, preprocess: Preprocess | None = None, **options: Any) -> DataSource:
    return open_data(str(path), inputs=inputs or (FEATURES,), preprocess=preprocess or Preprocess(), **options)


def all_batches(source: DataSource) -> list[Batch]:
    return list(source)


def only_values(source: DataSource, name: str = "x") -> npt.NDArray[Any]:
    return np.concatenate([batch[name] for batch in source])


def rows(count: int, *shape: int, seed: int = 0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((count, *shape)).astype(np.float32)


def save_picture(path: Path, level: int, size: tuple[int, int] = (8, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (level, level, level)).save(path)


@pytest.fixture
def user_file(tmp_path: Path) -> Iterator[Callable[[str], str]]:
    """Writes a data function called `f` and gives its spec."""
    before = list(sys.path)

    def write(body: str) -> str:
        path = tmp_path / "calib.py"
        path.write_text(f"import numpy as np\n{body}", encoding="utf-8")
        return f"{path}:f"

    yield write
    sys.path[:] = before


# --- pictures -------------------------------------------------------------------------------------------------


def test_pictures_come_in_sorted_order_subfolders_included_hidden_ones_left_out(tmp_path: Path) -> None:
    for level, name in enumerate(["b/2.PNG", "a.png", "b/10.jpg", "c.bmp"]):
        save_picture(tmp_path / name, level * 10)
    save_picture(tmp_path / ".hidden.png", 99)
    save_picture(tmp_path / "__MACOSX" / "x.png", 99)
    (tmp_path / "notes.txt").write_text("not a picture")
    source = opened(tmp_path, IMAGE, preprocess=Preprocess(scale=1.0))
    assert [batch["image"][0, 0, 0, 0] for batch in source] == [10, 20, 0, 30]
    assert source.num_samples == 4


def test_source_satisfies_the_contract_and_repeats_itself(tmp_path: Path) -> None:
    for level in range(3):
        save_picture(tmp_path / f"{level}.png", level)
    source = opened(tmp_path, IMAGE)
    typed: CalibrationSource = source
    first, second = all_batches(source), list(typed)
    assert [batch["image"].shape for batch in first] == [(1, 3, 8, 8)] * 3
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one["image"], other["image"])


def test_limit_takes_pictures_at_even_distances(tmp_path: Path) -> None:
    for level in range(10):
        save_picture(tmp_path / f"{level}.png", level)
    source = opened(tmp_path, IMAGE, preprocess=Preprocess(scale=1.0), limit=4)
    assert [batch["image"][0, 0, 0, 0] for batch in source] == [0, 2, 5, 7]
    assert source.num_samples == 4


def test_corrupt_picture_is_refused_by_name_when_its_turn_comes(tmp_path: Path) -> None:
    save_picture(tmp_path / "a.png", 1)
    Image.effect_noise((64, 64), 50).save(tmp_path / "b.png")
    content = (tmp_path / "b.png").read_bytes()
    (tmp_path / "b.png").write_bytes(content[: len(content) // 2])
    source = opened(tmp_path, IMAGE)
    with pytest.raises(BadDataError, match=r"b\.png': the picture can't be decoded"):
        all_batches(source)


def test_first_picture_is_checked_at_once(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"<html>404</html>")
    with pytest.raises(BadDataError, match=r"a\.jpg': this is no picture"):
        opened(tmp_path, IMAGE)


def test_picture_that_claims_a_gigantic_size_is_refused_without_decoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxprune.data.images.MAX_PIXELS", 63)
    save_picture(tmp_path / "a.png", 1)
    with pytest.raises(BadDataError, match=r"a\.png': the picture claims 8x8 pixels"):
        opened(tmp_path, IMAGE)


def test_sixteen_bit_pictures_are_refused_and_palettes_and_alpha_are_read(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(tmp_path / "deep" / "a.png")
    with pytest.raises(BadDataError, match=r"more than 8 bits a channel"):
        opened(tmp_path / "deep", IMAGE)
    (tmp_path / "odd").mkdir()
    Image.new("RGBA", (8, 8), (50, 50, 50, 10)).save(tmp_path / "odd" / "a.png")
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([50, 50, 50])
    palette.save(tmp_path / "odd" / "b.png", transparency=b"\x80")
    source = opened(tmp_path / "odd", IMAGE, preprocess=Preprocess(scale=1.0))
    assert only_values(source, "image").ravel().tolist() == [50] * (2 * 3 * 64)


def test_wrong_size_without_resize_says_what_to_set(tmp_path: Path) -> None:
    save_picture(tmp_path / "a.png", 1, size=(20, 10))
    with pytest.raises(BadDataError, match=r"is 10x20 .* takes 8x8.*preprocess\.resize"):
        opened(tmp_path, IMAGE)


def test_pictures_for_several_inputs_are_refused(tmp_path: Path) -> None:
    save_picture(tmp_path / "a.png", 1)
    with pytest.raises(BadDataError, match="pictures, which feed one input, but the model has 2: 'input_ids'"):
        opened(tmp_path, *TOKENS)


def test_folder_without_samples_says_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(BadDataError, match="holds no files"):
        opened(tmp_path, IMAGE)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(BadDataError, match=r"only files of other kinds \('\.txt'\)"):
        opened(tmp_path, IMAGE)


def test_missing_pillow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_picture(tmp_path / "a.png", 1)
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'onnxprune\[eval\]'"):
        opened(tmp_path, IMAGE)


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    save_picture(tmp_path / "set" / "a.png", 1)
    save_picture(tmp_path / "elsewhere" / "b.png", 2)
    (tmp_path / "set" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "loop").symlink_to(tmp_path / "set")
    assert opened(tmp_path / "set", IMAGE).num_samples == 2


# --- array files ----------------------------------------------------------------------------------------------


def test_archive_feeds_inputs_by_name(tmp_path: Path) -> None:
    ids, mask = np.arange(15).reshape(3, 5), np.ones((3, 5), np.int64)
    np.savez(tmp_path / "a.npz", input_ids=ids, attention_mask=mask)
    source = opened(tmp_path / "a.npz", *TOKENS)
    assert source.num_samples == 3
    np.testing.assert_array_equal(only_values(source, "input_ids"), ids)
    assert all(set(batch) == {"input_ids", "attention_mask"} for batch in source)


def test_model_with_one_input_takes_the_only_array_whatever_its_name(tmp_path: Path) -> None:
    values = rows(3, 4)
    np.savez(tmp_path / "a.npz", X=values, y=np.arange(3), scale=np.float32(2))
    np.save(tmp_path / "a.npy", values)
    np.testing.assert_array_equal(only_values(opened(tmp_path / "a.npz")), values)
    np.testing.assert_array_equal(only_values(opened(tmp_path / "a.npy")), values)


def test_missing_and_unknown_arrays_are_named(tmp_path: Path) -> None:
    ids = np.ones((3, 5), np.int64)
    np.savez(tmp_path / "a.npz", input_ids=ids, attention_mas=ids)
    with pytest.raises(BadDataError, match=r"no array for input 'attention_mask'.*Did you mean 'attention_mas'"):
        opened(tmp_path / "a.npz", *TOKENS)
    np.savez(tmp_path / "b.npz", input_ids=ids, attention_mask=ids, extra=ids)
    with pytest.raises(BadDataError, match=r"holds 'extra', which no input of the model is called"):
        opened(tmp_path / "b.npz", *TOKENS)


def test_arrays_of_different_lengths_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", input_ids=np.ones((3, 5), np.int64), attention_mask=np.ones((4, 5), np.int64))
    with pytest.raises(BadDataError, match="different numbers of samples: 'input_ids' has 3, 'attention_mask' has 4"):
        opened(tmp_path / "a.npz", *TOKENS)


def test_wrong_shape_names_input_expected_and_got(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", rows(3, 5))
    with pytest.raises(BadDataError, match=r"sample 0: input 'x' expects float32 batchx4, got float32 1x5"):
        opened(tmp_path / "a.npy")


def test_channels_last_floats_for_a_channels_first_model_get_the_transposition_told(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", rows(2, 8, 8, 3))
    with pytest.raises(BadDataError, match=r"look like NHWC: give them as array\.transpose\(0, 3, 1, 2\)"):
        opened(tmp_path / "a.npy", IMAGE)


def test_element_types_are_converted_only_where_no_value_changes(tmp_path: Path) -> None:
    np.save(tmp_path / "doubles.npy", rows(2, 4).astype(np.float64))
    assert only_values(opened(tmp_path / "doubles.npy")).dtype == np.float32
    np.savez(tmp_path / "short.npz", **{spec.name: np.ones((2, 5), np.int16) for spec in TOKENS})
    assert only_values(opened(tmp_path / "short.npz", *TOKENS), "input_ids").dtype == np.int64
    narrow = TensorSpec(name="x", dtype="int8", shape=("batch", 4))
    np.save(tmp_path / "large.npy", np.full((1, 4), 300))
    with pytest.raises(BadDataError, match="input 'x' expects int8, got int64 with values from 300 to 300"):
        opened(tmp_path / "large.npy", narrow)
    np.save(tmp_path / "floats.npy", rows(2, 4))
    with pytest.raises(BadDataError, match="input 'x' expects int8, got float32"):
        opened(tmp_path / "floats.npy", narrow)
    np.save(tmp_path / "ints.npy", np.ones((2, 4), np.int32))
    with pytest.raises(BadDataError, match=r"expects float32, got int32\. .*preprocess\.scale"):
        opened(tmp_path / "ints.npy")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused_with_the_sample(tmp_path: Path, bad: float) -> None:
    values = rows(5, 4)
    values[3, 2] = bad
    np.savez(tmp_path / "a.npz", x=values)
    source = opened(tmp_path / "a.npz")
    with pytest.raises(BadDataError, match=r"a\.npz', sample 3: input 'x' holds 1 values that are NaN or infinite"):
        all_batches(source)


def test_value_too_large_for_half_precision_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.full((1, 4), 1e6, np.float32))
    half = TensorSpec(name="x", dtype="float16", shape=("batch", 4))
    with pytest.raises(BadDataError, match=r"float16, in which the value 1000000\.0 at .* is infinite"):
        opened(tmp_path / "a.npy", half)


def test_bytes_in_an_archive_go_through_the_preprocessing_like_pictures(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "a.npz", X=pixels, y=[0, 1])
    found = only_values(opened(tmp_path / "a.npz", IMAGE, preprocess=Preprocess(mean=0.5, std=0.5)), "image")
    expected = (pixels.transpose(0, 3, 1, 2).astype(np.float32) / 255 - 0.5) / 0.5
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)  # float32 rounds after each step


def test_gray_digits_without_a_channel_axis_feed_a_model_with_one(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 6, 6), np.uint8)
    np.save(tmp_path / "a.npy", pixels)
    gray = TensorSpec(name="x", dtype="float32", shape=("batch", 1, 6, 6))
    found = only_values(opened(tmp_path / "a.npy", gray, preprocess=Preprocess(scale=1.0)))
    np.testing.assert_array_equal(found[:, 0], pixels)


def test_other_integers_become_floats_only_when_the_scale_is_given(tmp_path: Path) -> None:
    values = np.arange(-4, 4, dtype=np.int8).reshape(2, 4)
    np.save(tmp_path / "a.npy", values)
    found = only_values(opened(tmp_path / "a.npy", preprocess=Preprocess(scale=0.5, mean=1.0, std=2.0)))
    np.testing.assert_array_equal(found, (values * np.float32(0.5) - 1) / 2)
    with pytest.raises(BadDataError, match="a value for each channel can't be applied"):
        opened(tmp_path / "a.npy", preprocess=Preprocess(scale=0.5, mean=[1, 2, 3]))


def test_folder_of_array_files_mixes_single_samples_and_batches(tmp_path: Path) -> None:
    values = rows(6, 4)
    np.save(tmp_path / "0.npy", values[0])
    np.save(tmp_path / "1.npy", values[1:5])
    np.savez(tmp_path / "2.npz", x=values[5])
    source = opened(tmp_path)
    assert source.num_samples == 6
    np.testing.assert_array_equal(only_values(source), values)
    np.testing.assert_array_equal(only_values(opened(tmp_path, limit=3)), values[[0, 2, 4]])


def test_folder_of_pictures_and_arrays_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "0.npy", rows(1, 4))
    save_picture(tmp_path / "a.png", 1)
    with pytest.raises(BadDataError, match="holds 1 pictures and 1 array files"):
        opened(tmp_path)


def test_archive_that_claims_a_trillion_empty_samples_is_refused_at_once(tmp_path: Path) -> None:
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 0)}".ljust(117) + b"\n"
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    with pytest.raises(BadDataError, match="input 'x' expects float32 batchx4, got float32 1x0"):
        opened(tmp_path / "a.npy")


def test_text_feeds_string_inputs(tmp_path: Path) -> None:
    words = TensorSpec(name="x", dtype="object", shape=("batch", 2))
    np.save(tmp_path / "a.npy", np.array([["a", "bc"], ["d", ""]]))
    found = only_values(opened(tmp_path / "a.npy", words))
    assert found.dtype == object
    assert found.tolist() == [["a", "bc"], ["d", ""]]


@pytest.mark.parametrize("name", ["missing.npz", "nowhere", "a.txt"])
def test_paths_that_are_no_data_say_which_forms_there_are(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(BadDataError, match=f"{name}.*a folder of pictures, .* or module:function"):
        opened(tmp_path / name)


def test_empty_set_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", rows(0, 4))
    with pytest.raises(BadDataError, match="holds no samples"):
        opened(tmp_path / "a.npy")


# --- batches --------------------------------------------------------------------------------------------------


def test_batch_size_counts_where_the_model_takes_any_number(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", rows(5, 4))
    assert [len(batch["x"]) for batch in opened(tmp_path / "a.npy", batch_size=2)] == [2, 2, 1]
    assert [len(batch["x"]) for batch in opened(tmp_path / "a.npy", FIXED, batch_size=2)] == [1] * 5


def test_fixed_batch_is_filled_up_with_the_last_sample(tmp_path: Path) -> None:
    values = rows(3, 4)
    np.save(tmp_path / "a.npy", values)
    source = opened(tmp_path / "a.npy", TensorSpec(name="x", dtype="float32", shape=(2, 4)))
    np.testing.assert_array_equal(only_values(source), values[[0, 1, 2, 2]])
    assert source.num_samples == 3
    assert [batch.num_samples for batch in source.counted_batches()] == [2, 1]


def test_samples_with_all_axes_of_the_input_are_fed_alone(tmp_path: Path) -> None:
    no_batch = TensorSpec(name="x", dtype="float32", shape=(3, 4))
    values = rows(2, 3, 4)
    np.save(tmp_path / "a.npy", values)
    found = [batch["x"] for batch in opened(tmp_path / "a.npy", no_batch, batch_size=8)]
    np.testing.assert_array_equal(np.stack(found), values)


def test_inputs_that_take_different_numbers_of_samples_are_refused(tmp_path: Path) -> None:
    inputs = [TensorSpec(name=name, dtype="float32", shape=(size, 4)) for name, size in (("a", 1), ("b", 2))]
    np.savez(tmp_path / "a.npz", a=rows(3, 4), b=rows(3, 4))
    with pytest.raises(BadDataError, match=r"'a' takes 1, 'b' takes 2"):
        opened(tmp_path / "a.npz", *inputs)


def test_scalar_inputs_take_one_number_a_sample(tmp_path: Path) -> None:
    temperature = TensorSpec(name="t", dtype="float32", shape=())
    np.savez(tmp_path / "a.npz", x=rows(3, 4), t=np.float32([1, 2, 3]))
    batches = all_batches(opened(tmp_path / "a.npz", FEATURES, temperature, batch_size=8))
    assert [(batch["x"].shape, batch["t"].shape, float(batch["t"])) for batch in batches] == [
        ((1, 4), (), 1.0),
        ((1, 4), (), 2.0),
        ((1, 4), (), 3.0),
    ]


# --- functions ------------------------------------------------------------------------------------------------


def test_function_gives_samples_or_batches_and_is_called_anew_each_time(user_file: Callable[[str], str]) -> None:
    spec = user_file("def f():\n    yield np.zeros(4, np.float32)\n    yield {'x': np.ones((2, 4), np.float32)}\n")
    source = opened(spec)
    assert source.num_samples == 3
    for _ in range(2):
        assert only_values(source)[:, 0].tolist() == [0, 1, 1]
    assert only_values(opened(spec, limit=2))[:, 0].tolist() == [0, 1]


def test_tokens_of_different_lengths_are_not_joined(user_file: Callable[[str], str]) -> None:
    spec = user_file(
        "def f():\n"
        "    for n in (3, 3, 5):\n"
        "        yield {'input_ids': np.ones((1, n), np.int64), 'attention_mask': np.ones((1, n), np.int64)}\n"
    )
    source = opened(spec, *TOKENS, batch_size=8)
    assert [batch["input_ids"].shape for batch in source] == [(2, 3), (1, 5)]


def test_generator_may_reuse_its_buffer(user_file: Callable[[str], str]) -> None:
    spec = user_file(
        "def f():\n    b = np.zeros(4, np.float32)\n    for i in range(3):\n        b[:] = i\n        yield b\n"
    )
    assert [batch["x"][0, 0] for batch in all_batches(opened(spec))] == [0, 1, 2]


def test_function_that_gives_other_samples_each_time_is_refused(user_file: Callable[[str], str]) -> None:
    spec = user_file("rng = np.random.default_rng()\ndef f():\n    yield rng.random(4, np.float32)\n")
    source = opened(spec)
    with pytest.raises(PluginError, match="other samples than when it was called before"):
        all_batches(source)


@pytest.mark.parametrize(
    ("body", "error", "says"),
    [
        ("def f(): return 3\n", PluginError, "must return an iterable of samples, got int"),
        ("def f(): return {'x': 1}\n", PluginError, "must return an iterable of samples, got dict"),
        ("def f(): return []\n", BadDataError, "holds no samples"),
        ("def f(): yield {'y': np.zeros(4)}\n", BadDataError, "no array for input 'x'"),
        ("def f(): yield {'x': np.zeros(4), 'z': 1}\n", BadDataError, "Item 0 of .* has 'z'"),
        ("def f(): yield np.zeros(5)\n", BadDataError, "Item 0 of .* 'x' expects float32 batchx4, got float64 1x5"),
        ("def f(): yield object()\n", BadDataError, "input 'x' got object, which is no array of numbers"),
        ("def f():\n    raise OSError('no disk')\n", PluginError, r"calib\.py:3: OSError: no disk"),
        ("def g(): yield 1\n", UsageError, "no function 'f'"),
    ],
)
def test_functions_that_give_nothing_usable_are_refused(
    user_file: Callable[[str], str], body: str, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        opened(user_file(body))


def test_bare_array_for_several_inputs_is_refused(user_file: Callable[[str], str]) -> None:
    with pytest.raises(BadDataError, match=r"Item 0 of .* is of type ndarray, but the model has 2 inputs"):
        opened(user_file("def f(): yield np.zeros(4)\n"), *TOKENS)


# --- hashes ---------------------------------------------------------------------------------------------------


def test_hash_depends_on_what_is_fed_and_not_on_the_batch_size_or_form(tmp_path: Path) -> None:
    values = rows(5, 4)
    np.save(tmp_path / "a.npy", values)
    np.savez_compressed(tmp_path / "b.npz", x=values.astype(np.float64))
    np.save(tmp_path / "c.npy", values + 1)
    plain = opened(tmp_path / "a.npy").content_hash
    assert len(plain) == 64
    assert opened(tmp_path / "a.npy", batch_size=3).content_hash == plain
    assert opened(tmp_path / "b.npz").content_hash == plain
    assert opened(tmp_path / "c.npy").content_hash != plain
    assert opened(tmp_path / "a.npy", limit=4).content_hash != plain


def test_hash_tells_preprocessing_apart(tmp_path: Path) -> None:
    save_picture(tmp_path / "a.png", 100)
    assert opened(tmp_path, IMAGE).content_hash != opened(tmp_path, IMAGE, preprocess=Preprocess(mean=0.5)).content_hash


# --- real data ------------------------------------------------------------------------------------------------


def test_real_photos_are_read_with_the_usual_preprocessing(shared_data: Path) -> None:
    image = TensorSpec(name="image", dtype="float32", shape=(1, 3, 224, 224))
    usual = Preprocess(resize=256, center_crop=224, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    source = opened(shared_data / "imagenette160_calib200", image, preprocess=usual, limit=8)
    values = only_values(source, "image")
    assert values.shape == (8, 3, 224, 224)
    assert abs(float(values.mean())) < 1  # normalized photos lie around 0
    assert 0.5 < float(values.std()) < 2


def test_real_speech_features_in_int8_become_floats(shared_data: Path) -> None:
    path = shared_data / "kws" / "kws01_mfcc_int8.npz"
    features = TensorSpec(name="input", dtype="float32", shape=(1, 49, 10, 1))
    raw = np.load(path)["X"]
    preprocess = Preprocess(scale=1.0, mean=83, std=1 / 0.5847029)
    found = only_values(opened(path, features, preprocess=preprocess, limit=5), "input")
    expected = (raw[::100].astype(np.float32) - 83) * 0.5847029
    np.testing.assert_allclose(found, expected, rtol=1e-6)  # 1/0.5847029 is rounded once more
