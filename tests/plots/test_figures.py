"""Figures, read back: what is drawn is what the rows say, wherever it stands and however often it is drawn."""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import pandas
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.colors import to_rgb
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from attnlab import plots
from attnlab.attention import implementations, peers
from attnlab.errors import InputError
from attnlab.plots import FIGURES, FROM_SHAPES, draw_all, files, style, training
from attnlab.plots.rows import contenders, crossing
from attnlab.predict.memory import decode_peak_bytes, decode_read_bytes, traffic_crossover_tokens
from attnlab.results import DYNAMIC, OURS, STATIC, load_results
from attnlab.shapes import ModelShape, variant_name

ROOT = Path(plots.__file__).parent.parent.parent
H, D, GROUPS, BATCHES, CONTEXTS = 12, 11, (12, 4, 2, 1), (2, 5), (131, 257, 521)
FACTORS = {"reference": 3.1, "expanded": 7.3, "sdpa": 1.9, "grouped": 1.3, "cpp": 1.47, "auto": 1.31}
IMPLS = (OURS, DYNAMIC, STATIC)
MODELS = {"short": (3, 48, 96), "long": (7, 96, 288)}  # layers, dim, ffn
MISTAKES = ("prefill-in-timer", "warm-cache", "float32-label", "expanded-cache", "top-left-mask")
NEW, OLD, TRAINED = "20270203-000000-speed", "20260203-000000-speed", "20270301-000000-quality"
ZEN = {"machine": "zen-2c", "device": "cpu", "processor": "Zen", "torch": "2.13.0", "last_level_cache_bytes": 131072}
HOPPER = {"machine": "hopper", "device": "cuda", "processor": "Hopper GPU", "torch": "2.13.0"}
MEASURED = [name for name, draw in FIGURES.items() if draw not in FROM_SHAPES]
TRAININGS = ("quality", "quality_curves", "scale_vs_variant", "recall", "uptraining", "conversion")


def speed_rows(run: str, machine: dict[str, str], slower: float = 1.0) -> Iterator[dict[str, Any]]:
    points = itertools.product(("float32", "bfloat16"), GROUPS, BATCHES, CONTEXTS, ("decode", "prefill"), FACTORS)
    for number, (dtype, g, batch, context, kind, impl) in enumerate(points):
        element, queries = (4 if dtype == "float32" else 2), (1 if kind == "decode" else context)
        moved, flops = 2 * element * batch * context * g * D, 4 * batch * H * D * context * queries
        predicted = max(moved / 17e9, flops / 97e9) + 3e-6
        median = slower * predicted * FACTORS[impl] * (1 + 0.001 * (number % 89))  # no two rows alike
        yield machine | {
            "schema": 1,
            "run": run,
            "key": f"{run}{number}",
            "kind": kind,
            "status": "ok",
            "shape": {"n_heads": H, "n_kv_heads": g, "head_dim": D},
            "variant": variant_name(H, g),
            "batch": batch,
            "context": context,
            "dtype": dtype,
            "impl": impl,
            "bytes": moved,
            "flops": flops,
            "median": median,
            "q25": 0.93 * median,
            "q75": 1.17 * median,
            "predicted": predicted,
            "read_bandwidth": 17e9,
            "matmul_rate": 97e9,
            "binding_roof": min(17e9, 97e9 / 2 / (2 * H / g / element)),
            "fraction_of_roof": max(moved / 17e9, flops / 97e9) / median,
        }


def model_rows(machine: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Whole models; MHA of the larger batches does not fit at the longer context."""
    sizes = itertools.product(MODELS, ("float32", "bfloat16"), GROUPS, (1, 3, 17), (128, 2048), IMPLS)
    for number, (model, dtype, g, batch, context, impl) in enumerate(sizes):
        layers, dim, ffn = MODELS[model]
        shape = ModelShape(layers, dim, H, g, D, ffn, 101, tied_embeddings=True)
        predicted = decode_read_bytes(shape, batch, context, dtype) / 17e9 + 3e-6
        median = predicted * (1.3 + 0.9 * IMPLS.index(impl)) * (1 + 0.001 * (number % 89))
        fits = g < H or batch * context < 3 * 2048
        times = {"median": median, "q25": 0.93 * median, "q75": 1.17 * median, "predicted": predicted}
        names = ("n_layers", "dim", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "vocab_size")
        yield machine | {
            "schema": 1,
            "run": NEW,
            "key": f"m{number}",
            "kind": "generate",
            "status": "ok" if fits else "too_big",
            "impl": impl,
            "shape": {"name": model, **{name: getattr(shape, name) for name in names}},
            "batch": batch,
            "context": context,
            "dtype": dtype,
            **(times | {"tokens_per_second": batch / median} if fits else {}),
        }


def mistake_rows(machine: dict[str, str]) -> Iterator[dict[str, Any]]:
    for number, (name, g, way) in enumerate(itertools.product(MISTAKES, GROUPS[::-1], ("wrong", "right"))):
        heads = g if way == "right" else H
        median = (1 + heads) * 1e-4 * (1 + 0.01 * number)
        yield machine | {
            "schema": 1,
            "run": NEW,
            "key": f"w{number}",
            "kind": "mistake",
            "status": "ok",
            "name": name,
            "impl": way,
            "shape": {"n_heads": H, "n_kv_heads": g, "head_dim": D},
            "variant": variant_name(H, g),
            "batch": 5,
            "context": 2048,
            "dtype": "bfloat16" if name == "float32-label" else "float32",
            "bytes": heads * 2**20,
            "read_bandwidth": 17e9,
            "error": 0.25 * g if way == "wrong" else 1e-7,
            "median": median,
            "q25": 0.93 * median,
            "q75": 1.17 * median,
        }


def flow_rows(machine: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Two tensors of one step, of which only K knows G."""
    for (number, (name, of)), g in itertools.product(enumerate((("q", lambda g: H), ("K", lambda g: 31 * g))), GROUPS):
        yield machine | {
            "schema": 1,
            "run": NEW,
            "key": f"f{number}{g}",
            "kind": "flow",
            "status": "ok",
            "shape": {"n_heads": H, "n_kv_heads": g, "head_dim": D, "dim": 101},
            "variant": variant_name(H, g),
            "batch": 1,
            "context": 31,
            "dtype": "float32",
            "order": number,
            "tensor": name,
            "dims": [1, of(g), D],
            "bytes": 4 * of(g) * D,
        }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, trained: list[dict[str, Any]]) -> Path:
    """Runs of two machines: an old and a new one of zen-2c, which also trained; one of hopper, without training."""
    rows = [
        *speed_rows(NEW, ZEN),
        *model_rows(ZEN),
        *mistake_rows(ZEN),
        *flow_rows(ZEN),
        *speed_rows(OLD, ZEN, slower=1000),
    ]
    rows += [*trained, *speed_rows(NEW, HOPPER)]
    for row in rows:
        if row["impl" if "impl" in row else "kind"] == "sdpa" and row["context"] == 257 and row["run"] == NEW:
            row |= {"status": "implausible", "median": 1e-9, "q25": 1e-9, "q75": 1e-9, "reason": "too fast"}
    folder = tmp_path_factory.mktemp("rows")
    for (machine, run), some in itertools.groupby(rows, key=lambda row: (row["machine"], row["run"])):
        path = folder / machine / run / "rows.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in some))
    return folder


