"""The blog post: what stands in it comes from somewhere."""

import re

import pandas
import pytest

from attnlab import InputError, load_results, post
from attnlab.effects import effects, finished
from attnlab.results import REPOSITORY, headline


@pytest.fixture(scope="module")
def rows():
    return load_results()


@pytest.fixture(scope="module")
def built(rows):
    return post.build(rows)


@pytest.mark.parametrize("claim", ["is 3 times as fast", "loses 0.3 %", "in 2019", "wins by +.4"])
def test_a_number_typed_into_the_text_fails_the_build(claim):
    """A post outlives its rows: whatever is typed in stays, right or wrong."""
    with pytest.raises(InputError, match="no row behind it"):
        post.build(pandas.DataFrame(), f"Sharing {claim}, {{middle}} at least.")


def test_names_may_hold_digits(rows):
    """A guard against every digit would forbid to name the model that one speaks of."""
    text = (
        "Llama 2 70B and GQA-8 in float32, `7 * 6`, [paper](https://arxiv.org/abs/2305.13245), arXiv 2305.13245\n1. one"
    )
    assert post.build(rows, text) == text


def test_a_place_without_a_fact_fails_the_build(rows):
    """A misspelt place would be published as {seedz}."""
    with pytest.raises(InputError, match="'seedz'"):
        post.build(rows, "{seedz}")


def test_missing_rows_fail_the_build(rows):
    """A post about a sweep that is not there, with an empty table in it."""
    with pytest.raises(InputError):
        post.build(rows[rows["kind"] != "quality"])
    with pytest.raises(InputError):
        post.build(rows[rows["kind"] != "decode"])


def test_every_fact_is_told(rows):
    """A fact that no place asks for is code that nobody reads."""
    text = post._TEXT.read_text(encoding="utf-8")
    assert set(post.facts(rows, headline())) == {match[1] for match in post._PLACE.finditer(text)}


def test_the_post_is_whole(built):
    """1,500 to 2,500 words and six to eight pictures that are there, each with words for who cannot see it."""
    assert 1_500 <= len(built.split()) <= 2_500
    pictures = re.findall(r"!\[([^\]]+)\]\(([^)]+)\)", built)
    assert 6 <= len(pictures) <= 9 and all(len(words) > 20 for words, _ in pictures)
    for _, file in [*pictures, *re.findall(r"(?<!!)\[([^\]]+)\]\(([^)]+)\)", built)]:
        assert (REPOSITORY / "figures" / file).exists(), file
    assert "{" not in built and "nan" not in built


def test_numbers_are_those_of_the_rows(rows, built):
    """Computed here by other means: bytes by hand, losses by the statistics of the figure."""
    assert "2,560 | 320 | 40" in built  # 2 · 80 layers · 128 · 2 bytes · (64, 8, 1) KV heads, in KiB
    assert "320 | 40 | 5 |" in built  # GiB of 32 · 4096 tokens of these
    for effect in effects(finished(rows, "g-sweep", headline())):
        assert f"{effect.mean:+.4f} ± {effect.half_width:.4f}, {effect.verdict}" in built
