"""Bits per byte, held against probabilities taken one token at a time in float64."""

import contextlib
import json
import math
from pathlib import Path

import pytest
import torch

from attnlab.errors import InputError
from attnlab.model.llama import Llama
from attnlab.shapes import ModelShape
from attnlab.train import evaluate
from attnlab.train.evaluate import bits_by_position, bits_per_byte, load_tokenizer, tokenized


def a_model(vocab_size: int = 29, tied: bool = False) -> Llama:
    """Random weights, large enough that every token's probability differs."""
    torch.manual_seed(7)
    model = Llama(ModelShape(2, 20, 6, 2, 4, 23, vocab_size, tied_embeddings=tied))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.6)
    return model


def one_token_at_a_time(model: Llama, tokens: list[int], context: int) -> list[float]:
    """Bits of every token but the first: each from the prefix of its own window, alone, in float64."""
    wide, bits = Llama(model.shape).double(), []
    wide.load_state_dict(model.state_dict())
    for target in range(1, len(tokens)):
        start = (target - 1) // context * context
        with torch.no_grad():
            scores = wide(torch.tensor([tokens[start:target]]))[0, -1]
        probability = math.exp(scores[tokens[target]] - scores.max()) / torch.exp(scores - scores.max()).sum()
        bits.append(-math.log2(probability))
    return bits


@pytest.mark.parametrize("count", [2, 7, 8, 9, 22, 23, 53])
def test_every_token_but_the_first_is_predicted_once(count, monkeypatch):
    """Dropping the last partial window, predicting a window's first token never or twice, or letting one window look
    into another changes the loss by a few per mille, as much as the effects that are looked for. Lengths around one and
    several windows of 7; batches of two windows, scores in uneven pieces."""
    monkeypatch.setattr(evaluate, "BATCH", 2)
    monkeypatch.setattr(evaluate, "LOGITS", 5 * 29)
    model, tokens = a_model(), torch.randint(29, (count,), generator=torch.Generator().manual_seed(count))
    expected = one_token_at_a_time(model, tokens.tolist(), 7)
    assert bits_per_byte(model, tokens, 7) == pytest.approx(sum(expected) / (count - 1), rel=1e-5)
    bits, counts = bits_by_position(model, tokens, 7)
    assert bits.shape == counts.shape == (7,) and bits.dtype == torch.float64
    for position in range(7):  # by how many tokens a prediction sees: a rotated axis keeps the sum
        assert bits[position].item() == pytest.approx(sum(expected[position::7]), rel=1e-5)
        assert counts[position] == len(expected[position::7])


def test_bytes_divide_and_not_tokens():
    """Per token, a coarser tokenizer looks worse than it is: the same bits, over the bytes that they stand for."""
    model, tokens = a_model(), torch.randint(29, (40,), generator=torch.Generator().manual_seed(1))
    assert bits_per_byte(model, tokens, 7, 117) * 117 == pytest.approx(bits_per_byte(model, tokens, 7) * 39)


@pytest.mark.parametrize("vocab_size", [256, 37])
def test_knowing_nothing_costs_log2_of_the_vocabulary(vocab_size):
    """The one loss known beforehand: nats for bits, or a mean of means, shows at once."""
    model = a_model(vocab_size, tied=True)
    torch.nn.init.zeros_(model.embed_tokens.weight)
    assert bits_per_byte(model, torch.arange(31), 7) == pytest.approx(math.log2(vocab_size), rel=1e-6)