@pytest.fixture(scope="module")
def rows(folder: Path) -> pandas.DataFrame:
    return load_results(folder)


@dataclass
class Drawn:
    """What one ``draw_all`` of zen-2c wrote: figures by name, and each figure's letters with where they stand."""

    out: Path
    files: list[Path] = field(default_factory=list)
    figures: dict[str, Figure] = field(default_factory=dict)
    letters: dict[str, list[tuple[Text, Bbox]]] = field(default_factory=dict)


@pytest.fixture(scope="module")
def drawn(rows: pandas.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    result, draw = Drawn(tmp_path_factory.mktemp("figures")), Text.draw
    letters: dict[Text, Bbox] = {}

    def recorded(text: Text, renderer: Any) -> None:
        if text.get_text() and isinstance(renderer, RendererAgg):
            letters[text] = Text.get_window_extent(text, renderer)
        draw(text, renderer)

    def kept(figure: Figure, stem: Path, words: str, kind: str) -> list[Path]:
        letters.clear()
        written = files.save(figure, stem, words, kind)
        name = stem.name.split(".")[0]
        result.figures[name], result.letters[name] = (
            figure,
            [*filter(lambda each: each[0].get_visible(), letters.items())],
        )
        return written

    with pytest.MonkeyPatch.context() as during:
        during.setattr(Text, "draw", recorded)
        during.setattr(plots, "save", kept)
        result.files = draw_all(rows, result.out, machine="zen-2c")
    return result


def lines(axes: Axes) -> dict[str, tuple[list[float], list[float]]]:
    """Label -> x, y of every line and every error bar's middle."""
    found = {line.get_label(): line for line in axes.get_lines()}
    found |= {bars.get_label(): bars.lines[0] for bars in axes.containers if isinstance(bars, ErrorbarContainer)}
    return {
        label: (numpy.asarray(line.get_xdata()).tolist(), numpy.asarray(line.get_ydata()).tolist())
        for label, line in found.items()
    }


def panel(figure: Figure, title: str) -> Axes:
    return next(axes for axes in figure.axes if axes.get_title(loc="left") == title)


def chosen(rows: pandas.DataFrame, **values: Any) -> pandas.DataFrame:
    """Rows of the new run of zen-2c that ended well, by column; ``g`` for the KV heads."""
    mine = rows[(rows["machine"] == "zen-2c") & (rows["run"] == NEW) & (rows["status"] == "ok")]
    for column, value in values.items():
        mine = mine[mine["shape.n_kv_heads" if column == "g" else column] == value]
    return mine


def milliseconds(column: pandas.Series) -> Any:
    return pytest.approx([1e3 * value for value in column], rel=1e-12)


# --- files ----------------------------------------------------------------------------------------------------------


def test_every_figure_is_two_files_and_names_its_machine(drawn: Drawn) -> None:
    """A figure of one machine overwrote another's where the name did not say which."""
    stems = [name + (".zen-2c" if name in MEASURED else "") for name in FIGURES]
    kinds = {
        stem: ["svg", *(["gif"] if stem == "cache_growth" else []), "png", "dark.svg", "dark.png"] for stem in stems
    }
    expected = [f"{stem}.{kind}" for stem in stems for kind in kinds[stem]]
    assert [path.name for path in drawn.files] == [*expected, "index.html"]
    assert all(0 < path.stat().st_size < 300_000 for path in drawn.files)
    assert all((draw.__doc__ or "").endswith(".") for draw in FIGURES.values())  # a gallery's captions


def test_same_rows_same_bytes(folder: Path, drawn: Drawn) -> None:
    """Dates, versions, ids, hash order or a user's matplotlib settings in the files would make every redraw a change.
    Drawn again by another process with other settings; which also finds that figures come without torch."""
    again = [
        "head_map",
        "cache_growth",
        "decode_batch",
        "roofline",
        "quality",
        "tradeoff",
    ]  # every kind of mark; `make drift` does all
    again += ["fraction_of_roof", "generation", "five_ways_it_goes_wrong", "conversion", "uptraining"]
    code = f"""
import sys, matplotlib
matplotlib.rcParams.update({{"font.size": 31, "axes.facecolor": "black", "svg.fonttype": "none", "lines.linewidth": 9}})
from pathlib import Path
from attnlab.plots import draw_all
from attnlab.results import load_results
draw_all(load_results({str(folder)!r}), Path({str(drawn.out / "again")!r}), {again!r}, machine="zen-2c")
assert not {{"torch", "matplotlib.pyplot"}} & set(sys.modules)
"""
    environment = os.environ | {"PYTHONHASHSEED": "17", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=ROOT, env=environment)
    redrawn = list((drawn.out / "again").iterdir())
    assert len(redrawn) == 4 * len(again) + 1  # what moves has a GIF too
    for path in redrawn:
        content = path.read_bytes()
        assert content == (drawn.out / path.name).read_bytes(), path.name
        assert b"atplotlib v" not in content and b"dc:date" not in content
    # The layout's last digits differ between processes, seldom enough to pass the comparison: they must be rounded off.
    places = [
        10**4 * part
        for figure in drawn.figures.values()
        for axes in figure.axes
        for part in axes.get_position(True).bounds
    ]
    assert all(abs(place - round(place)) < 1e-6 for place in places)


def test_letters_are_inside_and_apart(drawn: Drawn) -> None:
    """Clipped or overlapping labels are the commonest fault of generated charts, and nobody looks at all of them."""
    for name, figure in drawn.figures.items():
        size = [style.DPI * inches for inches in figure.get_size_inches()]
        letters = drawn.letters[name]
        assert len(letters) > 12, name
        for text, box in letters:
            assert 0 <= box.x0 < box.x1 <= size[0] and 0 <= box.y0 < box.y1 <= size[1], (name, text.get_text())
        level = [(text, box) for text, box in letters if text.get_rotation() in (0, 90)]
        for (one, a), (other, b) in itertools.combinations(level, 2):
            across, up = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
            assert min(across, up) < 1.5, (name, one.get_text(), other.get_text())


@pytest.mark.parametrize("name", MEASURED)
def test_the_footer_says_what_drew_it(drawn: Drawn, rows: pandas.DataFrame, name: str) -> None:
    """A CPU's figure passed on without saying so is read as a GPU's."""
    words = " ".join(text.get_text() for text in drawn.figures[name].texts).replace("\n", " ")
    assert "CPU: Zen (zen-2c)" in words and "GPU" not in words
    assert "float32" in words
    assert (TRAINED if name in TRAININGS else NEW) in words and OLD not in words
    if name not in (*TRAININGS, "tradeoff", "attention_flow"):
        assert "bfloat16, float32" in words
    if name == "decode_groups":
        words = " ".join(text.get_text() for text in FIGURES[name](rows, "hopper").texts)
        assert "GPU: Hopper GPU (hopper)" in words and "CPU" not in words


def test_a_figure_from_shapes_says_so(drawn: Drawn) -> None:
    """A computed curve must not be taken for a measurement."""
    for name in sorted(set(FIGURES) - set(MEASURED)):
        words = " ".join(text.get_text() for text in drawn.figures[name].texts)
        assert "o measurement" in words and ("bfloat16" in words or name in ("published_quality", "rope_pairs"))


# --- what is not there ----------------------------------------------------------------------------------------------


def test_absent_rows_are_said_and_not_drawn_empty(rows: pandas.DataFrame, tmp_path: Path) -> None:
    """An empty chart looks like a result."""
    said: list[str] = []
    assert draw_all(None, tmp_path, only=["decode_groups", "quality"], say=said.append) == []
    assert draw_all(rows[rows["status"] == "oom"], tmp_path, only="quality", say=said.append) == []
    assert draw_all(rows, tmp_path, only="quality", machine="hopper", say=said.append) == []
    one_batch = rows[rows["batch"] == 2]
    assert draw_all(one_batch, tmp_path, only="decode_batch", machine="hopper", say=said.append) == []
    assert draw_all(rows[rows["kind"] == "quality"], tmp_path, only="tradeoff", say=said.append) == []
    assert said == [
        "decode_groups is not drawn: there are no rows",
        "quality is not drawn: there are no rows",
        "quality is not drawn: there are no rows",
        "quality.hopper is not drawn: no g-sweep rows of hopper are finished; let their sweep go on",
        "decode_batch.hopper is not drawn: decode rows of hopper have one batch B (sequences) only, a curve needs two",
        "tradeoff.zen-2c is not drawn: no decode rows of zen-2c ended well",
    ]
    assert list(tmp_path.iterdir()) == []


def test_unknown_names_and_unwritable_folders_are_refused(rows: pandas.DataFrame, tmp_path: Path) -> None:
    """A misspelled --only used to draw nothing and succeed."""
    with pytest.raises(InputError, match="unknown figure 'decode_group'; did you mean decode_groups"):
        draw_all(rows, tmp_path, only="decode_group")
    with pytest.raises(InputError, match="unknown machine 'zen'"):
        draw_all(rows, tmp_path, machine="zen")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        draw_all(rows, tmp_path / "file", only="capacity")


def test_what_did_not_end_well_is_not_drawn(drawn: Drawn) -> None:
    """The times of implausible rows, one nanosecond here, are the first thing a reader would quote."""
    assert "sdpa" not in lines(panel(drawn.figures["decode_groups"], "float32, context 257"))
    assert "sdpa" in lines(panel(drawn.figures["decode_groups"], "float32, context 131"))
    for name in ("decode_groups", "decode_context", "decode_batch", "prediction", "generation", "time_per_group"):
        for axes in drawn.figures[name].axes:
            assert not any(value <= 1e-4 for _, y in lines(axes).values() for value in y)


# --- numbers, read back ---------------------------------------------------------------------------------------------


def test_a_head_map_connects_each_query_head_to_its_own_kv_head(drawn: Drawn) -> None:
    """Drawing tiled heads (h mod G) for contiguous groups (h // R) is the mistake the figure is there to prevent."""
    drawings = drawn.figures["head_map"].axes[0].get_lines()
    assert len(drawings) == 4 * 8
    for number, line in enumerate(drawings):
        g, h = (8, 4, 2, 1)[number // 8], number % 8
        mates = [other for other in range(8) if other // (8 // g) == h // (8 // g)]
        assert list(line.get_xdata()) == [h, sum(mates) / len(mates)]


def test_cache_and_cards_are_in_gib_and_gb_by_their_right_names(drawn: Drawn) -> None:
    """141 GB drawn at 141 GiB promises ten gibibytes that are not there."""
    small, large = drawn.figures["kv_memory"].axes
    assert small.get_ylabel() == "KV cache (GiB)"
    words = {text.get_text() for text in small.texts}
    assert {"RTX 4090: 24 GiB", "A100, H100: 80 GiB", "H200: 131 GiB (141 GB)", "weights 15 GiB"} <= words
    levels = sorted(y[0] for label, (x, y) in lines(small).items() if x == [0, 1])
    assert levels == pytest.approx([8_030_261_248 * 2 / 2**30, 24, 80, 141e9 / 2**30])
    assert lines(small)["GQA-8"][1][-1] == 128 and lines(small)["MHA"][1][-1] == 512  # KiB a token x 2^20 tokens
    assert lines(large)["GQA-8"][1][-1] == 320 and lines(large)["MQA"][0][-1] == 2**20


def test_capacity_is_the_last_batch_that_fits(drawn: Drawn) -> None:
    """One sequence more than fits is an out-of-memory in the reader's hands."""
    shape, card = ModelShape.published("llama-3-8b"), 80 * 2**30
    (axes,) = drawn.figures["capacity"].axes
    for variant, g in (("MHA", 32), ("GQA-8", 8), ("MQA", 1)):
        grouped = shape.with_kv_heads(g)
        for context, batch in list(zip(*lines(axes)[variant], strict=True))[-64:]:
            assert decode_peak_bytes(grouped, batch, context).total <= card
            assert decode_peak_bytes(grouped, batch, context + 1).total > card
        context, batch = (values[0] for values in lines(axes)[f"{variant}, marked"])
        assert context == 8192
        assert decode_peak_bytes(grouped, batch, 8192).total <= card < decode_peak_bytes(grouped, batch + 1, 8192).total


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decode_groups_draws_the_newest_rows(drawn: Drawn, rows: pandas.DataFrame, dtype: str) -> None:
    """A chart drawn from a stale run, or joined in another order than its x axis, looks as good as a right one."""
    for context in CONTEXTS:
        axes = panel(drawn.figures["decode_groups"], f"{dtype}, context {context}")
        seen = lines(axes)
        for impl in sorted(set(FACTORS) - ({"sdpa"} if context == 257 else set())):
            arm = chosen(rows, kind="decode", dtype=dtype, context=context, batch=2, impl=impl).sort_values(
                "shape.n_kv_heads"
            )
            assert seen[impl][0] == [1, 2, 4, 12]
            assert seen[impl][1] == milliseconds(arm["median"])
            if impl in ("grouped", "expanded"):
                assert seen[f"{impl}, predicted"][1] == milliseconds(arm["predicted"])
            if impl != "auto":
                bars = next(bars for bars in axes.containers if bars.get_label() == impl)
                ends = [(low[1], high[1]) for low, high in bars.lines[2][0].get_segments()]
                assert [low for low, _ in ends] == milliseconds(arm["q25"])
                assert [high for _, high in ends] == milliseconds(arm["q75"])


@pytest.mark.parametrize(
    ("name", "x", "fixed"), [("decode_context", "context", "batch"), ("decode_batch", "batch", "context")]
)
def test_curves_of_variants_are_the_rows(drawn: Drawn, rows: pandas.DataFrame, name: str, x: str, fixed: str) -> None:
    """Rows of another batch or context in a line make a curve that no machine has."""
    for dtype, value in itertools.product(("float32", "bfloat16"), (2, 5) if fixed == "batch" else (131, 521)):
        seen = lines(panel(drawn.figures[name], f"{dtype}, {fixed} {value}"))
        for g in GROUPS:
            mine = chosen(rows, kind="decode", dtype=dtype, g=g, **{fixed: value}).sort_values(x)
            auto, usual = mine[mine["impl"] == "auto"], mine[mine["impl"] == "expanded"]
            variant = variant_name(H, g)
            assert seen[variant] == (list(auto[x]), milliseconds(auto["median"]))
            assert seen[f"{variant}, predicted"][1] == milliseconds(auto["predicted"])
            if g < H:
                assert seen[f"{variant}, expanded"][1] == milliseconds(usual["median"])
            else:
                assert f"{variant}, expanded" not in seen  # nothing to expand


def test_unsteady_points_are_hollow_and_said(rows: pandas.DataFrame) -> None:
    """Drawn like any other, the point of a throttled minute is a kink that somebody explains; without such a point the
    figure speaks of none, and no byte of it changes."""
    of = chosen(rows, kind="decode", dtype="float32", context=131, batch=2, g=4)
    marked = rows.assign(unsteady=rows.index.isin(of[of["impl"].isin(["auto", "grouped"])].index))
    steady = rows.assign(unsteady=False)
    for name, title, impl in (
        ("decode_groups", "float32, context 131", "grouped"),
        ("decode_context", "float32, batch 2", "auto"),
    ):
        time = of[of["impl"] == impl]["median"].iloc[0] * 1e3
        for table, expected in ((marked, [time]), (steady, []), (rows, [])):
            figure = FIGURES[name](table, "zen-2c")
            found = {
                axes.get_title(loc="left"): [
                    pytest.approx(line.get_ydata()[0], rel=1e-12)
                    for line in axes.get_lines()
                    if line.get_markerfacecolor() == style.PAPER
                ]
                for axes in figure.axes
            }
            assert found.pop(title) == expected and not any(found.values())
            said = any("Hollow: unsteady" in text.get_text().replace("\n", " ") for text in figure.texts)
            assert said == bool(expected)
    only = rows.assign(unsteady=rows["impl"] == "reference")  # which that figure does not draw
    assert not any("Hollow" in text.get_text() for text in FIGURES["decode_context"](only, "zen-2c").texts)


def test_speedup_divides_by_expanded_of_the_same_point(drawn: Drawn, rows: pandas.DataFrame) -> None:
    """Expanded of another G or context below the line gives factors that no reader can reach. (No sdpa at 257.)"""
    for dtype, context in itertools.product(("float32", "bfloat16"), CONTEXTS):
        seen = lines(panel(drawn.figures["speedup_over_expanded"], f"{dtype}, context {context}"))
        assert "expanded" not in seen and "reference" not in seen and ("sdpa" in seen) == (context != 257)
        point = {"kind": "decode", "dtype": dtype, "context": context, "batch": 2}
        usual, ours = (chosen(rows, impl=impl, **point).sort_values("shape.n_kv_heads") for impl in ("expanded", "cpp"))
        ratios = [a / b for a, b in zip(usual["median"], ours["median"], strict=True)]
        assert seen["cpp"] == ([1, 2, 4, 12], pytest.approx(ratios))
    without = rows[rows["impl"] != "expanded"]
    with pytest.raises(InputError, match="hold no expanded to compare with"):
        FIGURES["speedup_over_expanded"](without, "zen-2c")


def test_of_many_implementations_the_fastest_are_drawn(rows: pandas.DataFrame) -> None:
    """Thirteen lines in a panel are none; which are left out must not depend on the alphabet, and is said."""
    slower = {"flash": 1.02, "cudnn": 1.5, "xformers": 4, "flashinfer": 1.01, "flex_tuned": 5, "triton": 1.7}
    grouped = rows[(rows["impl"] == "grouped") & (rows["kind"] == "decode")]
    times = ["median", "q25", "q75"]
    arms = [grouped.assign(impl=name, **factor * grouped[times]) for name, factor in slower.items()]
    many = pandas.concat([rows, *arms])
    decode = many[(many["kind"] == "decode") & (many["status"] == "ok") & (many["run"] == NEW)]
    assert set(contenders(decode)) == {"grouped", "expanded", "flash", "flashinfer", "cpp", "cudnn", "sdpa"}
    assert set(contenders(decode[decode["impl"].isin(FACTORS)])) == set(FACTORS) - {"auto"}
    figure = FIGURES["decode_groups"](many, "zen-2c")
    seen = lines(panel(figure, "float32, context 131"))
    assert {"flash", "cudnn", "cpp"} < set(seen) and not {"triton", "xformers", "reference"} & set(seen)
    words = " ".join(text.get_text() for text in figure.texts).replace("\n", " ")
    assert "in fraction_of_roof only: flex_tuned, reference, triton, xformers." in words
    roof = FIGURES["fraction_of_roof"](many, "zen-2c").axes[0]
    assert {"flex_tuned", "triton", "xformers", "cpp"} < {label.get_text() for label in roof.get_yticklabels()}


def test_bars_across_stand_where_the_cache_would_be_full(drawn: Drawn) -> None:
    """Who measures with warm caches must see which of the points would have come from them: 128 KiB here, and a token
    takes 2 G D elements of each sequence."""
    for dtype, batch in itertools.product(("float32", "bfloat16"), BATCHES):
        axes = panel(drawn.figures["decode_context"], f"{dtype}, batch {batch}")
        full = [131072 / (2 * g * D * batch * (4 if dtype == "float32" else 2)) for g in GROUPS]
        seen = [line.get_xdata()[0] for line in axes.get_lines() if line.get_label() == "fits"]
        inside = [place for place in full if CONTEXTS[0] < place < CONTEXTS[-1]]
        assert [place for place in seen if not numpy.isnan(place)] == pytest.approx(inside) and len(seen) == len(full)


def test_fraction_of_roof_holds_every_implementation_at_every_g(drawn: Drawn, rows: pandas.DataFrame) -> None:
    """Shares read off a neighbour's square, or only those of the fastest, are the usual way to look good."""
    for axes, (context, dtype) in zip(
        drawn.figures["fraction_of_roof"].axes, itertools.product((131, 521), ("float32", "bfloat16")), strict=True
    ):
        assert axes.get_title(loc="left") == f"{dtype}, context {context}"
        groups = [int(label.get_text()) for label in drawn.figures["fraction_of_roof"].axes[-1].get_xticklabels()]
        names = [label.get_text() for label in drawn.figures["fraction_of_roof"].axes[-2].get_yticklabels()]
        assert groups == list(GROUPS) and set(names) == {*FACTORS, "can be asked"} - {"auto"}
        squares = {text.get_position(): text.get_text() for text in axes.texts}
        for (y, name), (x, g) in itertools.product(enumerate(names), enumerate(groups)):
            element = 4 if dtype == "float32" else 2
            if name == "can be asked":
                moved, flops = 2 * element * 5 * context * g * D, 4 * 5 * H * D * context
                share = max(moved / 17e9, flops / 97e9) / max(moved / 17e9, 2 * flops / 97e9)
            else:
                (share,) = chosen(rows, kind="decode", impl=name, dtype=dtype, context=context, batch=5, g=g)[
                    "fraction_of_roof"
                ]
            assert squares[x + 0.5, y + 0.5] == f"{100 * share:.0f}"
    lacking = rows[(rows["impl"] != "sdpa") | (rows["shape.n_kv_heads"] != 4)].drop(columns="binding_roof")
    figure = FIGURES["fraction_of_roof"](lacking, "zen-2c")
    assert [text.get_text() for text in figure.axes[0].texts].count("–") == 1
    assert not any("can be asked" in text.get_text() for text in figure.texts)


# --- whole models ---------------------------------------------------------------------------------------------------


def whole(rows: pandas.DataFrame, **values: Any) -> pandas.DataFrame:
    return chosen(rows, kind="generate", **{"shape.name" if name == "model" else name: v for name, v in values.items()})


def test_generation_ends_where_memory_ends(drawn: Drawn, rows: pandas.DataFrame) -> None:
    """A line that just stops looks as if nobody had measured further: the end of memory is the result."""
    for dtype, context in itertools.product(("float32", "bfloat16"), (128, 2048)):
        seen = lines(panel(drawn.figures["generation"], f"{dtype}, context {style.tokens(context)}"))
        for g in GROUPS:
            variant, point = variant_name(H, g), {"model": "long", "dtype": dtype, "context": context, "g": g}
            mine = whole(rows, impl=OURS, **point).sort_values("batch")
            batches, rates = seen[variant]
            assert batches == ([1] if (g, context) == (H, 2048) else [1, 3, 17])
            assert rates == pytest.approx(list(mine["tokens_per_second"]))
            assert seen[f"{variant}, predicted"][1] == pytest.approx(list(mine["batch"] / mine["predicted"]))
            theirs = whole(rows, impl=DYNAMIC, **point).sort_values("batch")
            assert seen[f"{variant}, transformers"][1] == pytest.approx(list(theirs["tokens_per_second"]))
            crosses = seen.get(f"{variant}, out of memory")
            assert crosses == (([3], [rates[-1]]) if (g, context) == (H, 2048) else None)


def test_rings_stand_where_cache_traffic_overtakes_weights(drawn: Drawn, rows: pandas.DataFrame) -> None:
    """Left of it sharing heads cannot pay, whatever the kernel: a ring in the wrong place sends people to tune it."""
    layers, dim, ffn = MODELS["long"]
    for context in (128, 2048):
        axes = panel(drawn.figures["generation"], f"bfloat16, context {style.tokens(context)}")
        rings = [line.get_xdata()[0] for line in axes.get_lines() if line.get_label() == "more cache than weights"]
        expected = []
        for g in GROUPS:
            weights = layers * (2 * H * D * dim + 2 * g * D * dim + 3 * dim * ffn + 2 * dim) + dim + 101 * dim
            expected.append(weights / (2 * layers * g * D) / context)
        inside = [place for place in expected if 1 < place < 17]
        assert sorted(rings) == pytest.approx(sorted(inside), rel=1e-6)
        assert inside
    long = whole(rows, model="long", impl=OURS, dtype="bfloat16", batch=1).set_index(["context", "shape.n_kv_heads"])
    axes = panel(drawn.figures["time_per_group"], "bfloat16, long, batch 1")
    rings = [line for line in axes.get_lines() if line.get_label() == "more cache than weights"]
    for context, line in zip((128, 2048), rings, strict=True):
        shape = {g: ModelShape(layers, dim, H, g, D, ffn, 101) for g in GROUPS}
        more = [g for g in GROUPS if context > traffic_crossover_tokens(shape[g])]
        assert list(line.get_xdata()) == pytest.approx([g / H for g in more])
        assert list(line.get_ydata()) == pytest.approx(
            [100 * long["median"][context, g] / long["median"][context, H] for g in more]
        )


def test_time_per_group_is_of_mha_of_the_same_model(drawn: Drawn, rows: pandas.DataFrame) -> None:
    """Divided by another context's MHA, every curve starts elsewhere than at 100 %; and the paper's points are its
    table's."""
    for dtype in ("float32", "bfloat16"):
        seen = lines(panel(drawn.figures["time_per_group"], f"{dtype}, long, batch 1"))
        for context in (128, 2048):
            times = whole(rows, model="long", impl=OURS, dtype=dtype, batch=1, context=context)
            times = times.sort_values("shape.n_kv_heads", ascending=False)["median"]
            parts, shares = seen[f"context {context}"]
            assert parts == [g / H for g in GROUPS] and shares == pytest.approx(list(100 * times / times.iloc[0]))
        assert seen["GQA paper"] == ([1, 1 / 8, 1 / 64], pytest.approx([100, 18.54, 15.89], abs=0.01))
    words = {text.get_text() for axes in drawn.figures["time_per_group"].axes for text in axes.texts}
    whole_time = whole(rows, model="long", impl=OURS, dtype="float32", batch=1, context=2048, g=H)["median"].iloc[0]
    assert f"2k: {1e3 * whole_time:.3g} ms" in words


@pytest.mark.parametrize("name", ["generation", "time_per_group", "five_ways_it_goes_wrong"])
def test_whole_models_and_mistakes_need_their_rows(rows: pandas.DataFrame, name: str, tmp_path: Path) -> None:
    """Each of them left out with a reason, and not a traceback that takes the other figures along."""
    said: list[str] = []
    bare = rows[rows["kind"].isin(["decode", "quality"])].drop(columns="name")
    poor = rows[(rows["batch"] != 3) & (rows["batch"] != 17) & (rows["shape.n_kv_heads"] != H)]
    poor = poor[poor.get("name") != "warm-cache"]
    for table in (bare, poor):
        assert draw_all(table, tmp_path, only=name, machine="zen-2c", say=said.append) == []
    start = f"{name}.zen-2c is not drawn: "
    assert (
        said
        == {
            "generation": [
                f"{start}no generate rows of zen-2c ended well",
                f"{start}generate rows of zen-2c have one batch only, a curve needs two",
            ],
            "time_per_group": [
                f"{start}no generate rows of zen-2c ended well",
                f"{start}generate rows of zen-2c have no two G with MHA among them, a curve needs two",
            ],
            "five_ways_it_goes_wrong": [
                f"{start}rows of zen-2c lack {', '.join(MISTAKES)}; measure: pytest bench/test_mistakes.py",
                f"{start}rows of zen-2c lack warm-cache; measure: pytest bench/test_mistakes.py",
            ],
        }[name]
    )


# --- mistakes -------------------------------------------------------------------------------------------------------


def test_each_mistake_stands_beside_what_is_right(drawn: Drawn, rows: pandas.DataFrame) -> None:
    """Right and wrong swapped, or one panel's rows under another's title, would teach the mistake."""
    *panels, summary = drawn.figures["five_ways_it_goes_wrong"].axes
    claimed = lines(summary)
    titles = ("Prefill", "Warm", "float32", "Expanded", "Mask")
    for number, (name, title, axes) in enumerate(zip(MISTAKES, titles, panels, strict=True), 1):
        assert any(text.get_text().startswith(f"{number}  {title}") for text in axes.texts)
        assert [label.get_text() for label in axes.get_xticklabels()] == ["MHA", "GQA-4", "GQA-2", "MQA"]
        for way in ("right", "wrong"):
            mine = chosen(rows, kind="mistake", name=name, impl=way).sort_values("shape.n_kv_heads", ascending=False)
            values = mine["bytes"] / 2**20 if name == "expanded-cache" else 1e3 * mine["median"]
            assert lines(axes)[way][1] == pytest.approx(list(values))
            gain = values.iloc[0] / values.iloc[-1]
            assert f"{gain:.3g}×" in [text.get_text() for text in axes.texts]
            assert claimed[f"{number}, {way}"] == ([pytest.approx(gain)], [-number])
    assert "output off by 25 % or more" in panels[4].get_xlabel()
    least = [1e3 * g * 2**20 / 17e9 for g in GROUPS]
    assert lines(panels[1])["memory read once"][1] == pytest.approx(least)


def test_a_crossing_lies_between_its_points() -> None:
    """Straight on logarithmic axes, and nowhere outside of what was measured."""
    assert crossing([2, 8], [3, 48], 4) == pytest.approx(12)
    assert numpy.isnan(crossing([2, 8], [3, 48], 1.9)) and numpy.isnan(crossing([2, 8], [3, 48], 9))


def test_inks_of_implementations_and_methods_are_apart_for_colour_blind_eyes() -> None:
    """Two of a dozen lines in one grey, to one man in twelve. (Viénot's simulation, distances in CIELAB.)"""
    dichromats = {
        "nobody": numpy.eye(3),
        "protan": numpy.array([[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]]),
        "deutan": numpy.array([[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]]),
    }
    to_xyz = numpy.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])

    def linear(colour: str) -> Any:
        part = numpy.array(to_rgb(colour))
        return numpy.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)

    def lab(light: Any) -> Any:
        x, y, z = numpy.cbrt(numpy.maximum(to_xyz @ light / to_xyz.sum(1), 0.008856))
        return numpy.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])

    assert set(style.IMPLEMENTATIONS) == {*implementations(), *peers()}
    arms = {name: colour for name, (colour, _) in style.IMPLEMENTATIONS.items() if name != "triton"}  # cpp's twin
    methods = {name: colour for name, (colour, _) in training._METHODS.items()} | {"MHA": style.variant_colour("MHA")}
    paper = to_xyz[1] @ linear(style.PAPER) + 0.05
    for inks in (arms, methods):
        for name, colour in inks.items():
            assert paper / (to_xyz[1] @ linear(colour) + 0.05) > 2.2, name
        for eyes, matrix in dichromats.items():
            seen = {name: lab(numpy.clip(matrix @ linear(colour), 0, 1)) for name, colour in inks.items()}
            for one, other in itertools.combinations(inks, 2):
                assert numpy.linalg.norm(seen[one] - seen[other]) > 10, (eyes, one, other)


