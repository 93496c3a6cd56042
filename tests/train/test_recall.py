"""Recall: sequences read back in plain Python, and judged models whose accuracy is known by construction."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from attnlab.errors import InputError
from attnlab.train.recall import Recall


def answers(tokens: list[int], pairs: int, relations: int) -> dict[int, int]:
    """Every key of the facts a sequence starts with -> the value behind it."""
    size = relations + 1
    facts = [tokens[i * size : (i + 1) * size] for i in range(pairs)]
    return {key: fact[-1] for fact in facts for key in fact[:-1]}


class Answering:
    """Stands where a model stands, and knows the answers to the questions about the first ``known`` facts."""

    def __init__(self, task: Recall, known: int) -> None:
        self.task, self.known, self.seen = task, known, []
        self.embed_tokens = SimpleNamespace(weight=torch.zeros(()))

    def hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        self.seen.append(tokens)
        rows = [(row, answers(row, self.known, self.task.relations)) for row in tokens.tolist()]
        return torch.tensor([[known.get(token, 0) for token in row] for row, known in rows])

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.one_hot(hidden, self.task.vocab_size)


@pytest.mark.parametrize("relations", [1, 3])
def test_every_fact_is_asked_once_and_its_value_is_the_target(relations):
    """A query that drew its key and its target from different facts trains to chance; one whose keys repeat has two
    right answers; a target one place late asks for the token after the question. Each sequence is read back."""
    pairs = 11
    inputs, targets = Recall(((71, pairs),), relations, vocab_size=89).batch(seed=3, step=7, batch=17, context=71)
    assert inputs.shape == targets.shape == (17, 71)
    assert inputs.dtype == targets.dtype == torch.int64
    part = 43 // relations
    used = set()
    for row, expected in zip(inputs.tolist(), targets.tolist(), strict=True):
        told, value_of = pairs * (relations + 1), answers(row, pairs, relations)
        assert len(value_of) == pairs * relations
        values = set(value_of.values())
        assert len(values) == pairs and all(44 <= value < 89 for value in values)
        for i in range(relations):
            keys = row[i : told : relations + 1]
            assert all(1 + i * part <= key < 1 + (i + 1) * part for key in keys)
        asked = [i for i in range(71) if expected[i] != -100]
        assert sorted(expected[i] for i in asked) == sorted(values)
        assert all(expected[i] == value_of[row[i]] for i in asked)
        assert all((i - told) % 2 == 0 for i in asked)
        assert not any(row[i] for i in range(told, 71) if i not in asked), "something between the questions"
        used |= {(row[i] - 1) // part for i in asked}
    assert used == set(range(relations)), "a relation is never asked for"


def test_gaps_follow_the_power_law():
    """Uniform gaps are another task (its questions lie far from their facts): where the first fact is asked for has
    probability i^(−0.99) over its sum, and 5 deviations of 20,000 draws tell it from uniform."""
    draws = 20_000
    _, targets = Recall(((24, 1),), vocab_size=8).batch(seed=0, step=0, batch=draws, context=24)
    counts = (targets[:, 2::2] >= 0).sum(0)
    chances = [i**-0.99 for i in range(1, 12)]
    for count, chance in zip(counts.tolist(), chances, strict=True):
        p = chance / sum(chances)
        assert abs(count / draws - p) < 5 * (p * (1 - p) / draws) ** 0.5


def test_a_batch_is_a_function_of_its_arguments_alone():
    """A resumed run, or another arm of the seed, must see what an uninterrupted one sees; the global generator is
    somewhere else by then."""
    task = Recall(((29, 3), (23, 2)), 2, vocab_size=37)
    first = task.batch(5, 7, 11, 29)
    torch.manual_seed(1)
    assert all(torch.equal(a, b) for a, b in zip(first, task.batch(5, 7, 11, 29), strict=True))
    assert first[0].shape == (11 * 29 // 23, 23) and task.batch(5, 8, 11, 29)[0].shape == (11, 29), "turn by turn"
    for seed, step in ((5, 11), (6, 7)):
        assert not torch.equal(first[0], task.batch(seed, step, 11, 29)[0]), "examples come again"


@pytest.mark.parametrize("known, accuracy", [(5, 1.0), (2, 0.4), (0, 0.0)])
def test_accuracy_is_the_share_of_questions_answered(known, accuracy):
    """Every fact is asked for once, so who knows 2 of 5 is right 2 times in 5, exactly. Counted over all tokens, or
    with padding among the questions, it would be another number."""
    task = Recall(((29, 5), (31, 5)), 2, vocab_size=43)
    parts = [{"context": length, "pairs": 5, "accuracy": accuracy} for length in (29, 31)]
    for whole in (False, True):
        assert task.evaluate(Answering(task, known), 29, whole) == {"accuracy": accuracy, "parts": parts}
    assert task.parts() == [{"context": length, "pairs": 5} for length in (29, 31)]


def test_held_out_sequences_are_the_same_for_all_and_never_trained_on():
    """torch keeps 32 bits of a CPU generator's seed, so seeds that are far apart as integers give the same sequences:
    steps at which a seed of training would reach one of evaluation are tried, from below and around 2^32."""
    task = Recall(((13, 2),), vocab_size=31)
    sample, whole, again = (Answering(task, 2) for _ in range(3))
    task.evaluate(sample, 13, whole=False)
    task.evaluate(whole, 13, whole=True)
    torch.manual_seed(1)
    task.evaluate(again, 13, whole=True)
    held_out = torch.cat(whole.seen)
    assert torch.equal(held_out, torch.cat(again.seen))
    assert torch.equal(held_out[: len(sample.seen[0])], sample.seen[0])
    assert len(held_out.unique(dim=0)) > 0.9 * len(held_out) > len(sample.seen[0])
    for step in (2**31, 2**31 + 4, 2**32 + 2**31):
        assert not torch.equal(task.batch(0, step, len(sample.seen[0]), 13)[0], sample.seen[0])


def test_rows_can_tell_tasks_apart():
    """Two tasks under one digest share a row's key, and the second is never run."""
    sizes = ((64, 4),), ((64, 8),), ((96, 4),), ((64, 4), (96, 4))
    tasks = [*map(Recall, sizes), Recall(sizes[0], 2), Recall(sizes[0], vocab_size=64)]
    assert len({task.digest for task in tasks}) == len(tasks)
    assert Recall(sizes[0], 2, 64).facts() == {"relations": 2, "task_vocab": 64}


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: Recall(((64, 0),)), "pairs must be between 1"),
        (lambda: Recall(((64, 4),), 0), "relations must be between 1"),
        (lambda: Recall(((64, 4),), 1, 2.5), "vocab_size must be a whole number"),
        (lambda: Recall(((66, 11),), 3, 67), "has 10 keys for each of 3 relations, .* 11 pairs .* at least 68 symbols"),
        (lambda: Recall(((24, 5),), 2, 32), "15 tokens to tell and 10 to ask, .* a length of 24"),
    ],
)
def test_what_cannot_be_told_or_asked_is_said(make, says):
    """torch's own words for it ("cannot sample n_sample > prob_dist.size(-1)") name nothing the user gave."""
    with pytest.raises(InputError, match=says):
        make()


def test_the_smallest_task_that_fits_is_taken():
    """The bounds that the errors name hold: one symbol and one token more than what is refused above."""
    inputs, _ = Recall(((66, 11),), 3, 68).batch(0, 0, 2, 66)
    assert inputs.shape == (2, 66)
