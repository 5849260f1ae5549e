"""A command that is interrupted while it works."""

import signal
import subprocess
import sys


def interrupt(code, arguments, sent, timeout):
    """Run a command, send it a signal, check its exit status and return what it printed to stderr.

    code: Python that runs the command line and prints 'waiting' when the signal is to be sent, then waits in short
        sleeps: a signal that comes just before one is noticed after it.
    timeout: seconds that it may take to end.
    """
    # A shell's background jobs, in which the tests may run, ignore SIGINT, and so would this process.
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(sent)
    _, errors = process.communicate(timeout=timeout)
    assert process.returncode == 128 + sent
    return errors