def test_roofline_marks_each_variants_fastest(drawn: Drawn, rows: pandas.DataFrame) -> None:
    """auto hides which implementation won, and a slower arm named as the best undersells the machine."""
    for axes, dtype in zip(drawn.figures["roofline"].axes, ("float32", "bfloat16"), strict=True):
        x, y = lines(axes)["roof"]
        assert y[1:] == [97, 97] and y[0] / x[0] == pytest.approx(17) and x[1] == pytest.approx(97 / 17)
        names = " ".join(text.get_text() for text in axes.texts)
        for g in GROUPS:
            arms = chosen(rows, kind="decode", dtype=dtype, g=g, batch=5, context=521)
            best = arms[arms["impl"] == "grouped"].iloc[0]
            (intensity,), (rate,) = lines(axes)[variant_name(H, g)]
            assert intensity == pytest.approx(H / g * (1 if dtype == "bfloat16" else 0.5))
            assert rate == pytest.approx(best["flops"] / best["median"] / 1e9)
            assert f"{variant_name(H, g)}, grouped: {100 * best['fraction_of_roof']:.0f} %" in names


def test_prediction_counts_every_point_of_auto(drawn: Drawn, rows: pandas.DataFrame) -> None:
    """An error quoted over a chosen subset, or over the prediction in place of the measurement, flatters."""
    (axes,) = drawn.figures["prediction"].axes
    for kind in ("decode", "prefill"):
        mine = chosen(rows, kind=kind, impl="auto")
        drawings = [line for label, line in lines(axes).items() if label.startswith(kind)]
        seen = sorted(point for line in drawings for point in zip(*line, strict=True))
        assert seen == sorted(zip((1e3 * mine["median"]).tolist(), (1e3 * mine["predicted"]).tolist(), strict=True))
        errors = sorted((mine["predicted"] / mine["median"] - 1).abs())
        assert len(errors) == 48
        median, most = 50 * (errors[23] + errors[24]), 100 * (errors[42] + 0.3 * (errors[43] - errors[42]))
        said = f"{kind}, 48 points: median error {median:.0f} %, 90th percentile {most:.0f} %"
        assert said in axes.get_title(loc="left")


