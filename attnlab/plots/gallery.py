"""All figures on one page, each with what it shows, the rows it is drawn from, and the command that draws it again."""

from dataclasses import dataclass
from html import escape

from matplotlib.figure import Figure

NAME = "index.html"
_STYLE = """
:root { color-scheme: light dark; --paper: #fffdf8; --ink: #222; --muted: #6b675e; --line: #ddd6c8; }
@media (prefers-color-scheme: dark) { :root { --paper: #16171a; --ink: #ecebe6; --muted: #a8a59c; --line: #3a3c42; } }
body { margin: 0 auto; max-width: 860px; padding: 0 16px 48px; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, "DejaVu Sans", sans-serif; }
figure { margin: 40px 0 0; padding-top: 24px; border-top: 1px solid var(--line); }
img { width: 100%; height: auto; border-radius: 6px; }
figcaption { margin-top: 8px; }
h2 { font-size: 1.1rem; margin: 0 0 8px; }
small, nav { color: var(--muted); }
nav a { margin-right: .8em; }
a { color: inherit; }
code { overflow-wrap: anywhere; }
"""


@dataclass(frozen=True)
class Card:
    """One figure of a gallery: its name, the machine it is of ("" for none), its caption, and its footer."""

    name: str
    machine: str
    caption: str
    footer: str

    @property
    def stem(self) -> str:
        """Of its files."""
        return f"{self.name}.{self.machine}" if self.machine else self.name

    @property
    def command(self) -> str:
        """What draws it again."""
        return f"attnlab figures --only {self.name}"


def card(name: str, machine: str, caption: str | None, figure: Figure) -> Card:
    """What a gallery says of a drawn ``figure``."""
    return Card(name, machine, " ".join((caption or "").split()), " ".join(figure.texts[-1].get_text().split()))


def gallery(cards: list[Card], explorer: bool) -> str:
    """The page, which takes pictures for dark pages where the reader's is dark."""
    links = "".join(f'<a href="#{escape(each.stem)}">{escape(each.name)}</a> ' for each in cards)
    also = '<p><a href="explorer.html">The explorer</a> predicts for any shape.</p>' if explorer else ""
    figures = "".join(
        f'<figure id="{escape(each.stem)}">\n<h2>{escape(each.name)}</h2>\n'
        f'<picture><source srcset="{each.stem}.dark.svg" media="(prefers-color-scheme: dark)">'
        f'<img src="{each.stem}.svg" alt="{escape(each.caption)}" loading="lazy"></picture>\n'
        f"<figcaption>{escape(each.caption)}<br><small>{escape(each.footer)}<br>Draw it again: "
        f"<code>{escape(each.command)}</code> · files: "
        + ", ".join(f'<a href="{each.stem}.{kind}">{kind}</a>' for kind in ("svg", "png", "dark.svg", "dark.png"))
        + "</small></figcaption>\n</figure>\n"
        for each in cards
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>attnlab: all figures</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>All figures</h1>\n"
        "<p>What sharing key/value heads buys and costs. Every measured figure is drawn from rows in this repository, "
        f"and names them.</p>\n{also}\n<nav>{links}</nav>\n{figures}</body>\n</html>\n"
    )
