"""Who may import whom: the arrows of the house, held by reading every import and by importing in fresh processes.

Data flows one way: shape → predict, and shape → model → measure → results; the two meet in plots and in the command
line. Every import counts, inside functions too, unless a test says otherwise.
"""

import ast
import graphlib
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import attnlab

ROOT = Path(attnlab.__file__).parents[1]
NAMES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "attnlab").rglob("*.py"))
}

# part of attnlab -> parts it may import. A part that is not listed may import any but the last two.
MAY_IMPORT = {
    "errors": set(),
    "shapes": {"errors"},
    "predict": {"errors", "shapes"},
    "native": {"shapes"},
    "attention": {"errors", "native"},
    "model": {"errors", "shapes", "native", "attention"},
    "results": {"errors", "shapes"},
    "effects": {"errors", "shapes", "results"},
    "host": {"errors"},
    "scaling": {"errors", "shapes", "effects"},
    # of train the loss alone, whose memory it weighs: it knows no other part
    "measure": {"errors", "shapes", "predict", "attention", "model", "host", "results", "train"},
    "train": {"errors", "shapes", "predict", "attention", "model", "host", "results", "measure"},
    "report": {"errors", "shapes", "predict", "results"},
    # of train the type of what is planned alone
    "trained": {"errors", "shapes", "predict", "results", "effects", "scaling", "report", "train"},
    "generated": {"results", "report"},
    "compare": {"errors", "results", "effects", "report"},
    "plots": {"errors", "shapes", "predict", "results", "effects", "report", "scaling", "trained"},
    "page": {"errors", "predict", "results", "effects", "shapes"},
    "__main__": {"cli"},
    "cli": {"plots", "page", "", *(name.split(".")[1] for name in NAMES if "." in name)},
}
LAST = {"plots", "page", "cli", "__main__"}


def imports_of(source: str, module: str, is_package: bool = False) -> set[str]:
    """Full names of the modules that ``source``, being ``module``, imports anywhere; a name that attnlab hands out
    lazily counts as the module it lives in."""
    found = set()
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(
                [*package[: len(package) - node.level + 1], node.module or ""] if node.level else [node.module]
            )
            for alias in node.names:
                full = f"{base.rstrip('.')}.{alias.name}"
                lazy = attnlab._HOME_OF.get(alias.name) if base == "attnlab" else None
                found.add(full if full in NAMES else f"attnlab.{lazy}" if lazy else base.rstrip("."))
    return found


IMPORTS = {name: imports_of(path.read_text(), name, path.name == "__init__.py") for name, path in NAMES.items()}


def _part(module: str) -> str:
    return module.partition(".")[2].partition(".")[0]


def _inside(module: str) -> bool:
    return module.partition(".")[0] == "attnlab"


def _outside(part: str) -> set[str]:
    """Packages other than attnlab that a part imports."""
    own = (IMPORTS[name] for name in NAMES if _part(name) == part)
    return {module.partition(".")[0] for imports in own for module in imports if not _inside(module)}


def test_the_reader_of_imports_sees_every_way_to_write_one() -> None:
    """A check that overlooks one spelling holds nothing."""
    source = """
import torch.nn
from attnlab import shapes, Llama, ModelShape as Shape, __version__
from attnlab.attention import torch_sdpa, attend
from . import memory
from ..errors import InputError
def late():
    from bench import conftest
"""
    assert imports_of(source, "attnlab.predict.time") == {
        "torch.nn",
        "attnlab",
        "attnlab.shapes",
        "attnlab.model.llama",
        "attnlab.attention.torch_sdpa",
        "attnlab.attention",
        "attnlab.predict.memory",
        "attnlab.errors",
        "bench",
    }


@pytest.mark.parametrize("module", NAMES)
def test_arrows(module: str) -> None:
    """One import against the arrows, found months later, is how a memory model comes to need a GPU."""
    allowed = MAY_IMPORT.get(_part(module), {_part(name) for name in NAMES} - LAST)
    parts = {_part(target) for target in IMPORTS[module] if _inside(target)}
    against = parts - allowed - {_part(module)}
    assert not against, f"{module} may not import {sorted(against)}; it may: {sorted(allowed)}"


def test_what_two_parts_know_of_each_other() -> None:
    """Between parts that import each other the arrows hold for single modules: tables that are read without torch may
    name what they list, and no more."""
    known = {(name, target) for name, imports in IMPORTS.items() for target in imports if _part(target) == "train"}
    outside = {(name, target) for name, target in known if _part(name) in ("measure", "trained")}
    assert outside == {
        ("attnlab.measure.memory", "attnlab.train.loss"),
        ("attnlab.trained", "attnlab.train.quality"),
    }
    assert not {target for target in IMPORTS["attnlab.train.loss"] if _inside(target)}


