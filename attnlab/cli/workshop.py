"""Commands about what is at hand: what is installed here, and the notebooks."""

import importlib.util
import os
import socket
import sys
from typing import Annotated

import typer

from attnlab.cli.options import PLAIN, RUNS, Runs
from attnlab.errors import InputError

app = typer.Typer(**PLAIN)


@app.command()
def doctor(runs: Runs = RUNS) -> None:
    """Say what is installed here and works, and what each missing piece would give.

    Example: attnlab doctor
    """
    from attnlab.doctor import examined, lines

    findings = examined(runs)
    print("\n".join(lines(findings)))
    if not all(finding.works for finding in findings if finding.what == "torch"):
        raise typer.Exit(1)


@app.command()
def lab(
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="This one or none; else the first free.")] = None,
) -> None:
    """Open the notebooks in JupyterLab.

    Example: attnlab lab --port 8890
    """
    from attnlab.results import REPOSITORY

    notebooks = REPOSITORY / "notebooks"
    if not notebooks.is_dir():
        raise InputError(f"no notebooks at {notebooks}: attnlab is installed without its repository; clone that")
    if importlib.util.find_spec("jupyterlab") is None:
        raise InputError("the notebooks open in JupyterLab, which is not installed: pip install jupyterlab")
    command = [sys.executable, "-m", "jupyterlab", str(notebooks)]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command.append("--allow-root")  # in a container one often is; it listens to this machine alone, with a token
    if port is not None:
        _check_free(port)
        command += [f"--ServerApp.port={port}", "--ServerApp.port_retries=0"]  # else it takes another, in silence
    sys.stdout.flush()
    os.execv(command[0], command)  # in this process's place, so that Ctrl-C is JupyterLab's to answer


def _check_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as JupyterLab: a port just left is free
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise InputError(f"port {port} cannot be used: {error.strerror}; give another --port") from None
