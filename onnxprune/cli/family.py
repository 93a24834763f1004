"""`onnxprune run` with several models: the same recipe on each, and what became of all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import click

from onnxprune import api
from onnxprune.cli.endings import is_interrupted, missed_budget, show_error
from onnxprune.cli.stdout import nothing_on_stdout, results_on_stdout
from onnxprune.contracts import Progress
from onnxprune.errors import InterruptedRunError, OnnxPruneError, UsageError, quoted_list

__all__ = ["family_folders", "run_family"]


def family_folders(sources: Sequence[str], out: Path | None) -> tuple[Path, ...]:
    """One folder for each model in `out` (default "out"): its name, with its folder's where names are equal.

    Raises:
        UsageError: Even these are equal.
    """
    names = [api.default_name(source) for source in sources]
    counts = Counter(names)
    names = [
        f"{Path(source).absolute().parent.name}-{name}" if counts[name] > 1 else name
        for source, name in zip(sources, names, strict=True)
    ]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UsageError(
            f"Several models would be written to the folder {quoted_list(twice)}.",
            "Give each model once, and run models of the same name in folders of the same name one by one.",
        )
    return tuple((out if out is not None else Path("out")) / name for name in names)


def run_family(jobs: Sequence[api.Job], *, dry_run: bool, as_json: bool, verbose: int, progress: Progress) -> None:
    """Run every job, one after the other, print what became of them, and end with the most serious exit code.

    A model that fails leaves the others alone. A mistake in the recipe has been found before, for all of them.
    """
    from onnxprune.report.family import FamilyMember, family_exit_code, print_family
    from onnxprune.report.json import to_json_text
    from onnxprune.report.terminal import print_dry_run

    members: list[FamilyMember] = []
    for number, job in enumerate(jobs, start=1):
        name = job.options.out.name
        progress.note(f"Model {number} of {len(jobs)}: {name}")
        report, dry, error = None, None, None
        try:
            with nothing_on_stdout():
                report, dry = (None, api.dry_run_job(job)) if dry_run else (api.run_job(job), None)
        except (KeyboardInterrupt, OnnxPruneError) as raised:
            if isinstance(raised, KeyboardInterrupt) or is_interrupted():
                raise InterruptedRunError(
                    f"Interrupted: no artifact was written for '{name}'; {number - 1} models before it are done."
                ) from raised
            error = raised
        if report is not None:
            error = missed_budget(report, job.options.out)
        if error is not None:
            show_error(error, of=name)
        members.append(
            FamilyMember(
                name=name,
                source=str(job.request.source),
                out=job.options.out,
                exit_code=0 if error is None else error.exit_code,
                report=report,
                dry_run=dry,
                error=None if error is None else error.message,
            )
        )
    with results_on_stdout():
        if as_json:
            click.echo(to_json_text(members))
        elif dry_run:
            for member in members:
                if member.dry_run is not None:
                    click.echo(click.style(f"\n{member.name}", bold=True))
                    print_dry_run(member.dry_run, with_plans=verbose > 0)
        else:
            print_family(members)
    code = family_exit_code(members)
    if code:
        raise click.exceptions.Exit(code)
