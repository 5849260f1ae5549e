"""What the commands share: exit statuses, progress on stderr, results on stdout."""

import functools
import json
import os
import sys
import time
import traceback

import typer

from ..errors import LiteDetrError, printable

INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it
INTERNAL_ERROR = 3  # 1 means that a check failed, and a bug must not look like that
DEBUG_VARIABLE = "LITEDETR_DEBUG"


def guarded(command):
    """Wrap a command: each error becomes one paragraph on stderr and its exit status.

    A KeyboardInterrupt may carry the text that says what was written before it.
    """

    @functools.wraps(command)
    def run(*arguments, **options):
        try:
            return command(*arguments, **options)
        except LiteDetrError as error:
            _traceback_when_debugging()
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(error.exit_status) from None
        except KeyboardInterrupt as interrupt:
            _traceback_when_debugging()
            print("interrupted;", *(interrupt.args or ["nothing was written"]), file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None
        except (typer.Exit, BrokenPipeError):  # typer ends quietly when the reader of a pipe has gone
            raise
        except OSError as error:
            _traceback_when_debugging()
            print(
                f"error: {error}. The operating system refused this: see to the disk space and to the path, and run "
                "the command again.",
                file=sys.stderr,
            )
            raise typer.Exit(LiteDetrError.exit_status) from None
        except Exception as error:
            _traceback_when_debugging()
            print(
                f"error: unexpected {type(error).__name__}: {error}. This is likely a bug; run the command again "
                f"with {DEBUG_VARIABLE}=1 to see where it comes from.",
                file=sys.stderr,
            )
            raise typer.Exit(INTERNAL_ERROR) from None

    return run


def _traceback_when_debugging():
    if os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0"):
        traceback.print_exc()


class Stages:
    """Progress of long work on stderr: call it with the name of each stage as the stage begins.

    On a terminal the running stage has a spinner and its time; each finished stage leaves a line.  A context manager.
    """

    def __init__(self):
        from rich.console import Console
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self._console = Console(stderr=True, highlight=False)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._stage = self._task = self._began = None

    def __enter__(self):
        self._progress.start()
        return self

    def __exit__(self, error_type, error, trace):
        self._finish(completed=error_type is None)
        self._progress.stop()

    def __call__(self, stage):
        self._finish(completed=True)
        self._stage, self._began = stage, time.monotonic()
        self._task = self._progress.add_task(stage, total=None)

    def _finish(self, completed):
        if self._stage is None:
            return
        self._progress.remove_task(self._task)
        if completed:
            seconds = time.monotonic() - self._began
            self._console.print(f"{self._stage}  {seconds:.1f} s", style="dim", markup=False)
        self._stage = None


def print_json(value):
    """Print one JSON object on stdout."""
    print(json.dumps(value, indent=2))


def stdout_console():
    """Return a rich console on stdout that folds lines to a terminal's width, and in a pipe to a generous one."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 120)


def print_verdict(verdict, verbose=False):
    """Print a verdict: one line where it passed, with `verbose` or where it did not the table of its rows before it.

    verdict: what `Verdict.to_dict()` gives.
    """
    if verdict["rows"] and (verbose or not verdict["passed"]):
        _print_rows(verdict["rows"])
    print(printable(verdict["text"]))


def _print_rows(rows):
    table = new_table("case", "quantity", "largest difference", "tolerance", "verdict")
    previous = None
    for row in rows:
        case = row["case"] if row["case"] != previous else ""
        figures = f"{row['difference']:.1e}", f"{row['tolerance']:.1e}"
        state = row.get("trouble") or ("ok" if row["passed"] else "FAILED")
        table.add_row(
            *map(escaped, (case, row["quantity"], *figures)),
            f"[{'green' if row['passed'] else 'bold red'}]{escaped(state)}[/]",
        )
        previous = row["case"]
    stdout_console().print(table)


def new_table(first, *others):
    """Return a table with these headings; the first column, of names, is to the left and the others to the right."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, overflow="fold")
    for heading in others:
        table.add_column(heading, justify="right", overflow="fold")
    return table


def escaped(text):
    """Return `text` as a cell of a table shows it literally."""
    from rich.markup import escape

    return escape(printable(text))


print_verification = _print_rows  # of commands that do not use print_verdict yet
