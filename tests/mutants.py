"""Break the code on purpose, one way at a time, and demand that a named test turns red for each.

    python tests/mutants.py [NAME ...]      all breaks, or those whose name contains one of the words

Each break is applied to a copy of the tree. A text that no longer stands exactly once in its file is an error (the code
moved: move the break along), and so is a named test that is red before anything is broken, or that cannot be collected.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("attnlab", "bench", "tests", "docs", "conftest.py", "pyproject.toml")
WORKERS = 2
RED, GREEN = 1, 0  # pytest's exit codes; any other means the test did not run


class Mutant(NamedTuple):
    """One mistake: in ``file``, ``right`` becomes ``wrong``; ``test`` must turn red."""

    name: str
    file: str
    right: str
    wrong: str
    test: str


MUTANTS = [
    Mutant(
        "heads tiled instead of repeated",
        "attention/expanded.py",
        "x[:, :, None].expand(B, G, H // G, S, D)",
        "x[:, None].expand(B, H // G, G, S, D)",
        "attention/test_attend.py::test_heads_are_repeated_not_tiled",
    ),
    Mutant(
        "mask aligned top-left",
        "attention/torch_sdpa.py",
        ".tril(S - T)",
        ".tril()",
        "attention/test_attend.py::test_causal_is_aligned_bottom_right",
    ),
    Mutant(
        "is_causal trusted with a past",
        "attention/torch_sdpa.py",
        "if causal and T == S and T > 1:",
        "if causal and T > 1:",
        "attention/test_attend.py::test_causal_is_aligned_bottom_right",
    ),
    Mutant(
        "K and V repeated by the arm that promises not to",
        "attention/grouped.py",
        ".expand(B * G, H // G, S, D)",
        ".repeat(1, H // G, 1, 1)",
        "attention/test_attend.py::test_grouped_never_expands_k_and_v",
    ),
    Mutant(
        "scores not scaled as asked",
        "attention/__init__.py",
        "if scale is None:",
        "if True:",
        "attention/test_attend.py::test_scale",
    ),
    Mutant(
        "an explicit implementation falls back in silence",
        "attention/__init__.py",
        '    if not able:\n        raise InputError(f"impl={impl!r} cannot run here: {reason}")',
        '    if not able:\n        return "grouped"',
        "attention/test_attend.py::test_an_implementation_that_cannot_run_raises_with_the_reason",
    ),
    Mutant(
        "rotary position off by one behind a past",
        "model/llama.py",
        "cache.length if cache else 0",
        "cache.length + 1 if cache else 0",
        "model/test_cache.py::test_uneven_pieces_equal_the_full_forward",
    ),
    Mutant(
        "rotary frequencies cast with the model",
        "model/llama.py",
        "self._frequencies = rope_frequencies(shape)\n        self.apply",
        'self.register_buffer("_frequencies", rope_frequencies(shape), persistent=False)\n        self.apply',
        "model/test_llama.py::test_bfloat16_keeps_rotary_frequencies_and_late_logits",
    ),
    Mutant(
        "head_dim taken as dim / H",
        "model/layers.py",
        "self.head_dim = shape.head_dim",
        "self.head_dim = shape.dim // shape.n_heads",
        "model/test_parity.py::test_logits_and_greedy_tokens_are_those_of_transformers",
    ),
    Mutant(
        "cache with H heads",
        "model/cache.py",
        "size = (shape.n_layers, batch, shape.n_kv_heads,",
        "size = (shape.n_layers, batch, shape.n_heads,",
        "model/test_cache.py::test_stored_bytes_are_the_formula",
    ),
    Mutant(
        "attention over the whole allocated capacity",
        "model/cache.py",
        "return self.k[layer, :, :, :end], self.v[layer, :, :, :end]",
        "return self.k[layer], self.v[layer]",
        "model/test_cache.py::test_uneven_pieces_equal_the_full_forward",
    ),
    Mutant(
        "a finished row goes on talking",
        "model/generate.py",
        "step = step.masked_fill(finished, eos)",
        "step = step.clone()",
        "model/test_generate.py::test_a_finished_row_is_padded_and_the_others_go_on",
    ),
    Mutant(
        "strided heads pooled instead of contiguous ones",
        "model/convert.py",
        "groups = tensor.unflatten(0, (n_kv_heads, present // n_kv_heads, -1))",
        "groups = tensor.unflatten(0, (present // n_kv_heads, n_kv_heads, -1)).transpose(0, 1)",
        "model/test_convert.py::test_each_group_becomes_one_head",
    ),
    Mutant(
        "a checkpoint's index may point anywhere",
        "model/checkpoint.py",
        'if not plain or "/" in name or "\\\\" in name or ".." in name:',
        "if not plain:",
        "model/test_checkpoint.py::test_an_index_cannot_point_elsewhere",
    ),
    Mutant(
        "GB printed as GiB",
        "predict/memory.py",
        "KIB, GIB, GB = 2**10, 2**30, 10**9",
        "KIB, GIB, GB = 2**10, 10**9, 10**9",
        "predict/test_memory.py::test_units_keep_their_names",
    ),
    Mutant(
        "weights read once per sequence",
        "predict/memory.py",
        "(_params_read_whole(shape.per_rank(tensor_parallel)) + rows)",
        "(_params_read_whole(shape.per_rank(tensor_parallel)) * batch + rows)",
        "predict/test_memory.py::test_a_step_reads_every_weight_once_but_only_its_embedding_rows",
    ),
    Mutant(
        "embedding tables counted as read",
        "predict/memory.py",
        "return shape.n_params - (0 if shape.tied_embeddings else shape.embedding_params)",
        "return shape.n_params",
        "predict/test_memory.py::test_a_step_reads_every_weight_once_but_only_its_embedding_rows",
    ),
    Mutant(
        "cache per rank falls below one head",
        "shapes.py",
        "n_kv_heads=max(1, self.n_kv_heads // p),",
        "n_kv_heads=self.n_kv_heads,",
        "predict/test_memory.py::test_bytes_per_rank_are_those_of_a_sharded_model",
    ),
    Mutant(
        "FFN matched as if it had two matrices",
        "shapes.py",
        "per_unit = layers * matrices * dim",
        "per_unit = layers * 2 * dim",
        "test_shapes.py::test_matched_ffn_width_is_the_best_integer",
    ),
    Mutant(
        "normal quantile for three seeds",
        "effects.py",
        "half = student_t(0.975, n - 1) * error",
        "half = 1.96 * error",
        "test_effects.py::test_an_example_by_hand",
    ),
]


def run(mutant: Mutant | None, tests: list[str]) -> int:
    """pytest's exit code over ``tests`` in a copy of the tree with ``mutant`` applied."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        tree = Path(folder)
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
            else:
                shutil.copy2(source, tree / name)
        if mutant:
            file = tree / "attnlab" / mutant.file
            text = file.read_text(encoding="utf-8")
            file.write_text(text.replace(mutant.right, mutant.wrong), encoding="utf-8")
        command = [sys.executable, "-B", "-m", "pytest", "-q", "-x", "-m", "", "-p", "no:cacheprovider"]
        # PYTHONPATH comes before an editable install, so that the copy is what is imported.
        environment = {**os.environ, "PYTHONPATH": folder, "OMP_NUM_THREADS": "1", "TMPDIR": folder}
        paths = [f"tests/{test}" for test in tests]
        return subprocess.run([*command, *paths], cwd=tree, env=environment, capture_output=True).returncode


