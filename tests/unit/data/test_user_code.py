"""Loading and calling functions that users write."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from onnxprune.data.user_code import call_user_code, iterate_user_code, load_callable, parse_function_spec
from onnxprune.errors import BadDataError, ModelError, PluginError, UsageError


@pytest.fixture(autouse=True)
def _unchanged_path() -> Iterator[None]:
    before, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = before
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("score.py:top1", (Path("score.py"), "", "top1")),
        ("a/b c/score.py:top1", (Path("a/b c/score.py"), "", "top1")),
        ("C:\\work\\score.py:top1", (Path("C:\\work\\score.py"), "", "top1")),
        ("package.module:top1", (None, "package.module", "top1")),
    ],
)
def test_function_specs_are_taken_apart(text: str, expected: tuple[Path | None, str, str]) -> None:
    parsed = parse_function_spec(text)
    assert parsed is not None
    assert (parsed.file, parsed.module, parsed.function) == expected


@pytest.mark.parametrize("text", ["images", "data.npz", "C:\\images", "score.py", "a:b:c", "module:", ":f", "a-b:f"])
def test_paths_are_no_function_specs(text: str) -> None:
    assert parse_function_spec(text) is None


def test_existing_folder_with_a_colon_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "set:one").mkdir()
    monkeypatch.chdir(tmp_path)
    assert parse_function_spec("set:one") is None


def test_function_in_a_file_is_loaded_and_may_import_its_siblings(tmp_path: Path) -> None:
    write(tmp_path, "sibling_of_test.py", "VALUE = 41\n")
    path = write(tmp_path, "score.py", "from sibling_of_test import VALUE\ndef score(x): return VALUE + x\n")
    assert load_callable(f"{path}:score", what="Evaluator")(1) == 42


def test_files_of_the_same_name_do_not_collide(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        write(tmp_path / str(number), "score.py", f"def score(): return {number}\n")
    loaded = [load_callable(f"{tmp_path / str(number)}/score.py:score", what="Evaluator") for number in (1, 2)]
    assert [function() for function in loaded] == [1, 2]


def test_file_is_imported_once_until_it_changes(tmp_path: Path) -> None:
    path = write(tmp_path, "score.py", "def score(): return 1\n")
    first = load_callable(f"{path}:score", what="Evaluator")
    assert load_callable(f"{path}:score", what="Evaluator") is first
    write(tmp_path, "score.py", "def score(): return 'changed'\n")
    assert load_callable(f"{path}:score", what="Evaluator")() == "changed"


def test_module_in_the_working_directory_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "module_of_test.py", "def score(): return 7\n")
    monkeypatch.chdir(tmp_path)
    assert load_callable("module_of_test:score", what="Evaluator")() == 7


def test_classes_defined_in_a_file_know_their_module(tmp_path: Path) -> None:
    text = "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\n"
    path = write(tmp_path, "model.py", text)
    assert load_callable(f"{path}:A", what="Factory")(3).x == 3


def test_unknown_function_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    path = write(tmp_path, "score.py", "def top1(r): ...\n")
    with pytest.raises(UsageError, match=r"no function 'topl' .*Did you mean 'top1'"):
        load_callable(f"{path}:topl", what="Evaluator")


def test_missing_file_module_and_non_functions_are_usage_errors(tmp_path: Path) -> None:
    path = write(tmp_path, "score.py", "NUMBER = 3\n")
    with pytest.raises(UsageError, match=r"there is no file '.*missing\.py'"):
        load_callable(f"{tmp_path}/missing.py:f", what="Evaluator")
    with pytest.raises(UsageError, match="there is no module 'no_such_module_here'"):
        load_callable("no_such_module_here:f", what="Evaluator")
    with pytest.raises(UsageError, match="'NUMBER' is not a function but of type 'int'"):
        load_callable(f"{path}:NUMBER", what="Evaluator")
    with pytest.raises(UsageError, match="is not of the form"):
        load_callable("score", what="Evaluator")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("x = 1\nraise ValueError('no data here')\n", r"score\.py:2: ValueError: no data here\."),
        ("def f(:\n", r"score\.py:1: SyntaxError"),
        ("\nimport no_such_package_here\n", r"score\.py:2: ModuleNotFoundError"),
        ("import sys\nsys.exit(3)\n", r"score\.py:2: SystemExit: 3"),
    ],
    ids=["raises", "syntax", "import", "exit"],
)
def test_file_that_fails_on_import_names_file_and_line(tmp_path: Path, text: str, says: str) -> None:
    path = write(tmp_path, "score.py", text)
    # Another test of this process may have loaded a score.py that works.
    before = set(sys.modules)
    with pytest.raises(PluginError, match=says):
        load_callable(f"{path}:f", what="Evaluator")
    assert not [name for name in set(sys.modules) - before if name.startswith("_onnxprune_user_score")]


def test_failing_call_names_the_line_of_the_users_code(tmp_path: Path) -> None:
    path = write(tmp_path, "score.py", "import json\n\ndef f(x):\n    return json.loads(x)\n")
    function = load_callable(f"{path}:f", what="Evaluator")
    with pytest.raises(PluginError, match=r"'score\.py:f' failed at .*score\.py:4: JSONDecodeError") as caught:
        call_user_code(function, "{", spec="score.py:f", what="Evaluator")
    assert isinstance(caught.value.__cause__, ValueError)


def test_error_while_iterating_names_the_line_and_what_came_before_stays(tmp_path: Path) -> None:
    path = write(tmp_path, "data.py", "def f():\n    yield 1\n    yield 1 // 0\n")
    function = load_callable(f"{path}:f", what="Data function")
    items = iterate_user_code(function(), spec="data.py:f", what="Data function")
    assert next(items) == 1
    with pytest.raises(PluginError, match=r"data\.py:3: ZeroDivisionError"):
        next(items)


def test_feeding_wrong_data_is_the_users_error_and_a_failing_model_is_not() -> None:
    def feeds_wrongly() -> None:
        raise BadDataError("input 'x' expects float32, got float64.")

    def meets_a_broken_model() -> None:
        raise ModelError("node 'a' fails.")

    with pytest.raises(PluginError, match="input 'x' expects float32"):
        call_user_code(feeds_wrongly, spec="s.py:f", what="Evaluator")
    with pytest.raises(ModelError):
        call_user_code(meets_a_broken_model, spec="s.py:f", what="Evaluator")


def test_interrupt_passes_through() -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call_user_code(interrupted, spec="s.py:f", what="Evaluator")


def test_what_user_code_prints_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    def talks() -> None:
        print("loading")

    call_user_code(talks, spec="s.py:f", what="Evaluator")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "loading\n")


def test_a_file_name_that_the_system_refuses_is_an_error() -> None:
    with pytest.raises(UsageError, match="can't be looked for: File name too long"):
        load_callable("n" * 300 + ".py:top1", what="Evaluator")
