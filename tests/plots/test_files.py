"""Figures as files: for dark pages, for slides and papers, with words; and the gallery of them."""

import colorsys
import re
from xml.etree import ElementTree

import numpy
import pytest
from PIL import Image

from attnlab import InputError
from attnlab.plots import draw_all, files, style
from attnlab.plots.gallery import Card, gallery

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def figure():
    figure, axes = style.canvas("A & B", "what is < what", "rows: none", 2.0)
    axes.imshow(numpy.linspace(0, 1, 6).reshape(2, 3), aspect="auto", extent=(0, 1, 0.5, 0.9))
    axes.axhspan(0.2, 0.4, color="#D55E00")
    axes.set(ylim=(0, 1))
    return figure


def luminance(colour):
    linear = numpy.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]


def test_dark_keeps_hues_and_turns_light_into_dark():
    """Colours that are merely inverted make MHA blue and MQA orange, the opposite of every other figure."""
    for name in ("MHA", "GQA-16", "GQA-8", "GQA-4", "GQA-2", "MQA"):
        light = numpy.array([int(style.variant_colour(name)[at : at + 2], 16) / 255 for at in (1, 3, 5)])
        before, after = (colorsys.rgb_to_hls(*colour)[0] for colour in (light, files.dark(light)))
        assert min(abs(before - after), 1 - abs(before - after)) < 0.06, name
    paper, ink = files.dark([1, 0.99, 0.97]), files.dark([0.13, 0.13, 0.13])
    assert luminance(paper) < 0.02 and (luminance(ink) + 0.05) / (luminance(paper) + 0.05) > 7  # WCAG's AAA


def test_svg_and_png_are_dark_alike(figure, tmp_path):
    """The picture on a page and the one in a post made from it would differ; a picture inside an SVG stays light."""
    svg, png, dark_svg, dark_png = files.save(figure, tmp_path / "a")
    orange = "#" + "".join(f"{round(255 * part):02x}" for part in files.dark([0xD5 / 255, 0x5E / 255, 0]))
    assert "#d55e00" in svg.read_text() and "#d55e00" not in dark_svg.read_text() and orange in dark_svg.read_text()
    with Image.open(png) as light, Image.open(dark_png) as dark:
        assert light.size == dark.size and light.text == dark.text
        there = numpy.argwhere((numpy.asarray(light.convert("RGB")) == [0xD5, 0x5E, 0]).all(-1))[0]
        assert "#" + "".join(f"{part:02x}" for part in numpy.asarray(dark.convert("RGB"))[tuple(there)]) == orange
    inside = [re.search(r"base64,([^\"]{99})", path.read_text())[1] for path in (svg, dark_svg)]
    assert inside[0] != inside[1]


def test_words_are_in_the_files(figure, tmp_path):
    """Who cannot see a figure hears its title and its caption, from the file itself."""
    svg, png, dark_svg, _ = files.save(figure, tmp_path / "a", "Loss over G.")
    for path in (svg, dark_svg):
        root = ElementTree.parse(path).getroot()
        assert root.get("role") == "img"
        assert (root.find(f"{SVG}title").text, root.find(f"{SVG}desc").text) == ("A & B", "Loss over G.")
    with Image.open(png) as picture:
        assert (picture.text["Title"], picture.text["Description"]) == ("A & B", "Loss over G.")


def test_a_slide_is_wide_and_a_paper_is_white(figure, tmp_path):
    """Pictures of a blog's width are blurred on a wall, and a card of warm white stands out in a printed column."""
    _, slide, *_ = files.save(figure, tmp_path / "slide", kind="slide")
    with Image.open(slide) as picture:
        assert picture.size[0] == 1920
    (paper,) = files.save(figure, tmp_path / "paper", kind="paper")
    again = files.save(figure, tmp_path / "again", kind="paper")[0]
    assert paper.suffix == ".pdf" and paper.read_bytes() == again.read_bytes()
    assert {figure.get_facecolor(), figure.axes[0].get_facecolor()} == {(1.0, 1.0, 1.0, 1.0)}
    with pytest.raises(InputError, match=r"unknown style 'poster'; .*valid: blog, slide, paper"):
        files.save(figure, tmp_path / "poster", kind="poster")


def test_a_gallery_names_rows_commands_and_words():
    """A picture without its source is passed on without it."""
    cards = [
        Card("quality", "zen", "Loss <of> each.", "CPU · rows: r7"),
        Card("kv", "", "c.", "f"),
    ]
    page = gallery(cards, explorer=False)
    assert '<img src="quality.zen.svg" alt="Loss &lt;of&gt; each."' in page and "rows: r7" in page
    assert 'srcset="kv.dark.svg" media="(prefers-color-scheme: dark)"' in page
    assert "attnlab figures --only quality" in page and "explorer.html" not in page
    assert "explorer.html" in gallery(cards, explorer=True)


def test_a_gallery_is_of_all_figures_or_none(tmp_path):
    """Drawing one figure again must not leave a gallery of that one."""
    assert not any(path.name == "index.html" for path in draw_all(None, tmp_path, only="capacity"))
    written = draw_all(None, tmp_path, say=lambda _: None)
    page = (tmp_path / "index.html").read_text()
    assert written[-1] == tmp_path / "index.html"
    links = {link for link in re.findall(r'(?:href|src|srcset)="([^"#]+)"', page) if not link.startswith("http")}
    assert links and all((tmp_path / link).exists() for link in links)
