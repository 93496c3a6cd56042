"""Commands about what is at hand: what they say is missing, and how they hand over to JupyterLab."""

import importlib.util
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import attnlab
from attnlab import doctor, results

ROOT = Path(attnlab.__file__).parents[1]
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def listening() -> "socket.socket":
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken


def opened(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """``attnlab lab`` as a program, with a JupyterLab in ``folder`` that says how it was called and ends with 7."""
    (folder / "jupyterlab").mkdir()
    (folder / "jupyterlab" / "__init__.py").touch()
    (folder / "jupyterlab" / "__main__.py").write_text("import os, sys; print(os.getpid(), *sys.argv[1:]); sys.exit(7)")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(folder), str(ROOT)))}
    with subprocess.Popen(
        [sys.executable, "-m", "attnlab", "lab", *options], stdout=-1, stderr=-1, text=True, env=environment, cwd=folder
    ) as process:
        out, err = process.communicate()
    # The same process: Ctrl-C is answered by JupyterLab, which asks, and not by a parent that kills it meanwhile.
    assert out.split()[:1] == [str(process.pid)], err
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def test_lab_opens_the_repositorys_notebooks(tmp_path: Path) -> None:
    """From any folder, and with JupyterLab's own exit code."""
    done = opened(tmp_path)
    expected = [str(ROOT / "notebooks"), *(["--allow-root"] if os.geteuid() == 0 else [])]
    assert done.stdout.split()[1:] == expected and (done.returncode, done.stderr) == (7, "")


def test_lab_takes_the_port_it_was_given_or_none(tmp_path: Path, listening: socket.socket) -> None:
    """JupyterLab goes on to the next free port in silence: a tunnel to the one asked for shows somebody else's page."""
    free = listening.getsockname()[1]
    listening.close()
    options = [f"--ServerApp.port={free}", "--ServerApp.port_retries=0"]
    assert opened(tmp_path, "--port", str(free)).stdout.split()[-2:] == options


def test_lab_names_a_port_in_use(refused: Callable[..., str], listening: socket.socket) -> None:
    """Before JupyterLab is started, whose page of log hides the reason."""
    port = listening.getsockname()[1]
    assert refused("lab", "--port", port) == (
        f"attnlab: error: port {port} cannot be used: Address already in use; give another --port\n"
    )


def test_lab_without_jupyterlab(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """ "No module named jupyterlab" does not say what to install."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "JupyterLab, which is not installed: pip install jupyterlab" in refused("lab")


def test_lab_without_the_repository(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An installed copy has no notebooks: JupyterLab would open an empty folder of site-packages, or fail on it."""
    monkeypatch.setattr(results, "REPOSITORY", tmp_path)
    assert f"no notebooks at {tmp_path / 'notebooks'}: attnlab is installed without its repository" in refused("lab")


@pytest.mark.parametrize(("works", "code"), [(True, 0), (False, 1)], ids=["works", "broken"])
def test_doctor_fails_on_torch_alone(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, works: bool, code: int
) -> None:
    """A script that asks whether this machine will do must not stop at a missing extra, nor go on without torch."""
    findings = [doctor.Finding("torch", works, "said"), doctor.Finding("datasets", False, "absent", "pip install")]
    monkeypatch.setattr(doctor, "examined", lambda runs: findings if runs == tmp_path else [])
    assert command("doctor", "--runs", tmp_path) == (code, "\n".join(doctor.lines(findings)) + "\n", "")
