"""Figures that move: what comes when, in the SVG, in the GIF and in the picture that stands still."""

import io
import re
from xml.etree import ElementTree

import numpy
from PIL import Image

from attnlab.plots import files, motion, style
from attnlab.plots.teaching import cache_growth


def squares(figure, frame):
    """How many squares of the cache are to be seen in ``frame``."""
    motion.show(figure, frame)
    return [sum(patch.get_visible() for patch in axes.patches) for axes in figure.axes]


def test_a_cache_grows_by_one_token_a_step_in_every_kv_head():
    """The prompt comes at once, and whoever draws it token by token teaches that prefill is decode."""
    figure = cache_growth()
    assert motion.frames(figure) == 5
    assert [squares(figure, frame) for frame in range(5)] == [[8 * n, 2 * n, n] for n in (4, 5, 6, 7, 8)]
    said = [text.get_text() for text in figure.axes[1].texts if text.get_visible() and "KiB" in text.get_text()]
    assert said == ["8 tokens, 8 KiB\nall read for the next token"]


def test_the_svg_moves_by_itself(tmp_path):
    """One id twice is no valid SVG; a rule for a class that is not there moves nothing."""
    svg, gif, png, *_ = files.save(cache_growth(), tmp_path / "growth")
    text = svg.read_text()
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids)) and not any(motion._GID.fullmatch(name) for name in ids)
    used = {name for name in re.findall(r'class="([^"]+)"', text) if motion._GID.fullmatch(name)}
    assert used >= {"from-1", "from-4", "only-0", "only-4"}
    assert all(f".{name}{{" in text and f"@keyframes {name}{{" in text for name in used - {"from-0"})
    assert "prefers-reduced-motion" in text
    ElementTree.fromstring(text)
    with Image.open(gif) as moving, Image.open(png) as still:
        assert moving.n_frames == 5 and moving.info["loop"] == 0
        final = numpy.asarray(still.convert("RGB").resize(moving.size), float)
        off = []
        for frame in range(5):
            moving.seek(frame)
            off.append(abs(numpy.asarray(moving.convert("RGB"), float) - final).mean())
    assert off == sorted(off, reverse=True) and off[4] < 0.8 * off[3]  # what stands still is the last frame


def test_what_stands_still_is_saved_as_ever(tmp_path):
    """A style and a GIF for every figure would be noise in each of them."""
    figure, axes = style.canvas("t", "s", "f", 2.0)
    axes.plot([1, 2], gid="from-scratch")
    written = files.save(figure, tmp_path / "still")
    assert [path.name for path in written] == ["still.svg", "still.png", "still.dark.svg", "still.dark.png"]
    assert b"@keyframes" not in written[0].read_bytes()
    assert io.BytesIO(written[1].read_bytes()).read(4) == b"\x89PNG"
