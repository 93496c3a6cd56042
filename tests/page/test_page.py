"""The explorer as a file: one, small, whole, from rows and shapes alone."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from attnlab import page
from attnlab.cli import main
from attnlab.effects import effects
from attnlab.results import PUBLISHED, headline, load_results, newest
from attnlab.shapes import ModelShape


@pytest.fixture(scope="module")
def text() -> str:
    return page.build(load_results())


@pytest.fixture(scope="module")
def facts(text: str) -> dict[str, Any]:
    (found,) = re.findall(r"^const FACTS = (.*);$", text, re.MULTILINE)
    return json.loads(found.replace("<\\/", "</"))


def test_one_small_file_that_asks_for_nothing(text: str) -> None:
    """A page with a stylesheet, a script or a font beside it is broken by the first mail that carries it; and a part
    that was not put in is a comment in its place."""
    assert len(text.encode()) <= 100_000
    assert not re.search(
        r"https?://(?!www\.w3\.org/2000/svg)|<link[^>]+href=\"(?!data:)|<script[^>]+src|@import|url\(", text
    )
    assert not re.search(r"/\* (FACTS|\w+\.(css|js)) \*/", text) and "default-src 'none'" in text


def test_same_rows_same_bytes(text: str) -> None:
    """A page that differs each time it is made cannot be compared with the one in git."""
    assert page.build(load_results()) == text
    assert (Path(page.__file__).parents[2] / "figures" / "explorer.html").read_text(encoding="utf-8") == text


def test_facts_are_those_of_shapes_and_rows(facts: dict[str, Any]) -> None:
    """Typed by hand, a number of the page is another than the figures' by the next run."""
    shape = ModelShape.published("llama-2-70b")
    model = facts["models"]["llama-2-70b"]
    assert {name: getattr(shape, name) for name in model} == model
    rows = load_results()
    own = newest(rows, "decode", headline())
    own = own[(own["impl"] == "auto") & (own["status"] == "ok")]
    points = facts["measured"][headline()]["points"]
    assert len(points) == len(own) and facts["measured"][headline()]["run"] == own["run"].iloc[0]
    for point, row in zip(points, own.to_dict("records"), strict=True):
        assert point[:6] == [
            row["dtype"],
            *(row[f"shape.{n}"] for n in ("n_heads", "n_kv_heads", "head_dim")),
            row["batch"],
            row["context"],
        ]
        assert point[6:] == pytest.approx([row["q25"], row["median"], row["q75"]], rel=1e-3)
    sweep = rows[rows.get("experiment", rows["kind"]) == "g-sweep"]
    found = effects(sweep[sweep["run"] == sweep["run"].max()])
    assert [arm[:3] for arm in facts["quality"]["arms"]] == [[8 // e.n_kv_heads, e.arm, e.seeds] for e in found]
    assert [arm[3] for arm in facts["quality"]["arms"]] == pytest.approx([e.mean for e in found], abs=1e-5)


def test_without_measurements_the_page_still_counts(facts: dict[str, Any]) -> None:
    """Published shapes and datasheets need no rows; a first machine's sweep may not be finished."""
    rows = load_results()
    bare = page.facts(rows[rows["kind"] == "memory"])
    assert bare["measured"] == {} and bare["quality"] is None and bare["models"] == facts["models"]


def test_the_command_writes_it(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Entirely or not at all, and one line where it cannot."""
    with pytest.raises(SystemExit) as ended:
        main(["page", "--out", str(tmp_path / "new" / "explorer.html")])
    assert ended.value.code == 0 and (tmp_path / "new" / "explorer.html").read_text(encoding="utf-8") == text
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as ended:
        main(["page", "--out", str(tmp_path / "file" / "explorer.html")])
    assert ended.value.code == 2 and "cannot write" in capsys.readouterr().err
    assert PUBLISHED.exists()
