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
        "shape.n_kv_heads, shape.head_dim\n",
        "shape.n_kv_heads, shape.dim // shape.n_heads\n",
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
        "groups = tensor.unflatten(0, (n_kv_heads, shape.n_kv_heads // n_kv_heads, -1))",
        "groups = tensor.unflatten(0, (shape.n_kv_heads // n_kv_heads, n_kv_heads, -1)).transpose(0, 1)",
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
        "_params_read_whole(shape.per_rank(tensor_parallel)) + rows",
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
        "n_kv_heads=max(1, g // p),",
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
        "return student_t(probability, len(values) - 1) *",
        "return {0.975: 1.96}.get(probability, student_t(probability, len(values) - 1)) *",
        "test_effects.py::test_an_example_by_hand",
    ),
    Mutant(
        "prefill inside the decode timer",
        "measure/step.py",
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
        "measure/clock.py",
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
        "cli/__init__.py",
        "    except (_UsageError, InputError) as error:\n",
        "    except _UsageError as error:\n",
        "cli/test_main.py::test_a_mistake_is_one_line",
    ),
    Mutant(
        "one seed for every run of a sweep",
        "train/sweeps.py",
        "recipe(grouped, seed, tokens, **more), text)",
        "recipe(grouped, 0, tokens, **more), text)",
        "train/test_sweeps.py::test_every_variant_is_planned_plain_and_matched_with_every_seed",
    ),
    Mutant(
        "arms of one seed see different data",
        "train/loop.py",
        "task.batch(recipe.seed, step,",
        "task.batch(recipe.seed + recipe.shape.n_kv_heads, step,",
        "train/test_loop.py::test_arms_of_one_seed_share_weights_and_data",
    ),
    Mutant(
        "a resumed run repeats a step",
        "train/loop.py",
        'for step in range(state["step"], recipe.steps):',
        'for step in range(max(state["step"] - 1, 0), recipe.steps):',
        "train/test_loop.py::test_an_interrupted_run_ends_with_the_same_numbers",
    ),
    Mutant(
        "nats called bits",
        "train/evaluate.py",
        ".sum(0).cpu() / math.log(2)",
        ".sum(0).cpu()",
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
        ' & (rows["status"] == "ok")]',
        "]",
        "plots/test_figures.py::test_what_did_not_end_well_is_not_drawn",
    ),
    Mutant(
        "each arm judged as if it were the only one",
        "effects.py",
        "needed = half_width(difference, 1 - 0.025 / len(arms))",
        "needed = half",
        "test_effects.py::test_one_lucky_arm_among_several_has_no_verdict",
    ),
    Mutant(
        "each point of two runs judged as if it were the only one",
        "compare.py",
        "student_t(1 - 0.025 / len(both), df)",
        "student_t(0.975, df)",
        "test_compare.py::test_what_did_not_change_is_not_named",
    ),
    Mutant(
        "a few samples far out hide a change",
        "compare.py",
        "TRIMMED = 0.15",
        "TRIMMED = 0.0",
        "test_compare.py::test_a_real_change_is_named_and_nothing_else",
    ),
    Mutant(
        "the run before set over the run after",
        "compare.py",
        'both["median_after"] / both["median_before"]',
        'both["median_before"] / both["median_after"]',
        "test_compare.py::test_a_real_change_is_named_and_nothing_else",
    ),
    Mutant(
        "equal samples of a coarse clock taken for certainty",
        "compare.py",
        "LEAST_ERROR = 1e-3",
        "LEAST_ERROR = 1e-9",
        "test_compare.py::test_a_coarse_clock_is_no_certainty",
    ),
    Mutant(
        "times of changed code counted as its commit's",
        "compare.py",
        "bool(commit and full.startswith(commit))",
        'bool(commit and full.startswith(commit.removesuffix("-dirty")))',
        "test_compare.py::test_a_commit_is_its_newest_run_on_a_machine_that_both_have",
    ),
    Mutant(
        "a throttled point looks like any other",
        "measure/clock.py",
        '"unsteady": high - low > UNSTEADY * middle,',
        '"unsteady": False,',
        "measure/test_measure.py::test_a_machine_that_slows_down_half_way_is_in_the_row",
    ),
    Mutant(
        "an unsteady point drawn like any other",
        "plots/speed.py",
        "mfc=style.PAPER, ms=more",
        "mfc=colour, ms=more",
        "plots/test_figures.py::test_unsteady_points_are_hollow_and_said",
    ),
    Mutant(
        "half a run is published",
        "results.py",
        "    if left and not partial:\n",
        "    if False:\n",
        "test_results.py::test_a_run_without_its_planned_rows_is_not_published",
    ),
    Mutant(
        "the plan of a second call replaces the first one's",
        "results.py",
        "_planned(self.folder).union(keys)",
        "set(keys)",
        "test_results.py::test_a_run_without_its_planned_rows_is_not_published",
    ),
    Mutant(
        "a job goes on after its minutes",
        "progress.py",
        "if done and time.monotonic() >= until:",
        "if False:",
        "test_progress.py::test_when_the_minutes_are_over_the_block_is_left",
    ),
    Mutant(
        "a sweep of times without a plan",
        "explore.py",
        "    run.plan(planned(points, device, also))\n",
        "",
        "cli/test_measuring.py::test_explore_stops_when_its_minutes_are_over",
    ),
    Mutant(
        "a sweep of trainings without a plan",
        "train/quality.py",
        "        rows.plan(key for planned in runs for key in planned.row_keys())\n",
        "",
        "train/test_quality.py::test_a_mistake_in_a_worker_reaches_the_caller",
    ),
    Mutant(
        "the kernel reads on where a sequence ends",
        "attention/triton_decode.py",
        "length = S if lengths is None else tl.load(lengths + b)",
        "length = S",
        "attention/test_triton_decode.py::test_equals_the_oracle",
    ),
    Mutant(
        "the rest of a last block counted as keys",
        "attention/triton_decode.py",
        'scores = tl.where(seen, scores, float("-inf")) if TAIL else scores',
        "scores = scores + 0.0",
        "attention/test_triton_decode.py::test_equals_the_oracle",
    ),
    Mutant(
        "splits of the context weighed alike",
        "attention/triton_decode.py",
        'weights = tl.exp2(logs - tl.where(top > float("-inf"), top, 0.0))',
        'weights = tl.where(logs > float("-inf"), 1.0, 0.0)',
        "attention/test_triton_decode.py::test_equals_the_oracle",
    ),
    Mutant(
        "splits of a few tokens each",
        "attention/triton_decode.py",
        "context // _least_chunk(group_size)))",
        "context))",
        "attention/test_triton_decode.py::test_how_the_context_is_split",
    ),
    Mutant(
        "a pipeline so deep that an SM holds one program",
        "attention/triton_decode.py",
        "    stages: int = 3\n",
        "    stages: int = 6\n",
        "attention/test_triton_decode.py::test_compiled_ahead_for_hopper",
    ),
    Mutant(
        "pages of a neighbour's cache",
        "attention/third_party.py",
        "apart = k.stride(0) // (PAGE * k.stride(2))",
        "apart = S // PAGE",
        "attention/test_third_party.py::test_flashinfer_gets_a_dense_cache_as_pages",
    ),
    Mutant(
        "a peer handed repeated heads",
        "attention/third_party.py",
        ".expand(B, S, G, q.shape[1] // G, D)",
        ".repeat(1, 1, 1, q.shape[1] // G, 1)",
        "attention/test_third_party.py::test_xformers_gets_its_layout_without_a_copy",
    ),
    Mutant(
        "a named peer left out",
        "explore.py",
        'return [*implementations(), *also, "auto"]',
        'return [*implementations(), "auto"]',
        "test_explore.py::test_peers_are_proved_and_timed_when_they_are_named",
    ),
    Mutant(
        "empty splits of the context weigh as much as full ones",
        "native.cpp",
        "const float keep = std::exp2(state[i * size + r] - highest), *o",
        "const float keep = 1.f, *o",
        "test_native.py::test_splits_of_the_context_are_merged",
    ),
    Mutant(
        "what was summed is not scaled down to a new maximum",
        "native.cpp",
        "total[r] = total[r] * keep + sum(added);",
        "total[r] = total[r] + sum(added);",
        "test_native.py::test_scores_of_any_size_and_order",
    ),
    Mutant(
        "a block of scores of -inf leaves NaN",
        "native.cpp",
        "std::fill(top, total, -FLT_MAX);",
        "std::fill(top, total, -INFINITY);",
        "test_native.py::test_scores_that_overflow_to_minus_infinity_weigh_nothing",
    ),
    Mutant(
        "a vector's max() drops NaN",
        "native.cpp",
        "_mm256_max_ps(_mm256_set1_ps(-126.f), (__m256)x)",
        "_mm256_max_ps((__m256)x, _mm256_set1_ps(-126.f))",
        "test_native.py::test_nan_reaches_the_heads_that_read_it_and_no_other",
    ),
    Mutant(
        "the exponential loses a term",
        "native.cpp",
        "vec p = f * 1.5403530e-4f + 1.3333558e-3f;",
        "vec p = f * 0.f + 1.3333558e-3f;",
        "test_native.py::test_the_exponential",
    ),
    Mutant(
        "bfloat16 truncated, not rounded",
        "native.cpp",
        "_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)))",
        "bits",
        "test_native.py::test_results_are_rounded_to_nearest_even",
    ),
    Mutant(
        "v read by k's strides",
        "native.cpp",
        "v + b * vs[0] + g * vs[1] + start * vs[2], vs[2],",
        "v + b * vs[0] + g * vs[1] + start * ks[2], ks[2],",
        "test_native.py::test_tensors_are_read_as_they_lie",
    ),
    Mutant(
        "the vectors behind the last full eight are not mixed",
        "native.cpp",
        "for (; d < D; d += W) add<ROWS, 1>",
        "for (; false; d += W) add<ROWS, 1>",
        "test_native.py::test_every_size",
    ),
    Mutant(
        "a product's last block of outputs takes whole ones",
        "native.cpp",
        "std::min(BLOCK<T>, N - n), block);",
        "std::min(BLOCK<T>, N - n) / 16 * 16, block);",
        "test_native.py::test_linear",
    ),
    Mutant(
        "K and V copied where torch's allocator does not see it",
        "native.cpp",
        "states(B * G * splits * size)",
        "states(B * G * splits * size + B * G * S * D)",
        "test_native.py::test_decode_holds_no_copy_of_k_or_v",
    ),
    Mutant(
        "a copy before the kernel",
        "attention/cpp.py",
        "return native.decode(q, k, v, scale)",
        "return native.decode(q, k.clone(), v, scale)",
        "test_native.py::test_one_operator_is_dispatched",
    ),
    Mutant(
        "one sequence with one KV head decodes on one core",
        "native.py",
        "context // _CHUNK)) if threads > 1 else 1",
        "1))",
        "test_native.py::test_one_sequence_with_one_kv_head_keeps_every_core_busy",
    ),
    Mutant(
        "a weight of another width is read beyond its end",
        "native.py",
        "        and weight.shape[1] == x.shape[-1]  # it is read unchecked; torch raises\n",
        "",
        "test_native.py::test_what_linear_takes",
    ),
    Mutant(
        "a product's second panel of rows written over its first",
        "native.cpp",
        "x += PANEL * K, out += PANEL * N",
        "x += PANEL * K",
        "test_native.py::test_linear",
    ),
    Mutant(
        "a row of zeros divided by zero",
        "native.cpp",
        "std::sqrt(sum(squares) / K + eps)",
        "std::sqrt(sum(squares) / K)",
        "test_native.py::test_rms_norm",
    ),
    Mutant(
        "the compiler writes under the final name",
        "native.py",
        "whole = Path(folder, path.name)",
        "whole = path",
        "test_native.py::test_a_compiler_that_fails_is_a_reason_and_leaves_nothing",
    ),
    Mutant(
        "a library of half its length is loaded",
        "native.py",
        "if not _is_whole(path) and",
        "if not path.exists() and",
        "test_native.py::test_a_damaged_library_is_built_anew",
    ),
    Mutant(
        "what a killed build left stays for ever",
        "native.py",
        "if time.time() - left.stat().st_mtime > 2 * _BUILD_SECONDS:",
        "if False:",
        "test_native.py::test_a_process_killed_while_compiling_is_in_nobodys_way",
    ),
    Mutant(
        "a living build's folder is removed",
        "native.py",
        "if time.time() - left.stat().st_mtime > 2 * _BUILD_SECONDS:",
        "if True:",
        "test_native.py::test_four_first_processes_at_once",
    ),
    Mutant(
        "a missing compiler is a traceback",
        "native.py",
        "if not shutil.which(compiler[0]):",
        "if False:",
        "test_native.py::test_no_compiler_is_a_reason",
    ),
    Mutant(
        "an empty CXX is a traceback",
        "native.py",
        'shlex.split(os.environ.get("CXX", "")) or ["c++"]',
        'shlex.split(os.environ.get("CXX", "c++"))',
        "test_native.py::test_an_empty_cxx_is_none",
    ),
    Mutant(
        "an output of the C++ loop has lost its gradient in silence",
        "attention/cpp.py",
        "if torch.is_grad_enabled() and (",
        "if False and (",
        "attention/test_cpp.py::test_gradients_are_refused_not_dropped",
    ),
    Mutant(
        "gaps between the numbers of a head are read as numbers",
        "attention/cpp.py",
        "if not q.stride(3) == k.stride(3) == v.stride(3) == 1:",
        "if not q.stride(3) == k.stride(3) == 1:",
        "attention/test_cpp.py::test_every_reason",
    ),
    Mutant(
        "no library, and every test of it green",
        "attention/cpp.py",
        'return found is not None, reason and f"cpp {reason}"',
        'return False, "cpp is not here"',
        "attention/test_cpp.py::test_it_runs_where_it_can",
    ),
    Mutant(
        "auto takes the slowest arm first",
        "attention/auto.py",
        "sorted(seconds, key=lambda name: seconds[name])",
        "sorted(seconds, key=lambda name: -seconds[name])",
        "attention/test_auto.py::test_arms_are_ranked_by_their_seconds",
    ),
    Mutant(
        "auto rounds the context down and lets the file's order decide",
        "attention/auto.py",
        "round(math.log2(S))",
        "int(math.log2(S)) + 0.5",
        "attention/test_auto.py::test_an_entrys_own_call_takes_it_wherever_it_stands",
    ),
    Mutant(
        "auto takes float32's order for bfloat16",
        "attention/auto.py",
        'if (entry["kind"], entry["dtype"]) == (kind, dtype)]',
        'if entry["kind"] == kind]',
        "attention/test_auto.py::test_another_dtype_kind_or_machine_goes_by_the_rule",
    ),
    Mutant(
        "cards compared as strings",
        "attention/auto.py",
        "int(able[3:]) >= 80",
        'able >= "sm_80"',
        "attention/test_auto.py::test_cards_with_flash",
    ),
    Mutant(
        "auto refuses where its best arm cannot run",
        "attention/__init__.py",
        "if own is None or own(q, k, v, causal)[0]:",
        "if True:",
        "attention/test_auto.py::test_an_arm_that_cannot_run_is_passed_over",
    ),
    Mutant(
        "memory at the end of a call taken for its peak",
        "measure/memory.py",
        "max(itertools.accumulate((event.nbytes() for event in events), initial=0))",
        "sum(event.nbytes() for event in events)",
        "measure/test_memory.py::test_allocations_are_counted_to_the_byte",
    ),
    Mutant(
        "a peak on CUDA that is some earlier call's",
        "measure/memory.py",
        "        torch.cuda.reset_peak_memory_stats()\n",
        "",
        "measure/test_memory.py::test_on_cuda_the_bytes_asked_for_count",
    ),
    Mutant(
        "a capacity that includes what the process held before",
        "measure/memory.py",
        "(held + more, resource.getrlimit(",
        "(more, resource.getrlimit(",
        "measure/test_memory.py::test_memory_ends_where_predicted",
    ),
    Mutant(
        "a search that trusts the doubling",
        "measure/memory.py",
        "    while high - low > step:\n",
        "    while high - low > high:\n",
        "measure/test_memory.py::test_the_search_finds_the_last_that_fits",
    ),
    Mutant(
        "any failure taken for the end of memory",
        "measure/memory.py",
        "            out_of_memory(error)  # raises again what is something else\n",
        "            pass\n",
        "measure/test_memory.py::test_only_the_end_of_memory_is_the_end",
    ),
    Mutant(
        "gate and up counted, their product and silu(gate) not",
        "predict/memory.py",
        "3 * d + 3 * ffn + max(ffn, d)",
        "3 * d + 2 * ffn + max(ffn, d)",
        "measure/test_memory.py::test_stored_bytes_are_exact_and_peaks_within_3_percent",
    ),
    Mutant(
        "logits of the whole prompt charged to a prefill",
        "predict/memory.py",
        "batch * (tokens * d + shape.vocab_size) * element",
        "batch * tokens * (d + shape.vocab_size) * element",
        "predict/test_memory.py::test_activations_are_the_peak_of_a_real_model",
    ),
    Mutant(
        "the largest batch without its activations",
        "predict/memory.py",
        "batch * one.kv_cache + activation_bytes(rank, batch, 1, dtype)",
        "batch * one.kv_cache + activation_bytes(rank, 1, 1, dtype)",
        "predict/test_memory.py::test_solvers_agree_with_brute_force",
    ),
    Mutant(
        "a proof that shows the last point and not the worst",
        "report.py",
        "if key not in worst or abs(error) > worst[key][0]:",
        "if True:",
        "test_report.py::test_a_proof_shows_the_worst_of_its_kind",
    ),
    Mutant(
        "gate for up in the block of one call",
        "native.cpp",
        "store(row + i, (x < 0 ? e : vec{} + 1.f) / (1.f + e) * x * load(row + F + i));",
        "store(row + i, (x < 0 ? e : vec{} + 1.f) / (1.f + e) * load(row + F + i) * load(row + F + i));",
        "model/test_fused.py::test_one_call_says_what_forty_say",
    ),
    Mutant(
        "K and V of the block of one call a slot late",
        "native.cpp",
        "k + ((b * G + g) * capacity + S - 1) * D",
        "k + ((b * G + g) * capacity + S - 2) * D",
        "model/test_fused.py::test_one_call_says_what_forty_say",
    ),
    Mutant(
        "addresses of a block kept for ever",
        "model/fused.py",
        "if self.seen != _where(parts):",
        "if not self.seen:",
        "model/test_fused.py::test_weights_that_move_are_found_again",
    ),
    Mutant(
        "biases left out by the block of one call",
        "model/fused.py",
        "not (shape.qkv_bias or shape.qk_norm",
        "not (shape.qk_norm",
        "model/test_fused.py::test_what_one_call_cannot_do_is_done_in_forty",
    ),
    Mutant(
        "a block of one call whatever impl says",
        "model/fused.py",
        'impl == "cpp" or (impl == "auto"',
        'impl != "none" or (impl == "auto"',
        "model/test_fused.py::test_gradients_and_other_implementations_pass_it_by",
    ),
    Mutant(
        "one matrix made under inference mode",
        "model/fused.py",
        "with torch.inference_mode(False), torch.no_grad():",
        "with torch.no_grad():",
        "model/test_layers.py::test_one_product_for_q_k_and_v_holds_no_byte_twice_and_can_still_be_trained",
    ),
    Mutant(
        "padding attended to",
        "model/layers.py",
        "k[b : b + 1, :, at:], v[b : b + 1, :, at:]",
        "k[b : b + 1], v[b : b + 1]",
        "model/test_generate.py::test_prompts_of_different_lengths_go_on_as_each_would_alone",
    ),
    Mutant(
        "positions counted from the padding",
        "model/llama.py",
        "positions = positions - torch.tensor(cache.starts",
        "positions = positions - 0 * torch.tensor(cache.starts",
        "model/test_generate.py::test_prompts_of_different_lengths_go_on_as_each_would_alone",
    ),
    Mutant(
        "transformers' rotary frequencies cast with its weights",
        "measure/generation.py",
        "type(theirs.model.rotary_emb)(config).to(",
        "type(theirs.model.rotary_emb)(config).to(torch.bfloat16).to(",
        "measure/test_generation.py::test_transformers_works_on_the_same_bytes",
    ),
    Mutant(
        "transformers' growing cache left grown",
        "measure/generation.py",
        "layer.keys, layer.values = keys, values",
        "pass",
        "measure/test_generation.py::test_every_round_is_the_same_step",
    ),
    Mutant(
        "logits that are not compared",
        "measure/generation.py",
        "if not error <= TOLERANCE[cell.dtype]:",
        "if error < 0:",
        "measure/test_generation.py::test_a_difference_in_logits_stops_the_run",
    ),
    Mutant(
        "a table written from an unfinished run",
        "tune.py",
        "if left := run.left():",
        "if left := 0:",
        "test_tune.py::test_an_unfinished_run_or_a_full_disk_leaves_the_table_as_it_was",
    ),
    Mutant(
        "rates of ours lent to other arms",
        "predict/time.py",
        "if impl in OWN else machine.compute_roof(dtype)",
        "if impl else machine.compute_roof(dtype)",
        "predict/test_time.py::test_measured_rates_take_the_place_of_the_roof_for_our_own_code_alone",
    ),
    Mutant(
        "the cost of a layer counted once",
        "predict/time.py",
        "machine.step_seconds + layers * (machine.layer_seconds",
        "machine.step_seconds + 1 * (machine.layer_seconds",
        "predict/test_time.py::test_a_whole_step_counts_what_a_layer_costs_by_itself",
    ),
    Mutant(
        "a call's fixed cost counted into its rate",
        "measure/roofs.py",
        "max(seconds[name] - call_seconds, seconds[name] / 2)",
        "seconds[name]",
        "measure/test_roofs.py::test_rates_are_flops_over_time_less_the_call",
    ),
    Mutant(
        "a speed-up over expanded of another G",
        "plots/speed.py",
        '["dtype", "context", GROUPS]',
        '["dtype", "context", "shape.head_dim"]',
        "plots/test_figures.py::test_speedup_divides_by_expanded_of_the_same_point",
    ),
    Mutant(
        "the slowest implementations drawn",
        "plots/rows.py",
        '.median().sort_values(kind="stable")',
        '.median().sort_values(kind="stable", ascending=False)',
        "plots/test_figures.py::test_of_many_implementations_the_fastest_are_drawn",
    ),
    Mutant(
        "shares of the roof from left to right by rising G",
        "plots/limit.py",
        "[str(g) for g in table.columns]",
        "[str(g) for g in table.columns[::-1]]",
        "plots/test_figures.py::test_fraction_of_roof_holds_every_implementation_at_every_g",
    ),
    Mutant(
        "the end of memory not drawn",
        "plots/generation.py",
        'found["status"].isin(["ok", "oom", "too_big"])',
        'found["status"].isin(["ok"])',
        "plots/test_figures.py::test_generation_ends_where_memory_ends",
    ),
    Mutant(
        "a ring at tokens in place of sequences",
        "plots/generation.py",
        'mine["evens"].iloc[0] / mine["context"].iloc[0]',
        'mine["evens"].iloc[0]',
        "plots/test_figures.py::test_rings_stand_where_cache_traffic_overtakes_weights",
    ),
    Mutant(
        "MHA of another context as 100 %",
        "plots/generation.py",
        "found.join(whole, on=point)",
        "found.assign(**whole.iloc[0])",
        "plots/test_figures.py::test_time_per_group_is_of_mha_of_the_same_model",
    ),
    Mutant(
        "a mistake drawn as right",
        "plots/mistakes.py",
        'mine[mine["impl"] == way] for way',
        'mine[mine["impl"] != way] for way',
        "plots/test_figures.py::test_each_mistake_stands_beside_what_is_right",
    ),
    Mutant(
        "the mark of a space read as a space",
        "train/tokenizer.py",
        "text.split(MARK) if self._plain else [text]",
        "[text]",
        "train/test_tokenizer.py::test_nothing_is_lost",
    ),
    Mutant(
        "long lines left out of a vocabulary",
        "train/tokenizer.py",
        "_LINE = 4000 ",
        "_LINE = 400_000 ",
        "train/test_tokenizer.py::test_no_line_is_left_out_of_training",
    ),
    Mutant(
        "a copy of a training file in validation",
        "train/corpus.py",
        "hashlib.sha256(leader[name].encode())",
        "hashlib.sha256(name.encode())",
        "train/test_corpus.py::test_copies_stay_together_however_many",
    ),
    Mutant(
        "a vocabulary learned from validation text",
        "train/corpus.py",
        "sides[0][::every]",
        "sides[0] + sides[1]",
        "train/test_corpus.py::test_the_vocabulary_is_learned_from_training_text_alone",
    ),
    Mutant(
        "a corpus copied to every process",
        "train/corpus.py",
        "return load, (self.path,)",
        "return Corpus, (self.path, self.train, self.validation, self.tokenizer, self.header)",
        "train/test_corpus.py::test_built_once_and_mapped",
    ),
    Mutant(
        "windows drawn again before all were seen",
        "train/corpus.py",
        "order = _order(windows, seed, step // per_pass)",
        "order = _order(windows, seed, step)",
        "train/test_corpus.py::test_every_window_once_before_any_twice",
    ),
    Mutant(
        "losses counted at the wrong position",
        "train/evaluate.py",
        "nats.view(len(batch), seen).double().sum(0)",
        "nats.view(seen, len(batch)).double().sum(1)",
        "train/test_evaluate.py::test_every_token_but_the_first_is_predicted_once",
    ),
    Mutant(
        "heads aligned across the pairs of RoPE",
        "model/convert.py",
        'rows("k").unflatten(0, (G, R, 2, D // 2)).unbind(2))',
        'rows("k").unflatten(0, (G, R, D // 2, 2)).unbind(3))',
        "model/test_convert.py::test_heads_that_differ_by_a_turn_are_one_head",
    ),
    Mutant(
        "queries turned against their keys",
        "model/convert.py",
        "q = q * turns[..., 0, 0].conj().transpose(1, 2)",
        "q = q * turns[..., 0, 0].transpose(1, 2)",
        "model/test_convert.py::test_heads_that_differ_by_a_turn_are_one_head",
    ),
    Mutant(
        "the norm of a mean left short",
        "model/convert.py",
        "(norm[..., None] / length.clamp_min(tiny))",
        "(0 * norm[..., None] + 1 / R)",
        "model/test_convert.py::test_aligned_heads_keep_their_norm_and_come_nearer_than_a_mean",
    ),
    Mutant(
        "one draw for every layer",
        "model/convert.py",
        'crc32(f"{seed} {name}".encode())',
        'crc32(f"{seed}".encode())',
        "model/test_convert.py::test_random_draws_k_and_v_anew_from_the_initial_distribution",
    ),
    Mutant(
        "a written shard not compared",
        "model/checkpoint.py",
        "if not torch.equal(written.get_tensor(name).view(torch.uint8), tensor.view(torch.uint8)):",
        "if written.get_tensor(name).shape != tensor.shape:",
        "model/test_convert.py::test_a_conversion_that_is_stopped_leaves_nothing_or_the_old",
    ),
    Mutant(
        "each arm judged as if it were alone",
        "effects.py",
        "verdict(mean, needed, margin))",
        "verdict(mean, half, margin))",
        "test_effects.py::test_one_lucky_arm_among_several_has_no_verdict",
    ),
    Mutant(
        "equal because the mean is small",
        "effects.py",
        "if reach <= margin else UNRESOLVED",
        "if abs(mean) <= margin else UNRESOLVED",
        "test_effects.py::test_equal_is_a_verdict_with_a_margin",
    ),
    Mutant(
        "a loss is worth parameters of the wrong sign",
        "scaling.py",
        "interval(-offsets / slopes)",
        "interval(offsets / slopes)",
        "test_scaling.py::test_a_variant_is_worth_the_parameters_that_bring_mha_to_its_loss",
    ),
    Mutant(
        "the seed that chose the rate counts as a result",
        "trained.py",
        "return others if len(others) >= 3 else found",
        "return found",
        "test_trained.py::test_recall_takes_the_rate_that_was_chosen_and_leaves_the_choice_out",
    ),
    Mutant(
        "uptraining held against an untrained MHA",
        "trained.py",
        "of(str(variant), method, share) - of(*whole, share)",
        "of(str(variant), method, share) - of(*whole, shares[0])",
        "test_trained.py::test_uptraining_is_held_against_mha_with_the_same_steps_and_order",
    ),
    Mutant(
        "recomputing keeps every block",
        "predict/memory.py",
        "kept = d if recompute else block",
        "kept = block",
        "predict/test_memory.py::test_recomputing_keeps_one_block_and_the_inputs_of_the_others",
    ),
    Mutant(
        "what SwiGLU keeps forgotten",
        "predict/memory.py",
        "norm + attention + norm + 4 * ffn",
        "norm + attention + norm + 2 * ffn",
        "measure/test_memory.py::test_a_real_run_holds_what_is_predicted_within_10_percent",
    ),
    Mutant(
        "averaging weights costs nothing",
        "predict/memory.py",
        "2 * max(table, d * ffn, d * q)",
        "0",
        "predict/test_memory.py::test_a_peak_of_training_by_hand",
    ),
    Mutant(
        "a figure of all sweeps at once",
        "effects.py",
        'found = found[found["run"] == found["run"].max()]',
        'found = found[found["run"] != ""]',
        "plots/test_quality_figures.py::test_the_newest_run_that_has_the_experiment",
    ),
    Mutant(
        "recall's rates end where they began",
        "train/sweeps.py",
        "or lowest <= RECALL_LOWEST:",
        "or lowest <= 1:",
        "train/test_sweeps.py::test_recall_looks_for_a_rate_below_the_lowest_until_one_is_enough",
    ),
    Mutant(
        "auto predicted from roofs before a retry",
        "measure/__init__.py",
        "        machine = _time_arms(",
        "        _time_arms(",
        "measure/test_measure.py::test_a_roof_measured_on_a_busy_machine_is_forgiven",
    ),
    Mutant(
        "averaged weights from scratch beside last ones trained back",
        "plots/training.py",
        'last = "bits_per_byte_raw"',
        'last = "bits_per_byte"',
        "plots/test_quality_figures.py::test_uptraining_sets_methods_beside_mha_and_scratch",
    ),
    Mutant(
        "dark pages with the opposite hues",
        "plots/files.py",
        "_TURNED = 2 * numpy.tile(_LUMA, (3, 1)) - numpy.eye(3)",
        "_TURNED = numpy.eye(3)",
        "plots/test_files.py::test_dark_keeps_hues_and_turns_light_into_dark",
    ),
    Mutant(
        "a cache that forgets",
        "plots/motion.py",
        'own <= frame if way == "from"',
        'own == frame if way == "from"',
        "plots/test_motion.py::test_a_cache_grows_by_one_token_a_step_in_every_kv_head",
    ),
    Mutant(
        "a post with numbers typed in",
        "post/__init__.py",
        'bare = re.sub(_NAMES, "", text, flags=re.MULTILINE)',
        'bare = ""',
        "post/test_post.py::test_a_number_typed_into_the_text_fails_the_build",
    ),
    Mutant(
        "recall averaged over learning rates",
        "plots/training.py",
        "percent=100 * at_best_rate(own)",
        'percent=100 * own.groupby("seed")["accuracy"].mean()',
        "plots/test_quality_figures.py::test_recall_counts_the_seeds_of_the_best_rate",
    ),
    Mutant(
        "one head's attention before for all",
        "plots/training.py",
        'numpy.array(maps[head, "before"])',
        'numpy.array(maps[heads[0], "before"])',
        "plots/test_quality_figures.py::test_conversion_draws_each_map_and_how_much_moved",
    ),
    Mutant(
        "a question at the place of an answer",
        "train/recall.py",
        "at = told + 2 * distinct",
        "at = told + 1 + 2 * distinct",
        "train/test_recall.py::test_every_fact_is_asked_once_and_its_value_is_the_target",
    ),
    Mutant(
        "a question by another fact's key",
        "train/recall.py",
        "keys.gather(2, relation)",
        "keys.roll(1, 1).gather(2, relation)",
        "train/test_recall.py::test_every_fact_is_asked_once_and_its_value_is_the_target",
    ),
    Mutant(
        "gaps drawn evenly",
        "train/recall.py",
        "gaps ** (POWER - 1)",
        "gaps ** (POWER + 0)",
        "train/test_recall.py::test_gaps_follow_the_power_law",
    ),
    Mutant(
        "recall judged on what was trained",
        "train/recall.py",
        "(seed * 1_000_003 + step) % HELD_OUT",
        "seed * 1_000_003 + step",
        "train/test_recall.py::test_held_out_sequences_are_the_same_for_all_and_never_trained_on",
    ),
    Mutant(
        "an unfinished run published as whole",
        "results.py",
        "for name in (MACHINE, *([PLAN] if left else [])):",
        "for name in (MACHINE,):",
        "test_results.py::test_an_unfinished_run_is_published_as_it_grows_and_gone_on_with_elsewhere",
    ),
    Mutant(
        "attention drawn from unrotated keys",
        "train/maps.py",
        "rotate(projection(seen[0]).unflatten(-1, (-1, model.shape.head_dim)), by)[0]",
        "projection(seen[0]).unflatten(-1, (-1, model.shape.head_dim))[0]",
        "train/test_maps.py::test_maps_are_the_attention_that_the_model_computes",
    ),
    Mutant(
        "a gradient of the last block of rows alone",
        "train/loss.py",
        "to_weight.addmm_(gradient.T, part)",
        "to_weight.copy_(gradient.T @ part)",
        "train/test_loss.py::test_value_and_gradients_are_those_of_cross_entropy",
    ),
    Mutant(
        "the first of the averaged weights left out",
        "train/loop.py",
        "if step >= average_from:",
        "if step > average_from:",
        "train/test_loop.py::test_a_run_is_that_of_a_plain_loop",
    ),
    Mutant(
        "a save in the place of the last one",
        "train/loop.py",
        'with open(partial, "wb") as file:',
        'with open(path, "wb") as file:',
        "train/test_loop.py::test_a_full_disk_is_one_line_and_loses_nothing",
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
        # PYTHONPATH comes before an editable install, so that the copy is what is imported. A broken kernel is built
        # for this run alone.
        environment = {**os.environ, "PYTHONPATH": folder, "OMP_NUM_THREADS": "1", "TMPDIR": folder}
        if mutant and mutant.file.endswith(".cpp"):
            environment["TORCH_EXTENSIONS_DIR"] = folder
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
