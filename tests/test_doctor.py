"""What is said of this machine is what it does: pieces are taken away one at a time."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from attnlab import attention, doctor, host, native, results
from attnlab.attention import implementations, peers, supports, third_party
from attnlab.doctor import Finding, examined

NOWHERE = Path("/nonexistent/runs")


def by_name(runs: Path = NOWHERE) -> dict[str, Finding]:
    found = examined(runs)
    assert len({one.what for one in found}) == len(found)
    return {one.what: one for one in found}


@pytest.fixture
def fresh_library() -> Iterator[None]:
    """Looked for anew, here and by whoever comes after."""
    native.library.cache_clear()
    yield
    native.library.cache_clear()


def test_what_runs_is_what_attend_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A list kept by hand would praise a kernel that raises, or leave out the newest one. Each that is said to run
    does."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = by_name()
    q, k = torch.ones(2, 6, 1, 16), torch.ones(2, 3, 7, 16)
    for kind, names in (("impl", implementations()), ("peer", peers())):
        for name in names:
            one = found[f"{kind} {name}"]
            assert one.works == supports(name, q, k, k)[0], name
            if one.works:
                for dtype in map(str.strip, one.said.split()):
                    typed = [x.to(getattr(torch, dtype)) for x in (q, k, k)]
                    assert attention.attend(*typed, impl=name).unique().tolist() == [1]
    assert found["impl grouped"].said == "float32 bfloat16"
    assert not found["impl triton"].works and found["impl triton"].said.startswith("triton needs CUDA")
    assert found["torch"].works and found["torch"].said.endswith("no CUDA device")


def test_a_missing_package_says_what_it_would_give(monkeypatch: pytest.MonkeyPatch) -> None:
    """ "Not installed", without what it is for, makes people install everything."""
    monkeypatch.setattr(doctor.metadata, "distributions", lambda name: iter(()))
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    found = by_name()
    shown = "\n".join(doctor.lines(list(found.values())))
    for name in ("transformers", "datasets", "tensorboard", "jupyterlab", "pytest-benchmark"):
        assert f"  not installed → pip install {name}: {doctor.PIP[name]}\n" in shown and not found[name].works
    assert "not installed → apt-get install chromium: " in shown
    assert "→ on CUDA, pip install flashinfer-python: timed beside ours, attnlab explore --peers flashinfer" in shown


def test_what_is_there_needs_no_remedy() -> None:
    """An advice to install what is installed."""
    found = by_name()
    assert found["pytest-benchmark"].works  # these tests' own extra
    for line, one in zip(doctor.lines(list(found.values())), found.values(), strict=True):
        assert line.startswith("ok  " if one.works else "--  ")
        assert "→" not in line or not one.works
        assert line.index(one.said) == 6 + max(map(len, found)) and "\n" not in line


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fresh_library: None) -> None:
    """The fastest implementation left out in silence: its time is then taken for what this machine can do."""
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = by_name()
    assert not found["compiler"].works and not found["impl cpp"].works and found["impl grouped"].works
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        assert "there is no '/nonexistent/c++' (install g++, or name one in CXX)" in found["compiler"].said


@pytest.mark.parametrize("how", ["absent", "no-kernel", "wrong"])
def test_torch_that_cannot_compute(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """Not there, built for another card, or wrong: that is a line, and the rest is still examined."""
    if how == "absent":
        monkeypatch.setitem(sys.modules, "torch", None)
    elif how == "wrong":
        monkeypatch.setattr(torch, "equal", lambda *_: False)
    else:

        def refuse(device: str = "auto") -> str:
            raise RuntimeError("CUDA error: no kernel image\nis available")

        monkeypatch.setattr(host, "resolve_device", refuse)
    found = by_name()
    said = {"absent": "torch", "no-kernel": "no kernel image", "wrong": "a matrix product on c"}[how]
    assert not found["torch"].works and said in found["torch"].said and "\n" not in found["torch"].said
    assert found["torch"].remedy.startswith("pip install 'torch>=2.11'")
    assert "impl grouped" not in found and "this machine" not in found and "transformers" in found


def test_a_peer_built_for_another_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """It raises when it is imported, which must not end the examination of everything else."""

    def broken(*_: object) -> tuple[bool, str]:
        raise ImportError("undefined symbol")

    monkeypatch.setattr(third_party.PEERS["xformers"], "supports", broken)
    assert "undefined symbol" in by_name()["peer xformers"].said


def test_whose_rows_there_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Rows of another machine are not this one's, and a folder without rows is no run."""
    monkeypatch.setattr(results, "PUBLISHED", tmp_path / "published")
    here = host.describe(host.resolve_device())["machine"]
    for name in ("published", "own rows", "this machine"):
        assert not by_name(tmp_path / "runs")[name].works
    for folder in ("published/other-machine/a", "published/other-machine/b", f"published/{here}/a", "runs/x/a"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / results.ROWS).touch()
    (tmp_path / "published" / here / "empty").mkdir()
    found = by_name(tmp_path / "runs")
    assert found["published"].said == f"3 runs in {tmp_path / 'published'}"
    assert found["own rows"].said == f"1 runs in {tmp_path / 'runs'}"
    assert found["this machine"].said == f"1 published runs of {here}"
