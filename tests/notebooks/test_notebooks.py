"""The notebooks: run from a clean kernel, they print what is committed, and they keep the form of a lesson.

A cell tagged ``live`` prints what the machine measured just then; every other output is compared.

    python tests/notebooks/test_notebooks.py [NAME ...]     run all, or those named so, and keep what they print
"""

import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LONGEST_CELL, LONGEST_HELPER, LAST_SECTION = 30, 10, "## What you can now predict"
FAST = ["01_what_sharing_heads_does"]  # under a minute each; the others run with `make check`
ANEW = "to run it anew: python tests/notebooks/test_notebooks.py"

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def prose(notebook: Any) -> str:
    return "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def live(cell: Any) -> bool:
    return "live" in cell.metadata.get("tags", [])


def executed(path: Path, folder: Path) -> Any:
    """The notebook, run from a clean kernel in a copy that lies in ``folder`` beside this tree's figures and docs; an
    error in a cell is raised."""
    for name in ("figures", "docs"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "notebooks").mkdir()
    copy = shutil.copy(path, folder / "notebooks")
    client = NotebookClient(
        notebook := read(copy),
        timeout=600,
        kernel_name="python3",
        coalesce_streams=True,
        record_timing=False,
        resources={"metadata": {"path": str(folder / "notebooks")}},
    )
    # this tree's library, and no start-up files or history of the user's
    with mock.patch.dict(os.environ, PYTHONPATH=str(ROOT), IPYTHONDIR=str(folder / "ipython")):
        client.execute()
    return notebook


def shown(cell: Any) -> list[Any]:
    """What a cell displays, without its counter."""
    return [output.get("text") or dict(output.data) for output in cell.outputs]


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=path.stem, marks=() if path.stem in FAST else pytest.mark.slow) for path in NOTEBOOKS],
)
def test_a_clean_kernel_prints_what_is_committed(path: Path, tmp_path: Path) -> None:
    """Notebooks rot unseen: cells run out of order, an output kept from an older library or older rows, a warning that
    nobody looked at."""
    for cell, kept in zip(code(executed(path, tmp_path)), code(read(path)), strict=True):
        for output in cell.outputs:
            assert output.get("name") != "stderr", f"{cell.id} writes on stderr: {output.text}"
        if not live(cell):
            assert shown(cell) == shown(kept), f"{cell.id} shows something else; {ANEW}"


@each
def test_outputs_are_those_of_one_clean_run(path: Path) -> None:
    """A gap in the counters is a cell that was run twice, or not at all. Timestamps and versions change with every run
    and hide what else did; a path tells whose machine it was; a timing that is not called live is taken for a fact."""
    notebook = read(path)
    assert [cell.execution_count for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1)), ANEW
    assert list(notebook.metadata) == ["kernelspec"], ANEW
    assert all(set(cell.metadata) <= {"tags"} for cell in notebook.cells), ANEW
    assert not re.search(r"(?<![\w.:/])/(home|root|tmp|Users|work|mnt|opt|var)/", path.read_text()), "an absolute path"
    for cell in code(notebook):
        assert all(output.get("name") != "stderr" for output in cell.outputs), cell.id
        if live(cell):
            assert cell.outputs and "live" in cell.outputs[0].text, f"{cell.id} does not say so"


@each
def test_the_form_of_a_lesson(path: Path) -> None:
    """Opens with a question, ends with what a reader can now predict; cells fit a screen, and what is longer belongs
    into the library, which has tests."""
    notebook = read(path)
    assert notebook.cells[0].cell_type == "markdown" and "?" in notebook.cells[0].source
    assert re.findall(r"^## .*$", prose(notebook), re.MULTILINE)[-1] == LAST_SECTION
    assert "from attnlab" in code(notebook)[0].source
    for cell in code(notebook):
        lines = cell.source.splitlines()
        assert len(lines) <= LONGEST_CELL, f"{cell.id} has {len(lines)} lines"
        for helper in re.findall(r"^(?:def|class) .*\n(?:(?: .*)?\n?)*", cell.source, re.MULTILINE):
            assert len(helper.strip().splitlines()) <= LONGEST_HELPER, f"{cell.id}: too long for a notebook:\n{helper}"


@each
def test_links_lead_somewhere(path: Path) -> None:
    """A renamed page or figure leaves a dead link behind, which nobody clicks before a reader does."""
    links = re.findall(r"\]\(([^)\s]+)\)", prose(read(path)))
    files = [link.partition("#")[0] for link in links if not link.startswith(("https://", "#"))]
    assert files
    for file in files:
        assert (path.parent / file).exists(), file


def test_there_are_notebooks() -> None:
    """An empty list of parameters is a green test of nothing."""
    assert NOTEBOOKS and set(FAST) <= {path.stem for path in NOTEBOOKS}


def keep(path: Path) -> None:
    """Run ``path`` and store what it shows, and nothing that changes from run to run."""
    with tempfile.TemporaryDirectory() as folder:
        notebook = executed(path, Path(folder))
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"]}
    for cell in notebook.cells:
        cell.metadata = {"tags": ["live"]} if live(cell) else {}
    nbformat.write(notebook, path)
    print(path.relative_to(ROOT))


if __name__ == "__main__":
    for chosen in NOTEBOOKS:
        if not sys.argv[1:] or any(word in chosen.stem for word in sys.argv[1:]):
            keep(chosen)
