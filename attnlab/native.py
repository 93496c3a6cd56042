"""The compiled part of the library: ``native.cpp``, built once per machine by its C++ compiler and called by ctypes.

The source needs no header of torch, so a build takes seconds and any torch can use it; it shares torch's OpenMP
threads. torch's own extension loader is not used: killed while compiling it leaves a lock behind that the next process
waits for forever, and it needs ninja and setuptools. Here a build is written beside its name and moved there when
whole: two processes may build at once, a killed one leaves nothing that is ever loaded, and a broken compiler is a
reason, not a crash. The name holds a hash of source, flags and compiler; it lies where torch keeps extensions
(TORCH_EXTENSIONS_DIR).

    M rows   N outputs   K inputs
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnlab.shapes import ModelShape

SOURCE = Path(__file__).with_name("native.cpp")
FLAGS = ["-O3", "-std=c++17", "-mavx2", "-mfma", "-mf16c", "-ffp-contract=fast", "-fno-math-errno", "-fopenmp"]
FLAGS += ["-shared", "-fPIC"]
DTYPES = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "fp16"}
LANES = 8  # of a vector
_POINTER, _INT64 = ctypes.c_void_p, ctypes.c_int64
_BUILD_SECONDS = 300
_DIGEST = 32  # bytes
_SMALL_BYTES = 2**17  # below this, waking a second thread costs more than it saves
_FEW_ROWS = 32  # above these torch's float32 product is the faster
_CHUNK, _TASKS_PER_THREAD = 256, 16  # tokens of a split at least; tasks enough to even out threads of unequal speed


@functools.cache
def library() -> tuple[ctypes.CDLL | None, str]:
    """(the library, "") or (None, why there is none); the first call on a machine builds it, with a line on stderr."""
    capability = torch.backends.cpu.get_cpu_capability()
    if platform.system() != "Linux" or capability not in ("AVX2", "AVX512"):
        return None, f"needs Linux and a CPU with AVX2, this is {platform.system()} with {capability}"
    compiler = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    if not shutil.which(compiler[0]):
        return None, f"needs a C++ compiler, and there is no {compiler[0]!r} (install g++, or name one in CXX)"
    key = hashlib.sha256(SOURCE.read_bytes() + " ".join([*compiler, *FLAGS]).encode()).hexdigest()[:16]
    try:
        path = _folder() / f"attnlab_{key}.so"
    except RuntimeError as error:  # a user without a home
        return None, f"has nowhere to build: {error} (TORCH_EXTENSIONS_DIR names a folder)"
    if not _is_whole(path) and (reason := _build(compiler, path)):
        return None, reason
    try:
        found = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"{path} cannot be loaded ({error}); remove it to build it anew"
    for name in DTYPES.values():
        getattr(found, f"decode_{name}").argtypes = [*[_POINTER] * 4, ctypes.c_float, _POINTER, ctypes.c_int]
        getattr(found, f"linear_{name}").argtypes = [*[_POINTER] * 3, *[_INT64] * 3, ctypes.c_int]
        norm = [*[_POINTER] * 3, *[_INT64] * 2, ctypes.c_float, ctypes.c_int]
        getattr(found, f"rms_norm_{name}").argtypes = norm
        getattr(found, f"block_{name}").argtypes = [*[_POINTER] * 7, ctypes.c_float, ctypes.c_int]
    return found, ""


@functools.cache
def capability(device: torch.device) -> str:
    """What a device can do, as far as it ranks implementations: "avx2", "avx512+bf16", "sm_90"."""
    if device.type == "cuda":
        return "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.backends.cpu.get_cpu_capability().lower() + ("+bf16" if native else "")


def _folder() -> Path:
    own = os.environ.get("TORCH_EXTENSIONS_DIR")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch_extensions"


def _is_whole(path: Path) -> bool:
    """Whether the file ends with the digest of what is before it: loading a truncated one would kill the process."""
    try:
        data = path.read_bytes()
    except OSError:
        return False
    return data[-_DIGEST:] == hashlib.sha256(data[:-_DIGEST]).digest()


def _build(compiler: list[str], path: Path) -> str:
    """Compile into ``path``, entirely or not at all; return "" or what went wrong."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob("attnlab_*/"):  # by builds that were killed; a living one is younger
            with contextlib.suppress(FileNotFoundError):
                if time.time() - left.stat().st_mtime > 2 * _BUILD_SECONDS:
                    shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="attnlab_") as folder:
            print("attnlab: compiling the CPU decode kernel (once, some seconds)", file=sys.stderr, flush=True)
            whole = Path(folder, path.name)
            command = [*compiler, *FLAGS, str(SOURCE), "-o", str(whole)]
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_BUILD_SECONDS)
            if done.returncode:
                said = (done.stderr.strip().splitlines() or ["it said nothing"])[0]
                return f"{compiler[0]} failed with exit code {done.returncode}: {said}"
            digest = hashlib.sha256(whole.read_bytes()).digest()
            with whole.open("ab") as file:  # the loader does not look behind an ELF file's end
                file.write(digest)
            os.replace(whole, path)
    except OSError as error:
        return f"cannot build in {path.parent}: {error} (TORCH_EXTENSIONS_DIR names another folder)"
    except subprocess.TimeoutExpired:
        return f"{compiler[0]} took more than {_BUILD_SECONDS} s"
    return ""


