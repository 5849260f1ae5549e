"""The command line: `litedetr COMMAND`, and `litedetr-export` for `litedetr export`.

Exit status: 0 done, 1 a check failed, 2 wrong use or bad input, 3 a bug, 130 interrupted.
"""

import signal
import sys

import typer

from .. import __version__
from .benchmark import benchmark
from .build import build
from .doctor import doctor
from .evaluate import evaluate
from .export import export
from .predict import predict
from .verify import verify

app = typer.Typer(
    name="litedetr",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Deploy Lite DETR and other detectors with deformable attention.",
)
for command in (export, build, verify, predict, evaluate, doctor):
    app.command()(command)
app.add_typer(benchmark, name="benchmark")


def _print_version(wanted: bool):
    if wanted:
        print(f"litedetr-deploy {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
    ),
):
    # Typer turns this function's signature into the options that stand before the command.
    pass


def main(arguments=None):
    """Run `litedetr` on `arguments`, those of the process when not given; exits."""
    # What stops a container or a job stops it as cleanly as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    app(arguments, prog_name="litedetr")


def export_main():
    """Run `litedetr export`, as `litedetr-export`; exits."""
    main(["export", *sys.argv[1:]])
