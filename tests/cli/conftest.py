"""Commands run in this process, through the same ``main`` that the console script calls."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from attnlab import cli, host, results

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command line; its exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit:
            cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert isinstance(exit.value.code, int)
        return exit.value.code, captured.out, captured.err

    return run


@pytest.fixture
def refused(command: Command) -> Callable[..., str]:
    """Run a command line that must be refused, in one line; the line."""

    def run(*arguments: object) -> str:
        code, out, err = command(*arguments)
        assert code == 2, err
        *before, line = err.splitlines(keepends=True)
        assert line.startswith("attnlab: error: ") and line.endswith("\n")
        assert all(re.match(r"\[\d+/\d+] ", step) for step in before)  # progress of what was on its way
        assert out == "" or arguments[0] in ("generate", "explore")
        return line

    return run


@pytest.fixture(autouse=True)
def somewhere_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing here may be written into the repository, or wait for a training on this machine."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(host, "TRAINING_LOCK", tmp_path / "training.lock")
    monkeypatch.setattr(results, "PUBLISHED", tmp_path / "published")
    monkeypatch.setenv("COLUMNS", "100")
