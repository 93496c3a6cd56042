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
        "cache.length + (cache.length > 0) if cache else 0",
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
        'check_size("matrices", matrices)',
        "2",
        "test_shapes.py::test_matched_ffn_width_is_the_best_integer",
    ),
    Mutant(
        "normal quantile for three seeds",
        "effects.py",
        "half = student_t(0.975, n - 1) * error",
        "half = 1.96 * error",
        "test_effects.py::test_an_example_by_hand",
    ),
    Mutant(
        "prefill inside the decode timer",
        "measure/__init__.py",
        "            logits = model(token, cache)\n        cache.length = context",
        "            logits = model(token.expand(batch, context), model.new_cache(batch, context))[:, -1:]\n"
        "        cache.length = context",
        "measure/test_measure.py::test_a_step_decodes_one_token_at_a_fixed_context",
    ),
    Mutant(
        "caches stay warm",
        "measure/point.py",
        "copies = 1 if bytes_each >= 4 * self.rotation_bytes else -(-self.rotation_bytes // bytes_each) + 1",
        "copies = 1",
        "measure/test_point.py::test_a_copy_is_cold_when_its_turn_comes_again",
    ),
    Mutant(
        "a label says bf16, the tensors are fp32",
        "measure/point.py",
        "getattr(torch, point.dtype))",
        "torch.float32)",
        "measure/test_point.py::test_tensors_are_what_the_label_says",
    ),
    Mutant(
        "arms in blocks instead of in turn",
        "measure/clock.py",
        "    for index in range(max(rounds.values())):\n        for name, sample in prepared.items():\n",
        "    for name, sample in prepared.items():\n        for index in range(max(rounds.values())):\n",
        "measure/test_clock.py::test_arms_take_turns",
    ),
    Mutant(
        "a time is shown although the output is wrong",
        "measure/__init__.py",
        "        if wrong > tolerance(point.dtype):\n",
        "        if False:\n",
        "measure/test_measure.py::test_a_wrong_output_ends_the_run_before_any_time_is_taken",
    ),
    Mutant(
        "faster than the machine allows, and believed",
        "measure/__init__.py",
        "IMPLAUSIBLE = 1.05",
        "IMPLAUSIBLE = 1e9",
        "measure/test_measure.py::test_faster_than_the_machine_allows_is_measured_again_and_then_not_believed",
    ),
    Mutant(
        "any exception of an arm becomes a row",
        "measure/__init__.py",
        "        raise error\n    return str(error)",
        "        pass\n    return str(error)",
        "measure/test_measure.py::test_any_other_exception_ends_the_run",
    ),
    Mutant(
        "a row written twice",
        "results.py",
        '        if key in self._by_key:\n            raise ValueError(f"key {key} is already in {self.folder}")\n',
        "",
        "test_results.py::test_a_key_is_written_once",
    ),
    Mutant(
        "a torn last line kept",
        "results.py",
        "            os.ftruncate(self._file, whole)\n",
        "",
        "test_results.py::test_a_torn_last_line_is_cut_off_and_said",
    ),
    Mutant(
        "half a row on a full disk",
        "results.py",
        "            os.ftruncate(self._file, end)\n",
        "",
        "test_results.py::test_a_full_disk_writes_nothing_by_halves",
    ),
    Mutant(
        "rows of another schema read as ours",
        "results.py",
        "        if schema != SCHEMA:\n",
        "        if False:\n",
        "test_results.py::test_rows_of_another_schema_are_refused",
    ),
    Mutant(
        "a mistake on the command line is a traceback",
        "cli.py",
        "    except (_UsageError, InputError) as error:\n",
        "    except _UsageError as error:\n",
        "test_cli.py::test_a_mistake_is_one_line",
    ),
    Mutant(
        "one seed for every run of a sweep",
        "train/quality.py",
        "runs.append(Planned(experiment, arm, Recipe(grouped, seed, tokens, **recipe)))",
        "runs.append(Planned(experiment, arm, Recipe(grouped, 0, tokens, **recipe)))",
        "train/test_quality.py::test_every_variant_is_planned_plain_and_matched_with_every_seed",
    ),
    Mutant(
        "arms of one seed see different data",
        "train/loop.py",
        "corpus.batch(recipe.seed, step,",
        "corpus.batch(recipe.seed + recipe.shape.n_kv_heads, step,",
        "train/test_loop.py::test_arms_of_one_seed_see_the_same_data",
    ),
    Mutant(
        "a resumed run repeats a step",
        "train/loop.py",
        "_save(checkpoint, model, optimizer, step + 1, curve)",
        "_save(checkpoint, model, optimizer, step, curve)",
        "train/test_loop.py::test_an_interrupted_run_ends_with_the_same_numbers",
    ),
    Mutant(
        "nats called bits",
        "train/evaluate.py",
        "nats / math.log(2) /",
        "nats /",
        "train/test_evaluate.py::test_knowing_nothing_costs_log2_of_the_vocabulary",
    ),
    Mutant(
        "causal flops counted in full",
        "predict/time.py",
        "pairs = queries * context - queries * (queries - 1) // 2",
        "pairs = queries * context",
        "predict/test_time.py::test_flops_are_of_the_pairs_that_the_mask_lets_through",
    ),
    Mutant(
        "implausible rows drawn",
        "plots/rows.py",
        '    chosen = chosen[chosen["status"] == "ok"]\n',
        "",
        "plots/test_figures.py::test_what_did_not_end_well_is_not_drawn",
    ),
    Mutant(
        "each arm judged as if it were the only one",
        "effects.py",
        "needed = student_t(1 - 0.025 / len(arms), n - 1) * error",
        "needed = half",
        "test_effects.py::test_one_lucky_arm_among_several_has_no_verdict",
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
