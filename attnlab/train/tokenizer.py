"""Text to tokens and back without loss: SentencePiece BPE as LLaMA's (arXiv 2302.13971, section 2.1).

Digits stand alone, what the vocabulary lacks is spelled in bytes, and the text is taken as it is: SentencePiece's own
defaults fold characters, squeeze spaces and put one in front, which loses code.
"""

import hashlib
import io
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

import sentencepiece

from attnlab.errors import InputError, check_size, write_whole

SMALLEST, LARGEST = 1024, 32768
MARK = "\u2581"  # how SentencePiece spells a space: a text's own must be spelled in bytes to come back
_LINE = 4000  # bytes; SentencePiece leaves out of its training, silently, what is longer than 4192


class Tokenizer:
    """``encode`` and ``decode`` are inverse on any text. ``model`` is SentencePiece's own file format: LLaMA's
    ``tokenizer.model`` loads too (with its dummy space in front it is inverse on texts without U+2581)."""

    def __init__(self, model: bytes) -> None:
        self.model = model
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)  # the constructor takes an empty model for none
        except RuntimeError:
            raise InputError("not a SentencePiece model; give a file made by: attnlab tokenizer train") from None
        self._mark = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in MARK.encode()]
        if self._processor.unk_id() in self._mark or self.end < 0:
            raise InputError("the tokenizer cannot spell every text: it needs byte fallback and an end of text </s>")
        # Cutting a text at its marks is right only where a piece's beginning is not given a space of its own.
        self._plain = not self._processor.encode("a", out_type=str)[0].startswith(MARK)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """A vocabulary of ``vocab_size`` learned from ``texts``, the same for the same texts. Raises ``InputError`` on
        a size outside 1,024 to 32,768 or above what the texts can fill."""
        if check_size("vocab_size", vocab_size, SMALLEST) > LARGEST:
            raise InputError(f"vocab_size must be between {SMALLEST:,} and {LARGEST:,}, got {vocab_size:,}")
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=_lines(texts),
                model_writer=model,
                model_type="bpe",
                vocab_size=vocab_size,
                split_digits=True,
                byte_fallback=True,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                allow_whitespace_only_pieces=True,
                character_coverage=0.9999,
                num_threads=1,
                minloglevel=2,
            )
        except RuntimeError as error:
            reason = str(error).rpartition("] ")[2].strip() or "the text is empty"
            raise InputError(f"no vocabulary of {vocab_size:,} can be learned from this text: {reason}") from None
        return cls(model.getvalue())

    @classmethod
    def load(cls, path: Path | str) -> "Tokenizer":
        """The tokenizer in a file, or in a directory's ``tokenizer.model``."""
        path = Path(path) / "tokenizer.model" if Path(path).is_dir() else Path(path)
        try:
            return cls(path.read_bytes())
        except OSError as error:
            raise InputError(f"cannot read the tokenizer {path}: {error.strerror}") from None

    def save(self, path: Path) -> None:
        """Write SentencePiece's file, entirely or not at all; raises ``InputError`` where that is not possible."""
        write_whole(path, self.model)

    @property
    def vocab_size(self) -> int:
        return self._processor.vocab_size()

    @property
    def end(self) -> int:
        """The token that ends a document."""
        return self._processor.eos_id()

    @cached_property
    def digest(self) -> str:
        """Sixteen hexadecimal digits of the vocabulary: tokens of different ones must not be mixed."""
        return hashlib.sha256(self.model).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """Tokens of ``text``, no beginning or end added. Raises ``InputError`` on half a surrogate pair."""
        try:
            parts = self._processor.encode(text.split(MARK) if self._plain else [text])
        except (UnicodeEncodeError, TypeError):  # SentencePiece's, the second for one text of several
            raise InputError("the text holds half of a surrogate pair, which UTF-8 cannot write") from None
        tokens = parts[0]
        for part in parts[1:]:
            tokens += self._mark + part
        return tokens

    def decode(self, tokens: list[int]) -> str:
        """The text of ``tokens``; half a character becomes U+FFFD."""
        if bad := [token for token in tokens if not 0 <= token < self.vocab_size]:
            raise InputError(f"token {bad[0]} is not below the vocabulary's {self.vocab_size:,}")
        return self._processor.decode(tokens)


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """What training reads: lines, long ones cut, without the characters for which SentencePiece drops a line or takes a
    space (U+2585 is its own sign for what it does not know)."""
    for text in texts:
        for line in text.translate({0: None, 0x2581: None, 0x2585: None}).split("\n"):
            for start in range(0, len(line), _LINE // 4):
                yield line[start : start + _LINE // 4]
