"""The command line: `litedetr COMMAND`, and `litedetr-export` for `litedetr export`.

Exit status: 0 done, 1 a check failed, 2 wrong use or bad input, 3 a bug, 130 interrupted, 143 terminated.
"""

import signal
import sys
from typing import Annotated

import typer

from .. import __version__
from ._console import Terminated, guarded, report_error
from ._options import described
from .benchmark import benchmark
from .build import build
from .doctor import doctor
from .evaluate import evaluate
from .export import export
from .fuse import fuse
from .predict import predict
from .serve import serve
from .verify import verify

app = typer.Typer(
    name="litedetr",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Deploy Lite DETR and other detectors with deformable attention.",
)
for command in (export, fuse, build, verify, predict, evaluate, doctor):
    app.command()(guarded(described(command)))
app.add_typer(benchmark, name="benchmark")
app.add_typer(serve, name="serve")


def _print_version(wanted: bool):
    if wanted:
        print(f"litedetr-deploy {__version__}")
        raise typer.Exit


_VERSION = typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")


@app.callback()
def options(version: Annotated[bool, _VERSION] = False):  # what may stand before the command
    pass


def main(arguments=None):
    """Run `litedetr` on `arguments`, those of the process when not given; exits."""

    def terminate(number, frame):
        raise Terminated

    signal.signal(signal.SIGTERM, terminate)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal's encoding lacks is no bug
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        status = app(arguments, prog_name="litedetr", standalone_mode=False)
    except Exception as error:
        # Those of wrong use have a class that depends on the version of typer.
        if not hasattr(error, "format_message"):
            raise
        message, status = error.format_message().rstrip("."), getattr(error, "exit_code", 2)
        if message:  # none where the help was printed instead
            command = getattr(getattr(error, "ctx", None), "command_path", "litedetr")
            end = "" if message.endswith("?") else "."
            report_error(f"{message}{end} See `{command} --help`.", status, "--json" in arguments)
    sys.exit(status)


def export_main():
    """Run `litedetr export`, as `litedetr-export`; exits."""
    main(["export", *sys.argv[1:]])