def test_long_windows_are_not_held_all_at_once(monkeypatch):
    """32 windows of 8192 tokens with a vocabulary of 49k are 51 GB of scores: evaluating a small published model ended
    in the out-of-memory killer. Counted here: tokens in one forward pass, and scores in one piece."""
    monkeypatch.setattr(evaluate, "WINDOW_TOKENS", 14)
    monkeypatch.setattr(evaluate, "LOGITS", 3 * 29)
    model, passes, pieces = a_model(), [], []
    hidden, logits = model.hidden, model.logits
    monkeypatch.setattr(model, "hidden", lambda tokens: (passes.append(tokens.numel()), hidden(tokens))[1])
    monkeypatch.setattr(model, "logits", lambda states: (pieces.append(len(states)), logits(states))[1])
    tokens = torch.randint(29, (45,), generator=torch.Generator().manual_seed(2))
    assert bits_per_byte(model, tokens, 5) > 0
    assert (sum(passes), sum(pieces)) == (44, 44)
    assert max(passes) == 10 and max(pieces) == 3
    passes.clear()
    bits_per_byte(model, tokens, 22)  # one window is more than the limit: then one at a time
    assert passes == [22, 22]


def test_what_cannot_be_evaluated_is_refused():
    """A loss of one token is a division by zero; so is a window of no tokens."""
    with pytest.raises(InputError, match="the text has 1 tokens, at least 2 are needed"):
        bits_per_byte(a_model(), torch.tensor([3]), 7)
    with pytest.raises(InputError, match="context must be between 1 and"):
        bits_per_byte(a_model(), torch.tensor([3, 4]), 0)


def test_a_byte_model_reads_bytes():
    """256 symbols need no tokenizer: every byte value is itself, and the first is not predicted."""
    text = bytes(range(256))
    tokens, predicted = tokenized(a_model(256), "no/such/directory", text)
    assert tokens.tolist() == list(text) and predicted == 255
    with pytest.raises(InputError, match="the text is empty"):
        tokenized(a_model(256), "no/such/directory", b"")


def a_tokenizer(directory: Path, bos: bool) -> Path:
    """A directory with a word-level tokenizer of transformers' own format, with or without a beginning of text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    vocabulary = {"<s>": 0, "<unk>": 1, "grüße": 2, "▁aus": 3, "▁Köln": 4}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    directory.mkdir()
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "unk_token": "<unk>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize(("bos", "ids", "predicted"), [(True, [0, 2, 3, 4], 17), (False, [2, 3, 4], 10)])
def test_predicted_bytes_are_those_of_all_tokens_but_the_first(tmp_path, bos, ids, predicted):
    """A beginning-of-text token stands for no byte, so the whole text is predicted; without one the first word is
    given, and its bytes (7, counted as UTF-8 and not as characters) must not be charged for."""
    directory = a_tokenizer(tmp_path / "tokenizer", bos)
    tokens, count = tokenized(a_model(), directory, "grüße aus Köln".encode())
    assert tokens.tolist() == ids
    assert count == predicted == len("grüße aus Köln".encode()) - (0 if bos else 7)


def test_text_that_is_not_utf8_is_refused(tmp_path):
    """Replacement characters would be scored in place of the user's text."""
    with pytest.raises(InputError, match="the text is not UTF-8"):
        tokenized(a_model(), tmp_path, b"caf\xe9")


def test_a_directory_without_a_usable_tokenizer_is_one_line(tmp_path):
    """An absent tokenizer or a damaged one raises half a dozen exception types inside transformers."""
    with pytest.raises(InputError, match=r"^no readable tokenizer in .*[^\n]$"):
        load_tokenizer(tmp_path)
    directory = a_tokenizer(tmp_path / "damaged", False)
    (directory / "tokenizer.json").write_text('{"version": "1.0", "model": ')
    with pytest.raises(InputError, match=r"^no readable tokenizer in .*[^\n]$"):
        load_tokenizer(directory)


def test_code_beside_a_tokenizer_is_never_run(tmp_path):
    """A downloaded directory is untrusted: a tokenizer that names its own Python file must not get to run it."""
    directory = a_tokenizer(tmp_path / "foreign", False)
    ran = tmp_path / "ran"
    (directory / "mine.py").write_text(f"open({str(ran)!r}, 'w')\nclass Mine: pass\n")
    config = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    with contextlib.suppress(InputError):  # the plain tokenizer.json beside it may still be read
        load_tokenizer(directory)
    assert not ran.exists()
