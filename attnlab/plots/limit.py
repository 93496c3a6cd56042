"""How near every implementation comes to what the machine allows, at every G."""

import numpy
import pandas
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure

from attnlab.plots import style
from attnlab.plots.rows import GROUPS, dtypes, few, source, timed

_ASKED = "can be asked"
_COLOURS = LinearSegmentedColormap.from_list("share", style.RAMP)


@style.styled
def fraction_of_roof(rows: pandas.DataFrame, machine: str) -> Figure:
    """A table of shares of the roofline: implementations by G, a panel per dtype and context, at the largest batch."""
    drawn = timed(rows, "decode", machine)
    kinds, contexts = dtypes(drawn), few(drawn["context"], 2)
    drawn = drawn[(drawn["impl"] != "auto") & drawn["dtype"].isin(kinds) & drawn["context"].isin(contexts)]
    drawn = drawn[drawn["batch"] == drawn["batch"].max()]
    names = list(drawn.groupby("impl")["fraction_of_roof"].mean().sort_values(kind="stable").index)
    asked, said = "binding_roof" in drawn and bool(drawn["binding_roof"].notna().all()), ""
    if asked:
        names.append(_ASKED)
        said = f' "{_ASKED}": the share that a loop fed from memory can reach, with half the rate of products.'
    figure, grid = style.canvas(
        "How much of the roof each implementation reaches, at every G",
        f"Decode attention, % of what this machine's measured read bandwidth and matmul rate allow. –: cannot run, or "
        f"did not end well. H = {drawn['shape.n_heads'].iloc[0]}, D = {drawn['shape.head_dim'].iloc[0]}, "
        f"batch {drawn['batch'].iloc[0]}.{said}",
        source(drawn),
        1.35 + len(contexts) * (0.75 + 0.24 * len(names)),
        nrows=len(contexts),
        ncols=len(kinds),
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    for (line, column), axes in numpy.ndenumerate(grid):
        panel = drawn[(drawn["dtype"] == kinds[column]) & (drawn["context"] == contexts[line])]
        table = panel.pivot(index="impl", columns=GROUPS, values="fraction_of_roof")
        table = table.reindex(names, columns=sorted(drawn[GROUPS].unique(), reverse=True))
        if asked:
            bound = panel["fraction_of_roof"] * panel["median"] * panel["binding_roof"] / panel["bytes"]
            table.loc[_ASKED] = bound.groupby(panel[GROUPS]).first()
        axes.pcolormesh(table.to_numpy(float), cmap=_COLOURS, vmin=0, vmax=1, edgecolors=style.PAPER, linewidth=1.5)
        for (y, x), share in numpy.ndenumerate(table.to_numpy(float)):
            lacks = numpy.isnan(share)
            ink = style.MUTED if lacks else style.readable_on(to_hex(_COLOURS(min(share, 1.0))))
            look = {"color": ink, "weight": "bold" if table.index[y] == _ASKED else "normal", "size": 7.5}
            axes.text(
                x + 0.5, y + 0.5, "–" if lacks else f"{100 * share:.0f}", ha="center", va="center_baseline", **look
            )
        axes.set_xticks(numpy.arange(table.shape[1]) + 0.5, [str(g) for g in table.columns])
        axes.set_yticks(numpy.arange(len(names)) + 0.5, names)
        axes.set_title(f"{kinds[column]}, context {style.tokens(contexts[line])}")
        axes.tick_params(length=0)
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
    for axes in grid[-1]:
        axes.set_xlabel("KV heads G")
    return figure
