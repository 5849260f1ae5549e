"""litedetr doctor: what is here, what is not, and how to get it."""

from dataclasses import asdict
from itertools import groupby

from ._console import escaped, finish, stdout_console

# In a terminal of ASCII the second.
MARKS = {"ok": ("[green]✓[/]", "+"), "absent": ("[yellow]–[/]", "-"), "broken": ("[bold red]✗[/]", "x")}


def doctor(as_json: bool = False):
    """Look at this machine and this installation; exit with 1 if models cannot run on the CPU."""
    from ..runtime.environment import broken, inspect_environment

    findings = inspect_environment()
    missing = broken(findings)
    report = {"findings": [asdict(finding) for finding in findings], "healthy": not missing}
    finish(report, as_json, not missing, lambda _: _print(findings, missing))


def _print(findings, missing):
    from rich.table import Column, Table

    console = stdout_console()
    marks = {state: pair[console.options.ascii_only] for state, pair in MARKS.items()}
    name_width = max(len(finding.name) for finding in findings)
    for topic, group in groupby(findings, key=lambda finding: finding.topic):
        console.print(f"\n[bold]{topic}[/]")
        columns = Column(), Column(min_width=name_width, no_wrap=True), Column(overflow="fold")
        table = Table.grid(*columns, padding=(0, 1))
        for finding in group:
            remedy = f"\n[dim]{escaped(finding.remedy)}[/]" if finding.remedy else ""
            table.add_row(marks[finding.state], finding.name, escaped(finding.value) + remedy)
        console.print(table)
    end = f"{marks['broken']} broken: {', '.join(missing)}" if missing else "Everything that the CPU needs is here."
    console.print(f"\n{end}")
