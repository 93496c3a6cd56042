"""A machine's roofs: written and read back to the last digit, and nothing else taken for a machine."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from attnlab.errors import InputError
from attnlab.predict.machine import Machine, published_machines

MINE = Machine(
    name="seven-cores",
    device="cpu",
    read_bandwidth=1.1e10 / 3,
    copy_bandwidth=1.3e10 / 7,
    matmul_rate={"float32": 1.7e11 / 3, "bfloat16": 1.9e9 / 7},
    call_seconds=2.3e-5 / 3,
    memory_bytes=29 * 2**30 + 1,
    spread={"read_bandwidth": 0.031},
)


def test_a_machine_survives_its_file(tmp_path: Path) -> None:
    """Rounded or dropped digits give predictions that no row's roofs explain; a folder that is absent is made."""
    path = tmp_path / "deep" / "mine.json"
    MINE.save(path)
    assert Machine.load(path) == Machine.load(str(path)) == MINE
    assert [file.name for file in path.parent.iterdir()] == ["mine.json"]


def test_saving_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fills up while a machine is saved must not cost the machine that was there."""
    path = tmp_path / "mine.json"
    MINE.save(path)

    def full(self: Path, content: bytes) -> None:
        with self.open("wb") as file:
            file.write(content[:9])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(InputError, match=r"^cannot write .*mine\.json: No space left on device$"):
        replace(MINE, name="other").save(path)
    assert Machine.load(path) == MINE


def test_saving_where_nothing_can_be_is_one_line(tmp_path: Path) -> None:
    """The folder is a file."""
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"^cannot write .*file.mine\.json: "):
        MINE.save(tmp_path / "file" / "mine.json")


def test_an_absent_file_says_how_to_make_one(tmp_path: Path) -> None:
    """Whoever mistypes a path should learn the command, not read a stack."""
    with pytest.raises(InputError, match=r"no machine file at .*absent.json; make one with: attnlab machine --out"):
        Machine.load(tmp_path / "absent.json")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"name": "torn", "read_band',
        b"[1, 2]",
        b"null",
        b'"h100"',
        b"{}",
        b'{"name": "m", "speed": 3}',
        b"\xff\xfe\x00",
        b"[" * 100_000,
        json.dumps(asdict(MINE) | {"matmul_rate": [1e9]}).encode(),
        json.dumps(asdict(MINE) | {"matmul_rate": None}).encode(),
    ],
    ids=["empty", "torn", "list", "null", "string", "no fields", "other fields", "binary", "deep", "rates", "no rates"],
)
def test_a_damaged_file_is_one_line(tmp_path: Path, content: bytes) -> None:
    """A file of somebody else's, or half of one, raises half a dozen exception types below; the user sees one."""
    path = tmp_path / "damaged.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"damaged\.json is not a machine file .*: attnlab machine --out FILE$|_rate"):
        Machine.load(path)


def test_a_folder_is_no_machine(tmp_path: Path) -> None:
    """A run's folder given for the machine.json in it."""
    with pytest.raises(InputError, match="is not a machine file"):
        Machine.load(tmp_path)


@pytest.mark.parametrize("field", ["read_bandwidth", "copy_bandwidth", "call_seconds", "memory_bytes"])
@pytest.mark.parametrize("wrong", [0, -1.5, float("nan"), float("inf"), True, "4e10", None])
def test_wrong_values_are_named(tmp_path: Path, field: str, wrong: object) -> None:
    """A bandwidth of zero divides, a negative one predicts the past, infinity and NaN are valid JSON to Python."""
    with pytest.raises(InputError, match=f"a machine's {field} must be a number above 0, got"):
        replace(MINE, **{field: wrong})
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps(asdict(MINE) | {field: wrong}))
    with pytest.raises(InputError, match=f"a machine's {field} must be a number above 0, got"):
        Machine.load(path)


@pytest.mark.parametrize("wrong", [{}, {"float32": 0}, {"float32": 1e9, "bfloat16": float("inf")}, {"float32": "fast"}])
def test_wrong_rates_are_named(wrong: dict[str, object]) -> None:
    """One bad rate beside good ones waits for the first question about its dtype."""
    with pytest.raises(
        InputError, match=r"at least one matmul_rate|matmul_rate of (float32|bfloat16) must be a number above 0"
    ):
        replace(MINE, matmul_rate=wrong)


@pytest.mark.parametrize(("asked", "near"), [("h10", "h100"), ("A100", "a100-80gb"), ("rtx4090", "rtx-4090")])
def test_an_unknown_card_is_answered_with_near_names(asked: str, near: str) -> None:
    """Names of cards are spelt in many ways."""
    with pytest.raises(InputError, match=f"unknown machine '{asked}'; did you mean .*{near}.*valid: a100-80gb, h100"):
        Machine.published(asked)


def test_published_cards_are_their_datasheets() -> None:
    """Rates "with sparsity" are twice the dense ones, and a GB is no GiB: the numbers makers print, with their source,
    and marked as published so that nobody takes them for measured."""
    printed = {  # TB/s, dense Tflop/s in bfloat16 and float32, memory
        "a100-80gb": (2.039, 312, 19.5, 80 * 2**30),
        "h100": (3.35, 989, 67, 80 * 2**30),
        "h200": (4.8, 989, 67, 141e9),
        "rtx-4090": (1.008, 165.2, 82.6, 24 * 2**30),
    }
    assert published_machines() == list(printed)
    for name, (bandwidth, half, single, memory) in printed.items():
        card = Machine.published(name)
        assert (card.name, card.device, card.memory_bytes) == (name, "cuda", memory)
        assert card.source.startswith("published: ") and not card.spread
        assert card.read_bandwidth == pytest.approx(bandwidth * 1e12)
        assert card.compute_roof("bf16") == card.compute_roof(torch.float16) == pytest.approx(half * 1e12)
        assert card.compute_roof("float32") == pytest.approx(single * 1e12)
    assert MINE.source == "measured"


def test_on_a_cpu_16_bit_arithmetic_may_run_in_32() -> None:
    """Against the slow native rate, a kernel that converts to float32 stands above its roof and is called
    impossible for being good. On a card the 16-bit rate counts alone; no dtype ever borrows a narrower one's."""
    single, half = MINE.matmul_rate["float32"], MINE.matmul_rate["bfloat16"]
    assert half < single
    assert MINE.compute_roof("bfloat16") == MINE.compute_roof("float16") == MINE.compute_roof(torch.float32) == single
    native = replace(MINE, matmul_rate={"float32": single, "bfloat16": 3 * single})
    assert (native.compute_roof("bf16"), native.compute_roof("fp32")) == (3 * single, single)
    assert replace(MINE, device="cuda").compute_roof("bfloat16") == half


def test_a_rate_that_is_unknown_is_not_guessed() -> None:
    """float64 on a card whose float64 was never measured: any number would be an invention."""
    with pytest.raises(InputError, match=r"h100 has no matmul rate for float64; known: bfloat16, float16, float32"):
        Machine.published("h100").compute_roof("float64")
    with pytest.raises(InputError, match="unknown dtype 'fp7'"):
        MINE.compute_roof("fp7")
