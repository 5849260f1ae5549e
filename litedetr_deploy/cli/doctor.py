"""litedetr doctor: what is here, what is not, and how to get it."""

from dataclasses import asdict
from itertools import groupby
from typing import Annotated

import typer

from ._console import guarded, print_json, stdout_console

MARKS = {"ok": "[green]✓[/]", "absent": "[yellow]–[/]", "broken": "[bold red]✗[/]"}


@guarded
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False):
    """Look at this machine and this installation; exit with 1 if models cannot run on the CPU."""
    from ..runtime.environment import BROKEN, inspect_environment

    findings = inspect_environment()
    broken = [finding.name for finding in findings if finding.state == BROKEN]
    if as_json:
        print_json({"findings": [asdict(finding) for finding in findings], "healthy": not broken})
    else:
        _print(findings)
        print(f"\n✗ broken: {', '.join(broken)}" if broken else "\nEverything that the CPU needs is here.")
    if broken:
        raise typer.Exit(1)


def _print(findings):
    from rich.markup import escape
    from rich.table import Table

    console = stdout_console()
    name_width = max(len(finding.name) for finding in findings)
    for topic, group in groupby(findings, key=lambda finding: finding.topic):
        console.print(f"\n[bold]{topic}[/]")
        table = Table.grid(padding=(0, 1))
        table.add_column()
        table.add_column(min_width=name_width, no_wrap=True)
        table.add_column(overflow="fold")
        for finding in group:
            remedy = f"\n[dim]{escape(finding.remedy)}[/]" if finding.remedy else ""
            table.add_row(MARKS[finding.state], finding.name, escape(finding.value) + remedy)
        console.print(table)
