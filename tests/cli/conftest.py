import pytest
from typer.testing import CliRunner

from litedetr_deploy import cli


@pytest.fixture
def litedetr(monkeypatch):
    """Run a command in this process; returns its exit_code, stdout and stderr."""
    monkeypatch.delenv("LITEDETR_DEBUG", raising=False)
    return lambda *arguments: CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
