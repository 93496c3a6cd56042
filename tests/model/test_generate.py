"""Generation against a brute-force loop without a cache, and every option against its definition."""

import math

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from attnlab import kv_cache_bytes
from attnlab.errors import InputError
from attnlab.measure import decode_step
from attnlab.model.generate import generate
from attnlab.model.llama import Llama
from attnlab.shapes import ModelShape

VOCAB = 23


def lively_model(n_kv_heads: int = 2, seed: int = 0) -> Llama:
    """Weights large enough that logits, and so the tokens taken, depend on the context."""
    torch.manual_seed(seed)
    model = Llama(ModelShape(2, 17, 6, n_kv_heads, 10, 19, VOCAB, max_context=40))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.6)
    return model


def by_force(model: Llama, tokens: torch.Tensor, new: int) -> torch.Tensor:
    """Greedy without a cache: the whole sequence again for every token."""
    with torch.no_grad():
        for _ in range(new):
            tokens = torch.cat((tokens, model(tokens)[:, -1].argmax(-1, keepdim=True)), dim=1)
    return tokens


@pytest.mark.parametrize("n_kv_heads", [1, 2, 3, 6])
def test_greedy_equals_the_loop_without_a_cache(n_kv_heads):
    """A prefill headed at the wrong position, or a step fed one token late, still writes plausible text."""
    model = lively_model(n_kv_heads, seed=n_kv_heads)
    prompt = torch.randint(VOCAB, (3, 5))
    out = generate(model, prompt, 11)
    assert out.dtype == torch.int64
    assert torch.equal(out, by_force(model, prompt, 11))
    assert len({tuple(row) for row in out[:, 5:].tolist()}) == 3, "rows must differ for the comparison to mean anything"


@pytest.mark.parametrize("n_kv_heads", [1, 2, 6])
def test_prompts_of_different_lengths_go_on_as_each_would_alone(n_kv_heads):
    """Padding that is attended to, or that shifts positions, changes every shorter row of a batch a little: fluent, and
    not what the row alone would have said. What stands left of a prompt is not read at all, so it may be anything."""
    model, lengths = lively_model(n_kv_heads, seed=n_kv_heads), [5, 2, 7, 1]
    prompts = [torch.randint(VOCAB, (1, length)) for length in lengths]
    padded = torch.cat([torch.nn.functional.pad(prompt, (7 - prompt.shape[1], 0), value=-100) for prompt in prompts])
    out = generate(model, padded, 11, lengths=lengths)
    assert torch.equal(out[:, :7], padded)
    for row, prompt in zip(out, prompts, strict=True):
        assert row[7:].tolist() == by_force(model, prompt, 11)[0, prompt.shape[1] :].tolist()


