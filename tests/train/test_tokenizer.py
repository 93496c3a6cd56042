"""Text to tokens and back: nothing lost, whatever the text, and the same tokens that SentencePiece itself gives."""

import email
import io
import random
from pathlib import Path

import pytest
import sentencepiece

from attnlab.errors import InputError
from attnlab.train.tokenizer import MARK, Tokenizer

SOURCES = [path.read_text() for path in sorted(Path(email.__file__).parent.glob("*.py"))] + ["斑馬在草原上。\n" * 300]


@pytest.fixture(scope="module", params=[1024, 3001])
def words(request: pytest.FixtureRequest) -> Tokenizer:
    return Tokenizer.train(SOURCES, request.param)


@pytest.fixture(scope="module")
def llama_like() -> bytes:
    """A model of SentencePiece's own making, with the settings of LLaMA's ``tokenizer.model``."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in SOURCES for line in text.split("\n") if line),
        **{"model_writer": model, "model_type": "bpe", "vocab_size": 1024, "minloglevel": 2, "num_threads": 1},
        **{"split_digits": True, "byte_fallback": True, "normalization_rule_name": "identity"},
        **{"remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True, "add_dummy_prefix": True},
    )
    return model.getvalue()


ATOMS = [
    *("def f(x):\n    return x ** 2", "import", " ", "  ", "\t", "\n", "\r\n", "\r", "\0", "\x1b[0m", "\x7f", "\x85"),
    *("斑馬", "在草原上。", "日本語", "한국어", "Ünïcödé", "e\u0301", "\u0301", "ﬁ", "①", "\u00a0", "\u3000", "\u2028"),
    *("🦓", "👩\u200d👩\u200d👧", "🏳\ufe0f\u200d🌈", "\u200d", "\ufeff", "\ufffd", "\uffff", "\ue000", "\U0010ffff"),
    *("<s>", "</s>", "<unk>", "<0x0A>", "<pad>", "1234567890", "٣", MARK, MARK + " ", " " + MARK, "\u2580", "\u2585"),
]


def random_texts(count: int) -> list[str]:
    """The same ones every time: pieces that have broken tokenizers, and any code point that UTF-8 can write."""
    draw = random.Random(11)
    anything = [chr(code) for code in draw.sample([*range(0xD800), *range(0xE000, 0x110000)], 5000)]
    return ["".join(draw.choice(ATOMS + anything[:50]) for _ in range(draw.randrange(30))) for _ in range(count)] + [
        *ATOMS,
        "".join(anything),
    ]


def test_nothing_is_lost(words: Tokenizer) -> None:
    """SentencePiece's defaults fold characters, squeeze spaces and put one in front, and even without them its own sign
    for a space, U+2581, comes back as a space."""
    for text in random_texts(300):
        tokens = words.encode(text)
        assert words.decode(tokens) == text
        assert all(0 <= token < words.vocab_size for token in tokens)


def test_tokens_are_sentencepieces_own(words: Tokenizer) -> None:
    """The escape for U+2581 must not touch other texts: cutting one anywhere else changes its merges."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=words.model)
    for text in [*SOURCES[:3], *random_texts(100)]:
        if MARK not in text:
            assert words.encode(text) == processor.encode_as_ids(text)
        assert processor.decode_ids(words.encode(text)) == text


