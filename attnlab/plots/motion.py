"""Figures that move. An artist whose gid is "from-3" appears at frame 3 and stays; one called "only-3" is there in that
frame alone. The figure itself is all frames at once; what is saved is an SVG that a browser moves, a GIF, and the last
frame as PNG."""

import io
import re

from matplotlib.artist import Artist
from matplotlib.figure import Figure

SECONDS, REST = 0.9, 2.0
"""Of a frame, and how much longer the last one stays."""
_GID = re.compile(r"(from|only)-(\d+)")


def moving(figure: Figure) -> dict[Artist, tuple[str, int]]:
    """The artists that come or go, each with its way and its frame; none in a figure that stands still."""
    named = ((artist, _GID.fullmatch(str(artist.get_gid()))) for artist in figure.findobj())
    return {artist: (match[1], int(match[2])) for artist, match in named if match}


def frames(figure: Figure) -> int:
    """How many frames ``figure`` has; 1 where nothing moves."""
    return 1 + max((frame for _, frame in moving(figure).values()), default=0)


def show(figure: Figure, frame: int) -> None:
    """Let only what belongs to ``frame`` be drawn."""
    for artist, (way, own) in moving(figure).items():
        artist.set_visible(own <= frame if way == "from" else own == frame)


def moved(svg: str, count: int) -> str:
    """``svg`` of a whole figure with the style that makes its parts come and go, in ``count`` frames."""
    whole, rules = SECONDS * count + REST, []
    for frame in range(count):
        start, end = (100 * SECONDS * at / whole for at in (frame, frame + 1))
        rules.append(f"@keyframes from-{frame}{{0%{{opacity:0}}{start:.2f}%,100%{{opacity:1}}}}")
        gone = f"{end:.2f}%,100%{{opacity:0}}" if frame < count - 1 else "100%{opacity:1}"
        rules.append(f"@keyframes only-{frame}{{0%{{opacity:{int(not frame)}}}{start:.2f}%{{opacity:1}}{gone}}}")
        rules.append(f".from-{frame}{{animation:from-{frame} {whole:g}s step-end infinite}}" if frame else "")
        hidden = "opacity:0;" if frame < count - 1 else ""
        rules.append(f".only-{frame}{{{hidden}animation:only-{frame} {whole:g}s step-end infinite}}")
    rules.append("@media (prefers-reduced-motion:reduce){*{animation:none !important}}")
    svg = re.sub(r'id="((?:from|only)-\d+)"', r'class="\1"', svg)  # several artists share a frame, and no two an id
    return svg.replace("<defs>", f"<style>{''.join(rules)}</style>\n <defs>", 1)


def gif(figure: Figure, count: int, dpi: int) -> bytes:
    """The frames as an animated GIF that begins again."""
    from PIL import Image

    pictures = []
    for frame in range(count):
        show(figure, frame)
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png", dpi=dpi)
        pictures.append(Image.open(drawn).convert("P", palette=Image.Palette.ADAPTIVE, colors=64))
    durations = [round(1000 * (SECONDS + REST * (frame == count - 1))) for frame in range(count)]
    whole = io.BytesIO()
    pictures[0].save(whole, "GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0, disposal=1)
    return whole.getvalue()
