"""The queue of GPU jobs: commands that the command line takes, and "published" only where the rows are."""

import itertools
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from attnlab import cli, host, results
from bench.gpu_jobs import JOBS, Job, main


def parsed(command: str) -> dict[str, Any]:
    """The options of a command line, which is read and not run."""
    python, option, package, *words = shlex.split(command.replace("$OUT", "out"))
    assert (python, option, package) == ("python", "-m", "attnlab")
    chosen: Any = typer.main.get_command(cli.app)
    name, context = "attnlab", None
    while hasattr(chosen, "resolve_command"):  # a group, of a group
        context = chosen.make_context(name, words, parent=context)
        name, chosen, words = chosen.resolve_command(context, words)
    return chosen.make_context(name, words, parent=context).params


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_the_command_line_takes_every_command(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a GPU is lent for minutes: a renamed option costs them all."""
    monkeypatch.setattr(host, "resolve_device", lambda device: device)  # as on the machine that these are for
    options = parsed(job.command)
    assert options["device"] == "cuda" and Path("out") in (options["runs"], options["runs"].parent)
    assert 0 < options["minutes"] <= 8  # which leaves time for the point that is under way


def test_a_command_that_is_not_taken_is_seen() -> None:
    """The check above must be able to fail."""
    for command in ("explore --grdi full", "exlpore", "explore --heads many"):
        with pytest.raises(typer.BadParameter.__mro__[2]):
            parsed(f"python -m attnlab {command}")


def decode_rows(heads: int = 32, **more: Any) -> list[dict[str, Any]]:
    """One row per point of the full CUDA grid, for six G."""
    sizes = itertools.product((1, 2, 4, 8, 16, 32), (1024, 4096, 16384, 65536), (1, 8, 32, 128))
    row = {"schema": 1, "run": "r", "machine": "m", "device": "cuda", "kind": "decode", "impl": "grouped", **more}
    shapes = [({"n_heads": heads, "n_kv_heads": g, "head_dim": 128}, context, batch) for g, context, batch in sizes]
    return [
        row | {"key": str(index), "shape": shape, "context": context, "batch": batch}
        for index, (shape, context, batch) in enumerate(shapes)
    ]


def listed(capsys: pytest.CaptureFixture[str]) -> set[str]:
    """The names of the jobs that are listed as published."""
    main()
    lines = capsys.readouterr().out.splitlines()
    assert [line[:3].strip() for line in lines if "to do  " in line or "published  " in line] == [j.name for j in JOBS]
    assert all(any(line.strip() == job.command for line in lines) for job in JOBS)
    return {line.split()[0] for line in lines if line[4:].startswith("published")}


def test_the_list_says_what_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows of a CPU, of other heads or of another arm answer none of these questions; a job that is done twice costs
    another's minutes."""
    monkeypatch.setattr(results, "PUBLISHED", tmp_path)

    def published(rows: list[dict[str, Any]]) -> set[str]:
        (tmp_path / "r").mkdir(exist_ok=True)
        (tmp_path / "r" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return listed(capsys)

    assert listed(capsys) == set()  # nothing is published at all
    assert published(decode_rows(device="cpu")) == set()
    assert published(decode_rows(impl="expanded")) == set()
    assert published(decode_rows()[1:]) == set()
    assert published(decode_rows()) == {"1b"}
    assert published(decode_rows(24)) == {"1d"}
    assert published(decode_rows(impl="flashinfer")) == {"1e"}
    assert published([*decode_rows()[1:], decode_rows()[0] | {"kind": "correctness", "dtype": "bfloat16"}]) == {"1a"}