def _allocated(model: Llama, context: int) -> tuple[int, int]:
    """Bytes allocated in all by one decode step at ``context``, and how many of them are still held after it."""
    step = decode_step(model, 2, context)
    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        step()
    changes = [e.nbytes() for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    return sum(change for change in changes if change > 0), sum(changes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_step_allocates_nothing_that_grows_or_stays(dtype):
    """A cache that is concatenated, K and V repeated to all heads, or a mask per step: each allocates in proportion to
    the context, for every token. A step's temporaries are the same bytes at any context, and all are gone after it."""
    model = Llama(ModelShape(2, 64, 8, 2, 16, 64, 64, max_context=2048)).to(dtype)
    (short, kept), (long, kept_long) = _allocated(model, 256), _allocated(model, 1024)
    assert kept == kept_long == 0
    assert short == long < kv_cache_bytes(model.shape, 2, 256, dtype)


def test_a_finished_row_is_padded_and_the_others_go_on():
    """Stopping at the first eos of any row, or going on writing into a finished one, both corrupt batches."""
    model = lively_model()
    prompt = torch.randint(VOCAB, (3, 5), generator=torch.Generator().manual_seed(4))
    free = by_force(model, prompt, 12)
    # a token that one row meets early and another later or never
    eos = next(e for e in free[0, 5:8].tolist() if e not in free[1, 5:12].tolist())
    out = generate(model, prompt, 12, eos=eos)
    assert out.shape == free.shape
    for row, freely in zip(out[:, 5:].tolist(), free[:, 5:].tolist(), strict=True):
        length = freely.index(eos) + 1 if eos in freely else len(freely)
        assert row == freely[:length] + [eos] * (12 - length)
    assert eos in out[0, 5:8] and eos not in out[1, 5:12]


def test_stops_when_every_row_is_finished():
    """Running on to max_new_tokens after the last row finished wastes the time that eos should save."""
    model = lively_model()
    prompt = torch.randint(VOCAB, (1, 5), generator=torch.Generator().manual_seed(4))
    free = by_force(model, prompt, 12)[0, 5:].tolist()
    eos = free[4]
    assert generate(model, prompt, 12, eos=eos)[0, 5:].tolist() == free[: free.index(eos) + 1]


def test_an_eos_in_the_prompt_is_not_an_end():
    """Prompts of several documents, or of a chat, hold eos; looking for it in the whole row stops at once."""
    model = lively_model()
    prompt = torch.randint(VOCAB, (1, 5), generator=torch.Generator().manual_seed(4))
    free = by_force(model, prompt, 12)
    eos = next(token for token in prompt[0].tolist() if token not in free[0, 5:])
    assert torch.equal(generate(model, prompt, 12, eos=eos), free)


def test_one_pass_per_token_and_only_the_last_position_headed(monkeypatch):
    """Heading every prompt position multiplies the largest matrix of a small model by T, and a pass after the last
    token adds a step to every timing."""
    model = lively_model()
    fed, headed = [], []
    hidden, logits = model.hidden, model.logits
    monkeypatch.setattr(model, "hidden", lambda x, cache: fed.append(list(x.shape)) or hidden(x, cache))
    monkeypatch.setattr(model, "logits", lambda x: headed.append(list(x.shape)) or logits(x))
    generate(model, torch.ones(3, 7, dtype=torch.int64), 4)
    assert fed == [[3, 7], [3, 1], [3, 1], [3, 1]]
    assert headed == [[3, 1, 17]] * 4


def test_tokens_are_streamed_as_they_come():
    """A callback called at the end, or with the prompt, is no stream."""
    model = lively_model()
    seen: list[list[int]] = []
    passes = []
    hidden = model.hidden
    model.hidden = lambda x, cache: passes.append(len(seen)) or hidden(x, cache)
    out = generate(model, torch.ones(2, 3, dtype=torch.int64), 5, on_token=lambda step: seen.append(step.tolist()))
    assert seen == out[:, 3:].T.tolist()
    assert passes == [0, 1, 2, 3, 4]


def test_a_seed_decides_and_leaves_the_global_generator_alone():
    """Seeding torch's global generator inside would make everything drawn afterwards repeat."""
    model, prompt = lively_model(), torch.ones(3, 2, dtype=torch.int64)
    state = torch.get_rng_state()
    first, again, other = (generate(model, prompt, 13, temperature=1.0, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)
    unseeded = [generate(model, prompt, 13, temperature=1.0) for _ in range(2)]
    assert not torch.equal(*unseeded)


def drawn(model: Llama, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """(frequency of each token in 6,000 first draws, the logits they were drawn from in float64)."""
    prompt = torch.tensor([[3, 1, 4]])
    with torch.no_grad():
        logits = model(prompt)[0, -1].double()
    steps = generate(model, prompt.expand(6000, 3), 1, seed=7, **options)[:, 3]
    return steps.bincount(minlength=VOCAB) / 6000, logits


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_temperature_divides_the_logits(temperature):
    """A temperature that multiplies, or is applied to probabilities, changes the text and no shape."""
    found, logits = drawn(lively_model(), temperature=temperature)
    expected = (logits / temperature).softmax(-1)
    assert (found - expected).abs().max() < 4 * 0.5 / math.sqrt(6000)  # four standard errors at most
    assert expected.max() < 0.95, "the distribution must not be decided already"


def test_a_tiny_temperature_is_greedy():
    """Dividing logits by 1e-300 overflows to infinity in all places, and the draw is then of nan."""
    model, prompt = lively_model(), torch.ones(2, 3, dtype=torch.int64)
    assert torch.equal(generate(model, prompt, 5, temperature=1e-300, seed=1), generate(model, prompt, 5))


def test_top_k_keeps_exactly_the_k_likeliest():
    """A threshold at the k-th logit keeps more than k on ties, and a sort the wrong way round keeps the least
    likely."""
    found, logits = drawn(lively_model(), temperature=3.0, top_k=4)
    assert set(found.nonzero()[:, 0].tolist()) == set(logits.topk(4).indices.tolist())
    tied = lively_model()
    tied.lm_head.weight.data.zero_()
    found, _ = drawn(tied, temperature=1.0, top_k=4)
    assert (found > 0).sum() == 4


@pytest.mark.parametrize("top_p", [0.05, 0.4, 0.7, 1.0])
def test_top_p_keeps_the_fewest_tokens_that_hold_p(top_p):
    """Dropping the token that crosses p leaves less than p, and nothing at all when the first one crosses it."""
    found, logits = drawn(lively_model(), temperature=2.0, top_p=top_p)
    probabilities = sorted(enumerate((logits / 2.0).softmax(-1).tolist()), key=lambda pair: -pair[1])
    kept: dict[int, float] = {}
    for token, probability in probabilities:
        if sum(kept.values()) < top_p:
            kept[token] = probability
    expected = torch.zeros(VOCAB, dtype=torch.float64)
    for token, probability in kept.items():
        expected[token] = probability / sum(kept.values())
    assert not found[expected == 0].any()
    assert (found - expected).abs().max() < 4 * 0.5 / math.sqrt(6000)


def test_top_p_applies_to_what_top_k_left():
    """In the other order p is a share of the whole distribution, and fewer tokens survive than asked for."""
    model = lively_model()
    model.lm_head.weight.data.zero_()  # all tokens equally likely: 4 remain, then half of them
    found, _ = drawn(model, temperature=1.0, top_k=4, top_p=0.5)
    assert (found > 0).sum() == 2


def test_what_comes_out_can_be_trained_on():
    """Tensors made in inference mode cannot be saved for a backward pass, and the error names neither cause nor
    cure."""
    model = lively_model()
    out = generate(model, torch.ones(1, 3, dtype=torch.int64), 4)
    model(out).sum().backward()
    assert model.embed_tokens.weight.grad.any()


def test_a_byte_prompt_is_taken_as_it_is():
    """Corpora come as uint8, where 256, the size of their vocabulary, wraps to 0."""
    torch.manual_seed(0)
    model = Llama(ModelShape(1, 17, 6, 2, 10, 19, 256, max_context=40))
    prompt = torch.tensor([[7, 255, 0]])
    assert torch.equal(generate(model, prompt.to(torch.uint8), 5), generate(model, prompt, 5))


def test_the_context_can_be_filled_to_the_last_token():
    """An off-by-one in the check refuses the last position, or lets one more through."""
    model = lively_model()
    assert generate(model, torch.ones(1, 37, dtype=torch.int64), 3).shape == (1, 40)
    with pytest.raises(InputError, match=r"37 prompt tokens \+ 4 new = 41 exceed .* context of 40; .* up to 3"):
        generate(model, torch.ones(1, 37, dtype=torch.int64), 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": torch.zeros(3, dtype=torch.int64)}, r"expected tokens \[B, T\] of integers"),
        ({"tokens": torch.zeros(1, 3)}, r"expected tokens \[B, T\] of integers"),
        ({"tokens": torch.zeros(1, 3, dtype=torch.bool)}, r"expected tokens \[B, T\] of integers"),
        ({"tokens": torch.zeros(1, 0, dtype=torch.int64)}, "prompt is empty"),
        ({"tokens": torch.zeros(0, 3, dtype=torch.int64)}, "prompt is empty"),
        ({"tokens": torch.tensor([[1, 23]])}, "token 23 is outside the vocabulary; valid: 0 to 22"),
        ({"tokens": torch.tensor([[1, -1]])}, "token -1 is outside the vocabulary"),
        ({"lengths": [4]}, r"lengths must be 1 whole numbers from 1 to 3, got \[4\]"),
        ({"lengths": [0]}, r"lengths must be 1 whole numbers from 1 to 3, got \[0\]"),
        ({"lengths": [3, 3]}, r"lengths must be 1 whole numbers from 1 to 3, got \[3, 3\]"),
        ({"max_new_tokens": 0}, "max_new_tokens must be between 1"),
        ({"max_new_tokens": 1.5}, "max_new_tokens must be a whole number"),
        ({"temperature": -0.1}, "temperature must be 0"),
        ({"temperature": math.nan}, "temperature must be 0"),
        ({"temperature": math.inf}, "temperature must be 0"),
        ({"top_k": 0}, "top_k must be between 1"),
        ({"top_k": 24}, "top_k must be between 1 and the vocabulary's 23, got 24"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p must be above 0 and at most 1"),
        ({"top_p": math.nan}, "top_p must be above 0 and at most 1"),
        ({"seed": -1}, "seed must be between 0"),
        ({"eos": 23}, "eos must be a token from 0 to 22"),
        ({"eos": -1}, "eos must be between 0"),
    ],
)
def test_bad_input_is_one_clear_error(changes, message):
    """Each of these otherwise fails deep inside torch, or worse, samples from something else."""
    arguments = {"tokens": torch.ones(1, 3, dtype=torch.int64), "max_new_tokens": 2, **changes}
    with pytest.raises(InputError, match=message):
        generate(lively_model(), arguments.pop("tokens"), arguments.pop("max_new_tokens"), **arguments)
