"""How a figure becomes files: the same figure gives the same bytes, on light pages and on dark ones, with words for
those who cannot see it."""

import base64
import io
import re
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import matplotlib.style
import numpy
from matplotlib.figure import Figure

from attnlab.errors import check_choice, write_whole
from attnlab.plots import motion
from attnlab.plots.style import DPI, SETTINGS

STYLES = {"blog": DPI, "slide": 240, "paper": DPI}
"""Dots per inch. A blog and a slide get SVG and PNG, each for dark pages too; a paper gets PDF, on white."""
# A dark page has white and black exchanged and every hue kept: invert, then turn hues by half a circle at constant
# luminance (the CSS filters of these names), a little short of black. As the map is affine, letters with soft edges in
# a PNG and colours in an SVG come out alike.
_KEPT, _FLOOR = 0.9, 0.09
_LUMA = numpy.array([0.213, 0.715, 0.072])
_TURNED = 2 * numpy.tile(_LUMA, (3, 1)) - numpy.eye(3)
_HEX, _INLINE = re.compile(r"#[0-9a-f]{6}\b"), re.compile(r"(data:image/png;base64,)([^\"]+)")


def save(figure: Figure, stem: Path, words: str = "", kind: str = "blog") -> list[Path]:
    """Write ``figure`` as ``kind``, one of ``STYLES``, wants it: ``stem``.svg, .png, .dark.svg, .dark.png, of one that
    moves also .gif; or .pdf. ``words`` say what is to be seen. Raises ``InputError`` where that is not possible."""
    dpi = STYLES[check_choice("style", kind, STYLES)]
    _settle(figure)
    count = motion.frames(figure)
    with matplotlib.style.context(["default", SETTINGS]):
        files = _paper(figure, count) if kind == "paper" else _pictures(figure, count, words, dpi)
    for ending, content in files.items():
        write_whole(stem.with_name(f"{stem.name}.{ending}"), content)
    return [stem.with_name(f"{stem.name}.{ending}") for ending in files]


def _pictures(figure: Figure, count: int, words: str, dpi: int) -> dict[str, bytes]:
    svg = _drawn(figure, "svg", dpi, {"Date": None, "Creator": None}).decode()
    svg = svg if count == 1 else motion.moved(svg, count)
    title = figure.texts[0].get_text() if figure.texts else ""
    named = f"<title>{escape(title)}</title>\n <desc>{escape(words)}</desc>\n "
    svg = svg.replace("<svg ", '<svg role="img" ', 1).replace("<metadata>", f"{named}<metadata>", 1)
    moving = {"gif": motion.gif(figure, count, 2 * dpi // 3)} if count > 1 else {}
    motion.show(figure, count - 1)
    png = _drawn(figure, "png", dpi, {"Software": None, "Title": title, "Description": words})
    return {"svg": svg.encode(), **moving, "png": png, "dark.svg": dark_svg(svg).encode(), "dark.png": dark_png(png)}


def _paper(figure: Figure, count: int) -> dict[str, bytes]:
    motion.show(figure, count - 1)
    figure.set_facecolor("white")
    for axes in figure.axes:
        axes.set_facecolor("white")
    return {
        "pdf": _drawn(figure, "pdf", DPI, {"CreationDate": None, "Creator": None, "Producer": None}, facecolor="white")
    }


def _drawn(figure: Figure, kind: str, dpi: int, metadata: dict[str, Any], **more: Any) -> bytes:
    drawn = io.BytesIO()
    figure.savefig(drawn, format=kind, dpi=dpi, metadata=metadata, **more)
    return drawn.getvalue()


def dark(colours: Any) -> Any:
    """Colours [..., 3] (0 to 1) of a light page, as a dark page shows them."""
    return numpy.clip(_FLOOR + _KEPT * (1 - numpy.asarray(colours, float)) @ _TURNED.T, 0, 1)


def dark_svg(svg: str) -> str:
    """An SVG of matplotlib's with ``dark`` colours, pictures in it included."""

    def colour(match: re.Match[str]) -> str:
        parts = dark([int(match[0][at : at + 2], 16) / 255 for at in (1, 3, 5)])
        return "#" + "".join(f"{round(255 * part):02x}" for part in parts)

    def picture(match: re.Match[str]) -> str:
        return match[1] + base64.b64encode(dark_png(base64.b64decode(match[2]))).decode()

    return _INLINE.sub(picture, _HEX.sub(colour, svg))


def dark_png(png: bytes) -> bytes:
    """A PNG with ``dark`` colours, its words kept."""
    from PIL import Image, PngImagePlugin

    words, drawn = PngImagePlugin.PngInfo(), io.BytesIO()
    with PngImagePlugin.PngImageFile(io.BytesIO(png)) as light:
        for name, text in light.text.items():
            words.add_text(name, text)
        pixels = numpy.asarray(light.convert("RGBA")).copy()
        dpi = light.info.get("dpi")
    pixels[..., :3] = numpy.rint(255 * dark(pixels[..., :3] / 255))
    Image.fromarray(pixels).save(drawn, "PNG", pnginfo=words, **({"dpi": dpi} if dpi else {}))
    return drawn.getvalue()


def _settle(figure: Figure) -> None:
    """Lay the axes out once and round where they stand: the layout's solver, which orders its variables by their
    addresses, gives other last digits in every process."""
    engine = figure.get_layout_engine()
    if engine is not None:
        with matplotlib.style.context(["default", SETTINGS]):
            engine.execute(figure)
        figure.set_layout_engine("none")
        for axes in figure.axes:
            left, bottom, width, height = (round(part, 4) for part in axes.get_position(original=True).bounds)
            axes.set_position((left, bottom, width, height))
