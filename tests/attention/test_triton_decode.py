"""The decode kernel without a GPU: what it refuses, how it splits, and, slowly, run by Triton's interpreter and
compiled ahead for Hopper."""

import importlib.util
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from attnlab.attention import attend, supports, triton_decode
from attnlab.attention.triton_decode import Options, candidates, compiled_for, options, split_count
from attnlab.errors import InputError

ROOT = Path(__file__).parents[2]
# pip brings Triton nowhere else (see pyproject.toml), and the slow tests of this file can say so only
PROMISED = (platform.system(), platform.machine()) == ("Linux", "x86_64")
DEVICES = ["interpreter", *(["cuda"] if torch.cuda.is_available() else [])]
SM = 132  # of an H100 or H200
# An SM of compute capability 9.0; the last are each program's
REGISTERS, SHARED_BYTES, RESERVED_BYTES = 2**16, 228 * 1024, 1024


def _missing() -> bool:
    return importlib.util.find_spec("triton") is None


def test_no_gpu_is_a_reason() -> None:
    """On a CPU the arm must say so before Triton is looked for, and an explicit call must raise, not fall back."""
    q, kv = torch.ones(1, 6, 1, 64), torch.ones(1, 2, 5, 64)
    able, reason = supports("triton", q, kv, kv)
    assert (able, reason) == (False, "triton needs CUDA (TRITON_INTERPRET=1 runs it on a CPU, slowly, for tests)")
    with pytest.raises(InputError, match=r"^impl='triton' cannot run here: triton needs CUDA"):
        attend(q, kv, kv, impl="triton")


def test_an_absent_triton_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU builds of torch come without it: an arm that fails in an import ends a sweep that should have gone on."""
    q, kv = torch.ones(1, 6, 1, 64), torch.ones(1, 2, 5, 64)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert supports("triton", q, kv, kv) == (False, "the package triton is not installed")


@pytest.mark.slow
def test_importing_attention_does_not_import_triton() -> None:
    """It costs a second, and on a CPU is for nothing; not even asking what is supported may load it."""
    code = (
        "import sys, torch; from attnlab.attention import implementations, peers, supports\n"
        "x = torch.ones(1, 2, 1, 64); [supports(impl, x, x, x) for impl in [*implementations(), *peers()]]\n"
        "print('triton' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize(
    ("pairs", "context", "group_size", "splits"),
    [
        (1, 65536, 1, 256),  # at most what leaves 256 tokens to a chunk
        (1, 2**20, 1, 264),
        (1, 65536, 32, 64),  # 1024 tokens to a chunk: 32 results of float32 cost as much as 64 keys and values
        (32, 4096, 1, 9),
        (8, 4096, 4, 16),
        (8, 4096, 3, 16),
        (8, 16384, 4, 33),
        (263, 4096, 4, 2),
        (264, 65536, 4, 1),  # they fill the card
        (4096, 65536, 1, 1),
        (1, 255, 1, 1),  # shorter than a chunk
    ],
)
def test_how_the_context_is_split(pairs: int, context: int, group_size: int, splits: int) -> None:
    """Too few splits leave a card idle at batch 1; too many write and read more partial results than keys. By hand:
    two programs for each of 132 SMs are 264."""
    assert split_count(pairs, context, group_size, 2 * SM) == splits


def test_options_are_the_cards_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was tuned on one card must not run on another, and a card nobody has tuned gets the default, which a tuner
    must time as well."""
    assert options("sm_90") == options("sm_80") == Options(64, 4, 3, 2)
    monkeypatch.setitem(triton_decode._TUNED, "sm_90", Options(32, 8, 4, 3))
    assert options("sm_90") == Options(32, 8, 4, 3) and options("sm_80") == Options()
    assert Options() in candidates() and len(set(candidates())) == len(candidates())


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_equals_the_oracle(device: str) -> None:
    """Every case of triton_cases.py, in a process where Triton is what ``device`` asks for."""
    if not PROMISED and _missing():
        return
    environment = {**os.environ, "TRITON_INTERPRET": "1" if device == "interpreter" else "0"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/attention/triton_cases.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^2\d passed|^[3-9]\d passed", done.stdout, re.MULTILINE), done.stdout


# R, D, dtype, splits of calls, and how many programs must fit one SM
COMPILED = [
    (1, 128, torch.bfloat16, 9, 3),
    (4, 128, torch.bfloat16, 1, 3),
    (32, 128, torch.bfloat16, 9, 2),
    (8, 64, torch.float16, 9, 3),
    (8, 256, torch.bfloat16, 9, 2),
    (64, 256, torch.bfloat16, 9, 1),
]


def _compiled(R: int, D: int, dtype: torch.dtype, splits: int, chosen: Options) -> tuple[str, int]:
    """PTX of the main kernel for sm_90, all sizes and strides taken to be multiples of 16 as they are, and how many of
    its programs an SM holds. Fails on spilled registers."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, _, _ = triton_decode._kernels()
    constants, warps = compiled_for(R, D, dtype, chosen, interpreted=False)
    constants |= {"lengths": None} | ({"lse": None} if splits == 1 else {})
    kind = {torch.float16: "*fp16", torch.bfloat16: "*bf16"}[dtype]
    types = {"q": kind, "k": kind, "v": kind, "out": kind if splits == 1 else "*fp32", "lse": "*fp32", "scale": "fp32"}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    where = {name: (i,) for i, name in enumerate(kernel.arg_names)}
    aligned = [name for name, kind in signature.items() if kind[0] == "*" or re.fullmatch("[qkv]_[bhgs]", name)]
    attributes = {where[name]: [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, signature, {where[name]: value for name, value in constants.items()}, attributes)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        command = [tool, "--dump-resource-usage", file.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", told)}
    assert usage["STACK"] == usage["LOCAL"] == 0, f"registers are spilled: {told}"
    by_registers = REGISTERS // (32 * warps * -(-usage["REG"] // 8) * 8)
    return built.asm["ptx"], min(by_registers, SHARED_BYTES // (built.metadata.shared + RESERVED_BYTES))


@pytest.mark.slow
@pytest.mark.parametrize(("R", "D", "dtype", "splits", "programs"), COMPILED)
def test_compiled_ahead_for_hopper(
    R: int, D: int, dtype: torch.dtype, splits: int, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel that spills, fills an SM's memory with one program, or copies 4 bytes at a time gives right results at a
    fraction of the bandwidth; the compiler, which needs no card, shows all three."""
    if not PROMISED and _missing():
        return
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns until it is told
    ptx, fit = _compiled(R, D, dtype, splits, Options())
    assert fit >= programs
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global [^;]*, (0x[0-9a-f]+|\d+),", ptx)
    assert copies and {int(size, 0) for size in copies} == {16}
    assert re.search(r"\b(mma\.sync|wgmma\.mma_async)\b", ptx)


@pytest.mark.slow
@pytest.mark.parametrize("chosen", [c for c in candidates() if c.programs == 2], ids=str)
def test_every_candidate_can_be_compiled(chosen: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tuner would stop at the first one that asks for more memory than an SM has, or time one that spills."""
    if not PROMISED and _missing():
        return
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    assert _compiled(4, 128, torch.bfloat16, 9, chosen)[1] >= 1