def decode(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """One decode step's attention: q [B, H, 1, D], k and v [B, G, S, D] with adjacent elements, D a multiple of 8, of
    float32, bfloat16 or float16 -> [B, H, 1, D]. ``attention.cpp`` checks; nothing here does."""
    (B, H, _, D), (_, G, S, _) = q.shape, k.shape
    splits, threads = _shared_out(B * G, S, 2 * B * G * S * D * q.element_size())
    out = torch.empty((B, H, 1, D), dtype=q.dtype)
    qs, ks, vs = q.stride(), k.stride(), v.stride()
    sizes = (_INT64 * 14)(B, H, G, S, D, splits, qs[0], qs[1], ks[0], ks[1], ks[2], vs[0], vs[1], vs[2])
    run = _function("decode", q.dtype)
    run(q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), scale, ctypes.addressof(sizes), threads)
    return out


def _shared_out(heads: int, context: int, nbytes: int) -> tuple[int, int]:
    """(splits of the context, threads) for a decode step over so many KV heads of all sequences."""
    threads = torch.get_num_threads() if nbytes > _SMALL_BYTES else 1
    return max(1, min(-(-_TASKS_PER_THREAD * threads // heads), context // _CHUNK)) if threads > 1 else 1, threads


def addresses(tensors: list[Tensor]) -> Any:
    """An array of where ``tensors`` lie, as ``block`` reads it; the caller keeps them alive."""
    return (_INT64 * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


def block(
    x: Tensor, shape: ModelShape, weights: Any, cos: Tensor, sin: Tensor, k: Tensor, v: Tensor, end: int
) -> Tensor:
    """A whole block's decode step: x [B, 1, dim] -> [B, 1, dim]; K and V of the newest token are written into the
    cache's k and v [B, G, capacity, D] at ``end`` - 1. ``model.fused`` says what it takes, and whose ``addresses``."""
    out, (B, G, capacity, D) = x.clone(), k.shape
    splits, attending = _shared_out(B * G, end, 2 * B * G * end * D * x.element_size())
    sizes = (_INT64 * 10)(B, shape.dim, shape.n_heads, G, D, shape.ffn_dim, end, capacity, splits, attending)
    _function("block", x.dtype)(
        *(out.data_ptr(), ctypes.addressof(weights), cos.data_ptr(), sin.data_ptr(), k.data_ptr(), v.data_ptr()),
        *(ctypes.addressof(sizes), shape.norm_eps, torch.get_num_threads()),
    )
    return out


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether ``linear`` is to be preferred to torch's: on a CPU of AVX2, whose 16-bit arithmetic torch emulates, and
    for the few rows of a decode step in float32; where sizes fit and no gradient is asked for. Measured: LOG.md."""
    return (
        x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and x.dtype == weight.dtype
        and x.dtype in DTYPES
        and (x.dtype != torch.float32 or x.numel() <= _FEW_ROWS * x.shape[-1])
        and weight.shape[0] % LANES == 0 == weight.shape[1] % LANES
        and weight.shape[1] == x.shape[-1]  # it is read unchecked; torch raises
        and weight.is_contiguous()
        and capability(x.device) == "avx2"
        and library()[0] is not None
    )


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., K] times the transpose of weight [N, K] -> [..., N], summed in float32; for what ``takes`` says."""
    N, K = weight.shape
    x = x.contiguous()
    out = torch.empty((*x.shape[:-1], N), dtype=x.dtype)
    run = _function("linear", x.dtype)
    run(x.data_ptr(), weight.data_ptr(), out.data_ptr(), x.numel() // K, N, K, torch.get_num_threads())
    return out


def normalises(x: Tensor, weight: Tensor) -> bool:
    """Whether ``rms_norm`` can run: torch has no kernel of its own for it on a CPU, and makes a dozen calls instead."""
    return (
        x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and x.dtype == weight.dtype
        and x.dtype in DTYPES
        and x.shape[-1] % LANES == 0
        and weight.shape == x.shape[-1:]
        and library()[0] is not None
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., K] over its root mean square, times weight [K], in float32 -> [..., K]; for what ``normalises`` says."""
    x = x.contiguous()
    out, K = torch.empty_like(x), x.shape[-1]
    M = x.numel() // K
    run = _function("rms_norm", x.dtype)
    threads = torch.get_num_threads() if x.nbytes > _SMALL_BYTES else 1
    run(x.data_ptr(), weight.data_ptr(), out.data_ptr(), M, K, eps, threads)
    return out


@functools.cache
def _function(name: str, dtype: torch.dtype) -> Any:
    found, reason = library()
    if found is None:
        raise RuntimeError(reason)
    function = getattr(found, f"{name}_{DTYPES[dtype]}")

    def call(*arguments: Any) -> None:
        if function(*arguments):  # in torch's words, so that whoever makes a row of it knows it
            raise RuntimeError(f"native {name}: not enough memory: you tried to allocate memory for its scratch")

    return call
