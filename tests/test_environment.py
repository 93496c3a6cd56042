"""What the project needs, said alike in four places: pyproject.toml, constraints.txt, environment.yml and imports."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import attnlab

ROOT = Path(__file__).parent.parent
CONDA_NAMES = {"torch": "pytorch"}  # where conda-forge's name differs from PyPI's
MODULE_NAMES = {"pillow": "pil", "flashinfer-python": "flashinfer"}  # where what is imported is named otherwise


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(*extras: str) -> dict[str, Requirement]:
    """Requirements of pyproject.toml by name, those of ``extras`` (and of the extras they name) included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pending, found = [*project["dependencies"]], {}
    for extra in extras:
        pending += project["optional-dependencies"][extra]
    while pending:
        requirement = Requirement(pending.pop())
        if requirement.name == "attnlab":
            for extra in requirement.extras:
                pending += project["optional-dependencies"][extra]
        else:
            found[canonical(requirement.name)] = requirement
    return found


def pins() -> dict[str, str]:
    """constraints.txt by name; a line that is neither a comment nor name==version fails here."""
    found: dict[str, str] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line.startswith("#"):
            continue
        match = re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9][0-9A-Za-z.!]*)", line)  # no +cpu, no path, no editable install
        assert match, f"constraints.txt: {line!r} is not name==version"
        assert canonical(match[1]) not in found, f"constraints.txt pins {match[1]} twice"
        found[canonical(match[1])] = match[2]
    return found


def test_conda_environment_holds_the_packages_of_pyproject() -> None:
    """Two lists of one fact drift: a package added to pyproject.toml alone leaves conda users with an import error (or
    has pip quietly mix its own build of it into their environment). What only some systems need, conda's list cannot
    say, and does not hold."""
    lines = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    conda = {line for line in lines if isinstance(line, str)} - {"pip", "python=3.11"}
    assert conda == {
        f"{CONDA_NAMES.get(name, name)}{requirement.specifier}"
        for name, requirement in declared("dev").items()
        if not requirement.marker
    }
    assert lines[0] == "python=3.11" and lines[-1] == {"pip": ["-e ."]}


def test_every_declared_package_is_pinned_within_its_bounds() -> None:
    """An unpinned dependency makes next month's `make explore` install something nobody has tried; a pin outside the
    bounds makes pip refuse both."""
    pinned = pins()
    for name, requirement in declared("dev").items():
        assert name in pinned, f"constraints.txt does not pin {name}"
        assert requirement.specifier.contains(pinned[name]), f"{requirement} excludes the pin {pinned[name]}"
    assert pinned["torch"] == "2.13.0"


def test_the_library_imports_only_what_it_declares() -> None:
    """An import that works because another package happens to bring it (tqdm, psutil, yaml) breaks on the day that
    package drops it. What belongs to an extra may be imported only inside a function, where its absence is told."""
    required, optional = (
        {MODULE_NAMES.get(name, name) for name in declared()},
        {MODULE_NAMES.get(name, name) for name in declared("dev", "peers", "datasets")},
    )
    for file in sorted((ROOT / "attnlab").rglob("*.py")):
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules = [node.module or ""]
            else:
                continue
            packages = {canonical(module.partition(".")[0]) for module in modules} - {"attnlab"}
            packages -= {canonical(module) for module in sys.stdlib_module_names}
            allowed = required if node in tree.body else required | optional
            assert packages <= allowed, (
                f"{file.relative_to(ROOT)}, line {node.lineno}: {packages - allowed} is not declared"
            )


def test_one_version_everywhere() -> None:
    """A citation of a version that was never released sends a reader to other code than made the numbers."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == attnlab.__version__ == str(Version(attnlab.__version__))
