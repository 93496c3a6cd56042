"""Something to look at while a job runs, on stderr, and nothing between the lines of what it prints."""

from types import SimpleNamespace

import pytest

from attnlab.progress import progress


def test_without_a_terminal_each_step_is_a_plain_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Control codes in a log file of a night's job are unreadable, and stdout belongs to what the job prints."""
    with progress() as advance:
        advance("roofs of this machine", 0, 7)
        advance("MHA decode [ctx37]", 3, 7)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "[0/7] roofs of this machine\n[3/7] MHA decode [ctx37]\n"


def test_on_a_terminal_a_bar_names_the_point(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bar without a name does not say which point is the slow one; one that stays behind covers the table."""
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes stderr for a terminal
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with progress() as advance:
        advance("roofs of this machine", 0, 7)
        advance("MHA decode ctx37", 3, 7)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "3/7" in captured.err and "MHA decode ctx37" in captured.err
    assert captured.err.endswith("\x1b[2K")  # the bar's line is erased at the end


@pytest.mark.parametrize(("minutes", "told"), [(0, 1), (8, 4), (9, 5)])
def test_when_the_minutes_are_over_the_block_is_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], minutes: float, told: int
) -> None:
    """A queue that kills its jobs after nine minutes kills the point that was being timed; a job that stops before its
    first step never gets anywhere. An error of the job's own must pass."""
    now = [1000.0]
    monkeypatch.setattr("attnlab.progress.time", SimpleNamespace(monotonic=lambda: now[0]))
    steps = []
    with progress(minutes) as advance:
        for done in range(5):
            advance("step", done, 5)
            steps.append(done)
            now[0] += 121
    assert steps == list(range(told)) and capsys.readouterr().err.count("step") == told
    with pytest.raises(KeyError), progress(minutes) as advance:
        raise KeyError