def test_tradeoff_shares_r_and_not_g(drawn: Drawn, rows: pandas.DataFrame) -> None:
    """GQA-4 of 12 heads shares 3 to 1, GQA-2 of 6 heads too: lined up by G, time and loss of different things meet."""
    cache, time, loss = drawn.figures["tradeoff"].axes
    assert [text.get_text() for text in cache.get_yticklabels()] == ["R = 1", "R = 3", "R = 6", "R = 12"]
    stored = [bar.get_width() for bars in cache.containers for bar in bars]
    assert stored == pytest.approx([100, 100 / 3, 100 / 6, 100 / 12])
    mine = chosen(rows, kind="decode", impl="auto", context=521, batch=2)
    # the dtype whose MHA is nearest its roof: on a CPU with a slow bfloat16 path that path is not what sharing gains
    whole = mine[mine["shape.n_kv_heads"] == mine["shape.n_heads"]].sort_values("fraction_of_roof")
    mine = mine[mine["dtype"] == whole["dtype"].iloc[-1]]
    ratios = 100 * mine["median"] / mine["median"].iloc[0]
    bars = [bars for bars in time.containers if not isinstance(bars, ErrorbarContainer)]
    assert [bar.get_width() for each in bars for bar in each] == pytest.approx(list(ratios))
    predicted = [line.get_xdata()[0] for line in time.get_lines() if line.get_label() == "predicted"]
    assert predicted == pytest.approx(list(100 * mine["predicted"] / mine["predicted"].iloc[0]))
    assert [text.get_text() for text in loss.texts] == ["MHA", "GQA-2", "MQA", "not trained"]
    heights = {label: y[0] for label, (_, y) in lines(loss).items() if "plain" in label}
    assert {label: round(y) for label, y in heights.items()} == {"GQA-2, plain": -1, "MQA, plain": -2}


def test_tradeoff_of_a_machine_that_did_not_train_names_the_one_that_did(rows: pandas.DataFrame) -> None:
    """Loss does not depend on the machine, but its rows come from somewhere."""
    footer = FIGURES["tradeoff"](rows, "hopper").texts[-1].get_text()
    assert "time: GPU: Hopper GPU (hopper)" in footer and "loss: CPU: Zen (zen-2c)" in footer
    assert NEW in footer and TRAINED in footer


def test_a_variant_has_one_colour_everywhere(drawn: Drawn) -> None:
    """A reader who learned a colour in one figure reads the next by it."""
    colours: dict[str, set[str]] = {}
    for name in ("kv_memory", "capacity", "decode_context", "decode_batch", "roofline", "quality", "recall"):
        for axes in drawn.figures[name].axes:
            for line in axes.get_lines():
                label = str(line.get_label()).split(",")[0]
                if label in ("MHA", "GQA-4", "GQA-2", "MQA") and "expanded" not in str(line.get_label()):
                    colours.setdefault(label, set()).add(str(line.get_color()))
    colours["MHA"].discard(style.INK)  # the zero line of differences
    assert {len(found) for found in colours.values()} == {1}
    assert len(set.union(*colours.values())) == 4
