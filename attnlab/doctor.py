"""What is installed on this machine and works, and what each missing piece would give."""

import platform
import shutil
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from attnlab import results

PIP = {  # package: what it gives
    "transformers": "tokenizers of model directories, and caches to time beside ours",
    "datasets": "Hugging Face data sets to train on",
    "tensorboard": "losses while training, attnlab quality run --tensorboard DIR",
    "jupyterlab": "the notebooks, attnlab lab",
    "pytest-benchmark": "tables of the bench suites, pytest --benchmark-only",
}
PEERS = {"xformers": "xformers", "flashinfer": "flashinfer-python"}
BROWSERS = "chromium", "chromium-browser", "google-chrome"


@dataclass(frozen=True)
class Finding:
    """One line: whether ``what`` works here, details or the reason, and if it does not, the remedy and its use."""

    what: str
    works: bool
    said: str
    remedy: str = ""


def lines(findings: list[Finding]) -> list[str]:
    """Aligned, a line each, the remedy behind an arrow."""
    width = max(len(one.what) for one in findings)
    shown = ((one, "ok" if one.works else "--", "" if one.works or not one.remedy else " → ") for one in findings)
    return [f"{mark}  {one.what:{width}}  {one.said}{arrow}{one.remedy if arrow else ''}" for one, mark, arrow in shown]


def examined(runs: Path) -> list[Finding]:
    """Python, torch, kernels (where torch works), packages, rows here and in ``runs``."""
    python = Finding("python", True, f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    torch, device = _torch()
    return [python, torch, *(_kernels(device) if torch.works else []), *_packages(), *_rows(runs, device)]


def _torch() -> tuple[Finding, str]:
    """Whether torch is there and multiplies, and the device it does that on, "" where it does not."""
    remedy = "pip install 'torch>=2.11'; nothing is computed without it, only predicted"
    try:
        import torch

        from attnlab import attention, host  # noqa: F401  # the first names what an old torch lacks

        device = host.resolve_device()
        ones = torch.ones(3, 5, 7, device=device)
        if not torch.equal((ones @ ones.mT).cpu(), torch.full((3, 5, 5), 7.0)):
            raise RuntimeError(f"a matrix product on {device} is wrong")
    except (ImportError, OSError, RuntimeError) as error:
        return Finding("torch", False, repr(error)[:200], remedy), ""
    where = torch.cuda.get_device_name() if device == "cuda" else "no CUDA device"
    return Finding("torch", True, f"{torch.__version__} computes; {where}"), device


def _kernels(device: str) -> list[Finding]:
    """Compiler, 16-bit arithmetic, and each implementation and peer, asked for one small decode step in two dtypes."""
    import torch

    from attnlab import attention, native

    library, reason = native.library()
    capability = native.capability(torch.device(device))
    sixteen = "+bf16" in capability if device == "cpu" else torch.cuda.get_device_capability() >= (8, 0)
    found = [
        Finding("compiler", library is not None, reason or 'impl="cpp" is built and loads', "the fastest on a CPU"),
        Finding("bfloat16", sixteen, f"{capability}, products in {'hardware' if sixteen else 'float32'}"),
    ]
    kinds = dict.fromkeys(attention.implementations(), "impl") | dict.fromkeys(attention.peers(), "peer")
    for name, kind in kinds.items():
        works, why, remedy = "", "", ""
        for dtype in (torch.float32, torch.bfloat16):
            q, k = (torch.zeros(size, dtype=dtype, device=device) for size in ((1, 8, 1, 64), (1, 2, 64, 64)))
            try:
                able, reason = attention.supports(name, q, k, k)
            except (ImportError, OSError, RuntimeError) as error:  # a peer built for another torch
                able, reason = False, repr(error)[:200]
            works, why = works + f"{dtype} ".removeprefix("torch.") * able, reason or why
        if name in PEERS and find_spec(name) is None:
            remedy = f"on CUDA, pip install {PEERS[name]}: timed beside ours, attnlab explore --peers {name}"
        found.append(Finding(f"{kind} {name}", bool(works), works.strip() or why, remedy))
    return found


def _packages() -> list[Finding]:
    found = []
    for name, gives in PIP.items():
        said = next((one.version for one in metadata.distributions(name=name)), "not installed")
        found.append(Finding(name, said != "not installed", said, f"pip install {name}: {gives}"))
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    remedy = "apt-get install chromium: tests of the explorer in a browser, make browser"
    return [*found, Finding("chromium", bool(browser), browser or "not installed", remedy)]


def _rows(runs: Path, device: str) -> list[Finding]:
    """Published rows, this machine's among them, and one's own."""
    published, own = (sorted(root.glob(f"*/*/{results.ROWS}")) for root in (results.PUBLISHED, runs))
    shown, mine = (f"{len(rows)} runs in {root}" for rows, root in ((published, results.PUBLISHED), (own, runs)))
    found = [
        Finding("published", bool(published), shown, "clone the repository: figures and verdicts"),
        Finding("own rows", bool(own), mine, "attnlab explore: measures this machine"),
    ]
    if not device:  # without torch nobody can tell how this machine is called
        return found
    from attnlab import host

    machine = host.describe(device)["machine"]
    known = sum(rows.parent.parent.name == machine for rows in published)
    remedy = "attnlab explore, then attnlab results publish RUN: figures of this machine"
    return [*found, Finding("this machine", known > 0, f"{known} published runs of {machine}", remedy)]