def test_no_import_circle() -> None:
    """A circle works until somebody imports the other end first. Imports inside functions count: hiding one there
    is how circles are made."""
    graph = {name: {target for target in IMPORTS[name] if target in NAMES} for name in NAMES}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, naming the circle


def test_attention_implementations_do_not_know_each_other() -> None:
    """Two implementations that share code share its mistakes, and the reference is the oracle of both. The call of
    torch's SDPA, with the library's one mask rule, is the only thing in common."""
    files = [name for name in NAMES if name.startswith("attnlab.attention.")]
    assert {"attnlab.attention.reference", "attnlab.attention.grouped"} <= set(files)
    for name in files:
        shared = {target for target in IMPORTS[name] if target.startswith("attnlab.attention")}
        assert shared <= {"attnlab.attention.torch_sdpa"} - {name}, name


def test_the_library_never_imports_what_is_around_it() -> None:
    """bench/ and tests/ are in no wheel."""
    around = {"bench", "tests", "conftest", "notebooks", "pytest"}
    for name, imports in IMPORTS.items():
        assert not around & {target.partition(".")[0] for target in imports}, name


@pytest.mark.parametrize(
    ("part", "barred"),
    [
        ("errors", {"torch", "numpy", "pandas", "matplotlib"}),
        ("shapes", {"torch", "numpy", "pandas", "matplotlib"}),
        ("predict", {"torch", "numpy", "pandas", "matplotlib"}),
        ("effects", {"torch", "matplotlib"}),
        ("scaling", {"torch", "matplotlib"}),
        ("report", {"torch", "matplotlib"}),
        ("trained", {"torch", "matplotlib"}),
        ("compare", {"torch", "matplotlib"}),
        ("results", {"torch", "matplotlib"}),
        ("plots", {"torch"}),
        ("page", {"torch", "matplotlib"}),
        *((part, {"matplotlib"}) for part in ("attention", "model", "measure", "host", "explore", "train")),
    ],
)
def test_what_predicts_runs_nothing_and_what_measures_draws_nothing(part: str, barred: set[str]) -> None:
    """A plot that can measure will one day fill a gap in its rows; a harness that draws decides what is shown."""
    assert not _outside(part) & barred


def test_bench_draws_nothing() -> None:
    """Figures come from published rows alone, so nothing that times may make one."""
    for path in (ROOT / "bench").rglob("*.py"):
        imports = imports_of(path.read_text(), ".".join(path.relative_to(ROOT).with_suffix("").parts))
        assert not {
            target for target in imports if target.partition(".")[0] == "matplotlib" or _part(target) == "plots"
        }


def _fresh(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _of(*parts: str) -> list[str]:
    return [name for name in NAMES if _part(name) in parts]


@pytest.mark.parametrize(
    ("modules", "barred"),
    [
        (["attnlab", *_of("errors", "shapes", "predict")], ["torch", "numpy", "pandas", "matplotlib"]),
        (_of("results", "effects", "scaling", "report", "trained", "compare", "plots", "page", "cli"), ["torch"]),
    ],
    ids=["core", "reading"],
)
def test_importing_does_not_load_torch(modules: list[str], barred: list[str]) -> None:
    """Asking what a model would cost, or for help, must not wait seconds for torch, not even through a third module."""
    loaded = f"[m for m in {barred} if m in sys.modules]"
    assert _fresh(f"import sys, importlib\nfor m in {modules}: importlib.import_module(m)\nprint({loaded})") == "[]"


def test_every_lazy_name_exists() -> None:
    """A name handed out lazily is checked by no import: a slip in the table would wait for its first reader."""
    for name in attnlab.__all__:
        assert getattr(attnlab, name) is not None
    with pytest.raises(AttributeError, match="'attnlab' has no attribute 'Lama'"):
        attnlab.Lama  # noqa: B018  # the look-up is what is tested


def _cpu_seconds(*arguments: str) -> float:
    """Processor time of the fastest of three fresh interpreters: a busy machine hardly stretches it."""
    spent = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(spent)


@pytest.mark.parametrize(
    "arguments", [("-c", "import attnlab"), ("-m", "attnlab", "--help")], ids=["import attnlab", "attnlab --help"]
)
def test_under_300_ms(arguments: tuple[str, ...]) -> None:
    """A millisecond and a tenth of a second; one import of torch at the top of a file makes it two seconds."""
    assert _cpu_seconds(*arguments) - _cpu_seconds("-c", "") < 0.3
