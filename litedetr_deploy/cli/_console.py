"""What the commands share: exit statuses, progress on stderr, results on stdout."""

import contextlib
import functools
import itertools
import json
import os
import signal
import sys
import traceback
import warnings

import typer

from ..errors import LiteDetrError, Notice, not_installed, printable

INTERNAL_ERROR = 3  # 1 means that a check failed, and a bug must not look like that
SIGNALLED = 128  # plus the signal's number, as a shell reports what a signal has stopped
DEBUG_VARIABLE = "LITEDETR_DEBUG"


class Terminated(KeyboardInterrupt):
    """SIGTERM, which stops a container or a job, and does it as cleanly as Ctrl-C."""


def guarded(command):
    """Wrap a command: an error becomes a paragraph on stderr, with --json an object on stdout, and its exit status."""

    @functools.wraps(command)
    def run(*arguments, **options):
        try:
            with _notices_on_stderr():
                return command(*arguments, **options)
        except (typer.Exit, BrokenPipeError):  # typer ends quietly when the reader of a pipe has gone
            raise
        except (Exception, KeyboardInterrupt) as error:
            if os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0"):
                traceback.print_exc()
            text, status = _explain(error)
            raise report_error(text, status, options.get("as_json", False)) from None

    return run


def report_error(text, status, as_json):
    """Print an error as `guarded` does; return the exit to raise."""
    text = printable(text)
    print(text if status > SIGNALLED else f"error: {text}", file=sys.stderr)
    if as_json:
        print_json({"error": text, "exit_status": int(status)})
    return typer.Exit(int(status))


def _explain(error):
    """Return what is said of an exception, and the exit status."""
    if isinstance(error, KeyboardInterrupt):  # its argument may say what was written before it
        cause: BaseException = error
        while cause and not isinstance(cause, Terminated):
            cause = cause.__context__  # it may have been raised anew, with what was written
        said = (error.args or ["nothing was written"])[0]
        return f"interrupted; {said}", SIGNALLED + (signal.SIGTERM if cause else signal.SIGINT)
    if isinstance(error, ImportError):
        error = not_installed(error) or error
    if isinstance(error, LiteDetrError):
        return str(error), error.exit_status
    if isinstance(error, MemoryError):
        text = f"the memory is not enough ({error}). Choose a smaller image size or batch, or end what else runs."
        return text, LiteDetrError.exit_status
    if isinstance(error, OSError):
        text = "The operating system refused this: check the disk space and the path, and run the command again."
        return f"{error}. {text}", LiteDetrError.exit_status
    text = f"This is likely a bug; run the command again with {DEBUG_VARIABLE}=1 to see where it comes from."
    return f"unexpected {type(error).__name__}: {error}. {text}", INTERNAL_ERROR


@contextlib.contextmanager
def _notices_on_stderr():
    """Print a `Notice` as one line; other warnings are shown as Python shows them."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", Notice)
        show = warnings.showwarning

        def print_notice(message, category, *rest, **named):
            if issubclass(category, Notice):
                print(f"warning: {printable(message)}.", file=sys.stderr)
            else:
                show(message, category, *rest, **named)

        warnings.showwarning = print_notice
        yield


class Stages:
    """Progress of long work on stderr, a context manager: call it with the name of each stage as the stage begins.

    On a terminal the running stage has a spinner, and a bar where `total` is given; a finished one leaves a line.
    """

    def __init__(self):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
        from rich.text import Text

        class Bar(BarColumn):
            def render(self, task):
                return Text("") if task.total is None else super().render(task)

        class Done(ProgressColumn):
            def render(self, task):
                if task.total is None:  # a stream has a number of frames, but no end
                    return Text(f"{task.completed:.0f}, {task.speed or 0:.1f}/s" if task.completed else "")
                if task.total <= 1:
                    return Text(f"{task.percentage:.0f} %")
                rate = f", {task.speed:.1f}/s" if task.speed else ""
                left = task.time_remaining
                time_left = "" if left is None else f", {left // 60:.0f}:{left % 60:02.0f} left"
                return Text(f"{task.completed:.0f}/{task.total:.0f}{rate}{time_left}")

        self._console = Console(stderr=True, highlight=False)
        spinner = SpinnerColumn("line" if self._console.options.ascii_only else "dots")
        columns = spinner, TextColumn("{task.description}", markup=False), TimeElapsedColumn(), Bar(), Done()
        self._progress = Progress(
            *columns, console=self._console, transient=True, disable=not self._console.is_terminal,
            speed_estimate_period=600,  # seconds; an image can take many
        )  # fmt: skip

    def __enter__(self):
        self._progress.start()
        return self

    def __exit__(self, error_type, error, trace):
        if error_type is None:
            self._finish()
        self._progress.stop()

    def __call__(self, stage, done=0, total=None):
        if [task.description for task in self._progress.tasks] != [printable(stage)]:
            self._finish()
            self._progress.add_task(printable(stage), total=total, completed=done)
        else:
            self._progress.update(self._progress.task_ids[0], completed=done, total=total)

    def _finish(self):
        for task in self._progress.tasks:
            self._progress.remove_task(task.id)
            self._console.print(f"{task.description}  {task.elapsed:.1f} s", style="dim", markup=False)


def finish(report, as_json, passed, show, *arguments):
    """End a command: print its report as JSON or `show` it, and exit with 1 where a check failed."""
    if as_json:
        print_json(report)
    else:
        show(report, *arguments)
    if not passed:
        raise typer.Exit(1)


def print_json(value):
    """Print one JSON object on stdout."""
    print(json.dumps(value, indent=2))


def stdout_console():
    """Return a rich console on stdout that folds lines to a terminal's width, and in a pipe to a generous one."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 120)


def print_verdict(verdict, verbose=False):
    """Print what `Verdict.to_dict()` gives: one line, and before it with `verbose` or where it failed all rows."""
    if verdict["rows"] and (verbose or not verdict["passed"]):
        table = new_table("case", "quantity", "largest difference", "tolerance", "verdict")
        for case, rows in itertools.groupby(verdict["rows"], key=lambda row: row["case"]):
            for i, row in enumerate(rows):
                cells = "" if i else case, row["quantity"], f"{row['difference']:.1e}", f"{row['tolerance']:.1e}"
                state = escaped(row["trouble"] or ("ok" if row["passed"] else "FAILED"))
                table.add_row(*map(escaped, cells), f"[{'green' if row['passed'] else 'bold red'}]{state}[/]")
        stdout_console().print(table)
    print(printable(verdict["text"]))


def new_table(first, *others):
    """Return a table with these headings; the first column, of names, is to the left and the others to the right."""
    from rich import box
    from rich.table import Column, Table

    columns = [Column(heading, justify="right", overflow="fold") for heading in others]
    return Table(Column(first, overflow="fold"), *columns, box=box.SIMPLE_HEAD, pad_edge=False)


def escaped(text):
    """Return `text` as a cell of a table shows it literally."""
    from rich.markup import escape

    return escape(printable(text))