def test_the_vocabulary_is_laid_out_as_llamas(words: Tokenizer) -> None:
    """arXiv 2302.13971, section 2.1: digits stand alone, and what the vocabulary lacks is spelled in UTF-8 bytes, which
    lie behind <unk>, <s> and </s>; a vocabulary with numbers in it reads 1234 otherwise than 1235."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=words.model)
    pieces = [processor.id_to_piece(index) for index in range(words.vocab_size)]
    assert pieces[:3] == ["<unk>", "<s>", "</s>"] and words.end == 2
    assert pieces[3:259] == [f"<0x{byte:02X}>" for byte in range(256)]
    assert not [piece for piece in pieces[259:] if any(map(str.isdigit, piece)) and len(piece) > 1]
    assert len(words.encode("31415926")) == 8
    for strange in ("𓃟", MARK, "\0", "\n"):
        assert words.encode(strange) == [3 + byte for byte in strange.encode()]
    assert words.decode([3 + 0xF0]) == "\ufffd" and words.decode([1, 2]) == ""
    assert [pieces[token] for token in words.encode("斑馬在草原上。")] == ["斑馬在草原上", "。"]


def test_the_same_texts_give_the_same_vocabulary() -> None:
    """Corpora are told apart by this digest; one that changes between two builds keeps rows from being compared."""
    first, again, other = (Tokenizer.train(iter(texts), 1024) for texts in (SOURCES, list(SOURCES), SOURCES[1:]))
    assert first.model == again.model and first.digest == again.digest != other.digest
    assert len(first.digest) == 16


@pytest.mark.parametrize(
    ("text", "piece"),
    [
        ("zebrawood " * 1000, "zebrawood"),  # 10,000 bytes
        ("斑馬木" * 3000, "斑馬木"),  # three bytes a character
        ("\u2585 zebrawood\n" * 300, " zebrawood"),
        ("\0 zebrawood\n" * 300, " zebrawood"),
        (f"{MARK}zebrawood\n" * 300, "zebrawood"),  # a piece with U+2581 would stand for a space
    ],
)
def test_no_line_is_left_out_of_training(text: str, piece: str) -> None:
    """SentencePiece drops, and tells nobody, lines of more than 4192 bytes (minified code, a page of Chinese) and lines
    that hold its own sign for the unknown."""
    assert len(Tokenizer.train([*SOURCES[:9], text], 1024).encode(piece)) == 1


def test_llamas_own_tokenizer_loads(llama_like: bytes, tmp_path: Path) -> None:
    """It puts a space in front of every text: cutting a text at U+2581 would put one into its middle."""
    (tmp_path / "tokenizer.model").write_bytes(llama_like)
    words = Tokenizer.load(tmp_path)
    processor = sentencepiece.SentencePieceProcessor(model_proto=llama_like)
    for text in random_texts(300):
        assert words.encode(text) == processor.encode_as_ids(text)
        assert words.decode(words.encode(text)) == text.replace(MARK, " ")


def test_saved_and_loaded(words: Tokenizer, tmp_path: Path) -> None:
    """From the file or its directory; what cannot be written leaves what was there."""
    words.save(tmp_path / "deep" / "tokenizer.model")
    for path in (tmp_path / "deep", tmp_path / "deep" / "tokenizer.model"):
        assert Tokenizer.load(path).digest == words.digest
    with pytest.raises(InputError, match="cannot write"):
        words.save(tmp_path / "deep")
    assert Tokenizer.load(tmp_path / "deep").digest == words.digest


@pytest.mark.parametrize(
    ("texts", "vocab_size", "said"),
    [
        (SOURCES, 1023, "vocab_size must be between 1024 and"),
        (SOURCES, 32769, "vocab_size must be between 1,024 and 32,768, got 32,769"),
        (SOURCES, 1024.0, "vocab_size must be a whole number"),
        (["abc"], 1024, "no vocabulary of 1,024 can be learned from this text: .*a value <= 265"),
        ([], 1024, "the text is empty"),
        (["\n\n", "\0"], 1024, "the text is empty"),
    ],
)
def test_what_no_vocabulary_can_be_learned_from(texts: list[str], vocab_size: int, said: str) -> None:
    """SentencePiece's own words for these are a line of its C++."""
    with pytest.raises(InputError, match=said):
        Tokenizer.train(texts, vocab_size)


def test_what_is_no_tokenizer_and_what_is_no_text(words: Tokenizer, tmp_path: Path) -> None:
    """An empty file was taken, and ended in a traceback at its first use; a model without byte fallback turns text into
    question marks."""
    lossy = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SOURCES[0].split("\n")), model_writer=lossy, vocab_size=120, minloglevel=2
    )
    for model, said in ((b"", "not a"), (b"junk", "not a"), (lossy.getvalue(), "cannot spell every text")):
        with pytest.raises(InputError, match=said):
            Tokenizer(model)
    with pytest.raises(InputError, match=r"cannot read the tokenizer .*tokenizer.model: No such file"):
        Tokenizer.load(tmp_path)
    for text in ("\ud83e", f"{MARK}\ud83e"):
        with pytest.raises(InputError, match="half of a surrogate pair"):
            words.encode(text)
    for token in (-1, words.vocab_size, 2**40):
        with pytest.raises(InputError, match=f"token {token} is not below the vocabulary's"):
            words.decode([5, token])