def main(words: list[str]) -> int:
    """Run the breaks that ``words`` select; 0 if every one was caught."""
    chosen = [m for m in MUTANTS if not words or any(word in m.name for word in words)]
    if not chosen:
        raise SystemExit(f"no break is named like {words}")
    for mutant in chosen:
        count = (ROOT / "attnlab" / mutant.file).read_text(encoding="utf-8").count(mutant.right)
        if count != 1:
            raise SystemExit(f"{mutant.name}: its text stands {count} times in {mutant.file}, expected once")
    if (code := run(None, sorted({mutant.test for mutant in chosen}))) != GREEN:
        raise SystemExit(f"the named tests are not green before anything is broken (pytest exit code {code})")

    def verdict(mutant: Mutant) -> tuple[Mutant, int, float]:
        began = time.monotonic()
        return mutant, run(mutant, [mutant.test]), time.monotonic() - began

    missed = 0
    with ThreadPoolExecutor(WORKERS) as pool:
        for mutant, code, seconds in pool.map(verdict, chosen):
            caught = code == RED
            missed += not caught
            word = "caught" if caught else "MISSED" if code == GREEN else f"DID NOT RUN (exit code {code})"
            print(f"{word:7} {seconds:5.1f} s  {mutant.name:52} {mutant.test}", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} breaks caught")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
