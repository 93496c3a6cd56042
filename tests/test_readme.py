"""The README's output is what the published rows say, to the letter. Rewrite it: python tests/test_readme.py"""

import io
import re
from pathlib import Path

import pandas
import pytest
from rich.console import Console

from attnlab import generated, report, trained
from attnlab.results import PUBLISHED, headline, load_results, newest

README = Path(__file__).resolve().parent.parent / "README.md"
BLOCK = re.compile(r"<!-- output: (\w+) -->\n```\n(.*?)```", re.DOTALL)


def shown(*parts):
    """``parts`` as a terminal of 100 columns shows them."""
    console = Console(file=io.StringIO(), width=100)
    for part in parts:
        console.print(part, highlight=False)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()) + "\n"


def findings(rows, machine):
    """What the newest rows of ``machine`` say of cache bytes, decode time and prediction, a sentence each."""
    memory, decode = newest(rows, "memory", machine), report.timed(newest(rows, "decode", machine))
    exact = memory[memory["status"] == "ok"]
    wrong = int((exact["allocated_bytes"] != exact["predicted_bytes"]).sum())
    lines = [f"Memory: {len(exact)} caches allocated and weighed, {wrong} of them off the predicted bytes."]
    context, batch = int(decode["context"].max()), int(decode["batch"].min())
    for dtype in decode["dtype"].unique():
        chosen = decode[(decode["context"] == context) & (decode["batch"] == batch) & (decode["dtype"] == dtype)]
        time = chosen.set_index(["impl", "variant"])["median"]
        auto = time["auto"]
        by_variant = ", ".join(f"{name} {report.milliseconds(seconds)}" for name, seconds in auto.items())
        worst = (time["expanded"] / auto).drop("MHA")
        lines.append(
            f"Decode, {dtype}, context {context}, batch {batch}, one layer: {by_variant}. What most code does "
            f"(expanded) takes {worst.min():.0f} to {worst.max():.0f} times as long wherever heads are shared."
        )
    lines += report.error_lines(pandas.concat([decode, report.timed(newest(rows, "prefill", machine))]))[1:]
    return lines


def generation(rows):
    """Whole models beside transformers: every cell at its longest context, and the sentences on all of them."""
    cells = generated.ratios(rows)
    longest = cells[cells["context"] == cells.groupby("shape.name")["context"].transform("max")]
    return shown(generated.table(longest), *(f"{line[0].upper()}{line[1:]}" for line in generated.summary(cells)))


def memory(rows):
    """The proof of a run's bytes and limits."""
    table, doubts = report.memory_proof(load_results(PUBLISHED / headline() / rows["run"].iloc[0]))
    return shown(table, *doubts)


def outputs():
    """Name of a block -> what it must hold."""
    rows, machine = load_results(PUBLISHED), headline()
    run = newest(rows, "decode", machine)["run"].iloc[0]
    speed = load_results(PUBLISHED / machine / run)
    return {
        "explore": shown(report.explored(speed), *report.error_lines(speed)),
        "findings": shown(*findings(rows, machine)),
        "arms": shown(*report.arms(speed)),
        "generation": generation(newest(rows, "generate", machine)),
        "memory": memory(newest(rows, "peak", machine)),
        "quality": shown(*trained.quality_tables(newest(rows, "quality", machine))),
    }


@pytest.mark.parametrize("name", ["explore", "findings", "arms", "generation", "memory", "quality"])
def test_output_is_what_the_rows_say(name):
    """A number typed by hand, or left over from an older run, is how published tables go wrong."""
    blocks = dict(BLOCK.findall(README.read_text(encoding="utf-8")))
    assert blocks[name] == outputs()[name]


def test_links_and_pictures_exist():
    """A front page that points to a renamed notebook, or to a figure of another machine."""
    targets = re.findall(r"(?:\]\(|src=\"|srcset=\")([^)#:\"]+)[)\"]", README.read_text(encoding="utf-8"))
    assert targets
    assert [target for target in targets if not (README.parent / target).exists()] == []


def test_example_runs():
    """Code on a front page that raises is the first thing a newcomer meets."""
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})


def rewrite():
    """Put the current outputs into the README."""
    new = outputs()
    text = README.read_text(encoding="utf-8")
    README.write_text(BLOCK.sub(lambda m: f"<!-- output: {m[1]} -->\n```\n{new[m[1]]}```", text), encoding="utf-8")


if __name__ == "__main__":
    rewrite()
