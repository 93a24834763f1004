"""Start-up stays light: what `onnxprune --help` and `import onnxprune` may load."""

from __future__ import annotations

import json
import subprocess
import sys

# Standard library apart, nothing but these may be loaded: each further package costs every user on every call.
ALLOWED_FOR_HELP = {"click", "onnxprune"}
ALLOWED_FOR_IMPORT = {"onnxprune"}

PROBE = """
import json, sys
before = set(sys.modules)
{action}
loaded = {{name.partition(".")[0] for name in set(sys.modules) - before}}
print(json.dumps(sorted(name for name in loaded if name not in sys.stdlib_module_names and not name.startswith("_"))))
"""


def loaded_by(action: str) -> set[str]:
    completed = subprocess.run(
        [sys.executable, "-c", PROBE.format(action=action)], capture_output=True, text=True, check=True
    )
    return set(json.loads(completed.stdout.splitlines()[-1]))


def test_importing_the_package_loads_nothing_else() -> None:
    assert loaded_by("import onnxprune") <= ALLOWED_FOR_IMPORT


def test_help_loads_click_and_nothing_heavy() -> None:
    action = "from onnxprune.cli.main import cli; cli.main(['--help'], standalone_mode=False)"
    assert loaded_by(action) <= ALLOWED_FOR_HELP


def test_listing_plugins_imports_no_pass_and_no_target() -> None:
    action = (
        "from onnxprune.plugins import list_plugins; list_plugins('pass'); list_plugins('target'); "
        "assert not [m for m in sys.modules if m.startswith(('onnxprune.passes.', 'onnxprune.targets.'))]"
    )
    assert "onnxruntime" not in loaded_by(action)
