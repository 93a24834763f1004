"""The command `onnxprune`: finds the subcommand, catches what onnxprune raises on purpose, sets the exit code."""

from __future__ import annotations

import importlib
import sys
from typing import NoReturn

import click

from onnxprune import __version__
from onnxprune.cli.endings import Interrupts, show_error
from onnxprune.errors import InterruptedRunError, OnnxPruneError, did_you_mean

__all__ = ["cli", "main"]

# Names and one-line helps stand here so that `--help` imports no command.
COMMANDS: dict[str, tuple[str, str]] = {
    "run": ("onnxprune.cli.run:run", "Compress a model, build artifacts and prove the result."),
    "convert": ("onnxprune.cli.convert:convert", "Turn any supported source into a canonical ONNX file."),
    "inspect": ("onnxprune.cli.inspect:inspect", "Show layers, parameters, MACs, bytes and channel classes."),
    "profile": ("onnxprune.cli.profile:profile", "Time a model and its operators."),
    "compare": ("onnxprune.cli.compare:compare", "Show how far two models are from each other, and where."),
    "passes": ("onnxprune.cli.catalog:passes", "List the passes and their settings."),
    "targets": ("onnxprune.cli.catalog:targets", "List the targets and their settings."),
    "ops": ("onnxprune.cli.catalog:ops", "List the operators that each table knows."),
}


class LazyGroup(click.Group):
    """A group whose commands are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module_name, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command = getattr(importlib.import_module(module_name), attribute)
        if not isinstance(command, click.Command):
            raise TypeError(f"'{cmd_name}' is not a click command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_line) for name, (_, help_line) in COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            raise click.UsageError(f"{error.message} {did_you_mean(args[0], list(COMMANDS))}", ctx) from None


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="onnxprune")
def cli() -> None:
    """Make trained models small and fast on phones and small CPUs, with proof.

    The main job:  onnxprune run model.onnx --passes simplify,prune,quant --calibration images/ --target ort-mobile
    """


def main() -> NoReturn:
    """Run the command line and end the process with the documented exit code."""
    interrupts = Interrupts()
    try:
        # Not standing alone, click gives the code of `Exit` back instead of ending the process.
        code = cli.main(standalone_mode=False, obj=interrupts)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        _end_interrupted()
    except InterruptedRunError as error:
        _end_interrupted(error.message)
    except Exception as error:
        # Native code turns an interrupt into an error of its own (an extension that is being imported: ImportError).
        if interrupts.seen:
            _end_interrupted()
        if not isinstance(error, OnnxPruneError):
            raise
        show_error(error)
        sys.exit(error.exit_code)
    sys.exit(code if isinstance(code, int) else 0)


def _end_interrupted(message: str = "Interrupted: no artifact was written.") -> NoReturn:
    click.echo(message, err=True)
    sys.exit(InterruptedRunError.exit_code)
