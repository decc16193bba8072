"""Every plot of the examples: one set-up of matplotlib, one style."""

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from .results import short


STYLE = {
    "font.size": 12,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "legend.fontsize": 11,
}
# Told apart also by those who see fewer colours (Okabe and Ito).
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000", "#999999")
# What the names in files of results mean.
NAMES = {
    "hsa": "HSA",
    "llama": "Llama",
    "hsa, compiled": "HSA, compiled",
    "llama, compiled": "Llama, compiled",
    "triton": "HSA, Triton kernels",
    "torch": "HSA, PyTorch",
    "fla nsa": "NSA of flash-linear-attention",
    "sdpa": "attention to all, cuDNN",
    "flash": "attention to all, FlashAttention-2",
    "s_niah": "one needle (S-NIAH)",
    "mq_niah": "2 of 6 needles (MQ-NIAH)",
    "vt": "2 chains of variables (VT)",
    "s_niah near": "one needle, near",
    "near": "near facts",
    "far": "facts beyond the window",
    "dense": "many facts",
}


def named(name: str) -> str:
    return NAMES.get(name, name)


@contextlib.contextmanager
def panels(
    file: Path, count: int = 1, width: float = 5.2, height: float = 3.8, columns: int = 2, **options
) -> Iterator[list]:
    """`count` axes of `width` x `height` inches, at most `columns` beside each other; saved to `file` and closed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(count, columns)
    rows = -(-count // columns)
    with matplotlib.rc_context(STYLE | {"axes.prop_cycle": matplotlib.cycler(color=COLOURS)}):
        size = (width * columns, height * rows)
        figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **options)
        for axis in axes.flat[count:]:
            axis.set_axis_off()
        yield list(axes.flat[:count])
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=100)
        pyplot.close(figure)


def common_legend(axes: list, columns: int = 2) -> None:
    """One legend below all panels, of whatever is in any of them."""
    found = {}
    for axis in axes:
        for line, label in zip(*axis.get_legend_handles_labels()):
            found.setdefault(label, line)
    axes[0].figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=min(columns, len(found)))


def draw_scaling(lines_of: dict[str, dict[str, tuple[list, list]]], file: Path, label: str = "tokens") -> None:
    """A panel a title, with its lines: name -> (x, y), on logarithmic axes; none for nothing."""
    kept = {title: {name: line for name, line in lines.items() if line[0]} for title, lines in lines_of.items()}
    kept = {title: lines for title, lines in kept.items() if lines}
    if not kept:
        return
    names = list(dict.fromkeys(name for lines in kept.values() for name in lines))
    with panels(file, len(kept)) as axes:
        for axis, (title, lines) in zip(axes, kept.items()):
            for name, (x, y) in lines.items():
                axis.plot(x, y, "o-", color=f"C{names.index(name)}", label=named(name))
            axis.set(title=title, xlabel=label, xscale="log", yscale="log")
            length_ticks(axis, [value for x, _ in lines.values() for value in x])
            low, high = (bound(value for _, y in lines.values() for value in y) for bound in (min, max))
            low, high = min(low, high / 4) / 1.5, high * 1.5  # what hardly changes looks flat
            axis.set_ylim(low, high)
            axis.set_yticks(_decades(low, high))
            axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")
        common_legend(axes)


def draw_lengths(models: dict[str, list[dict]], file: Path) -> None:
    """A panel a task: the accuracy of each model's rows by length, with its interval."""
    tasks = list(dict.fromkeys(row["task"] for rows in models.values() for row in rows))
    with panels(file, len(tasks), 3.4, 3.6, columns=3, sharey=True) as axes:
        for axis, task in zip(axes, tasks):
            for label, rows in models.items():
                rows = [row for row in rows if row["task"] == task]
                draw_band(axis, [row["length"] for row in rows], rows, "accuracy", label)
            axis.set_xscale("log", base=2)
            length_ticks(axis, [row["length"] for rows in models.values() for row in rows], rotation=45)
            axis.set(title=named(task), xlabel="tokens", ylim=(-0.03, 1.03))
        axes[0].set_ylabel("accuracy")
        common_legend(axes, 4)


def draw_losses(rows: list[dict], file: Path) -> None:
    """Loss by length of the context, and by position, with the intervals, of the rows of `evaluate.py ppl`."""
    lines = {}
    for task, where in (("last", ""), ("foreign", ", foreign text before")):
        if kept := [row for row in rows if row["task"] == task]:
            title = f"loss of the last {kept[-1]['scored_tokens']:,} tokens{where}"
            lines[title] = "length of the context (tokens)", [row["length"] for row in kept], [r["loss"] for r in kept]
    for row in rows:
        if row["task"] == "positions":
            middles = [math.sqrt(a * b) for a, b in zip(row["edges"], row["edges"][1:])]
            lines["loss by position"] = "position (tokens)", middles, row["losses"]
    with panels(file, len(lines)) as axes:
        for axis, (title, (label, x, losses)) in zip(axes, lines.items()):
            draw_band(axis, x, losses, "mean")
            axis.set(title=title, xlabel=label, ylabel="nats per token")
            axis.set_xscale("log", base=2)
            if label.startswith("length"):
                length_ticks(axis, x, rotation=45)


def heat_map(grid: dict[tuple[str, str], float], file: Path, title: str, label: str) -> None:
    """`grid`: accuracy in [0, 1] by (row, column), in percent. `label`: what the rows are; the columns are lengths."""
    rows, columns = (list(dict.fromkeys(cell[i] for cell in grid)) for i in (0, 1))
    values = np.array([[100 * grid.get((row, column), math.nan) for column in columns] for row in rows])
    with panels(file, 1, 2.5 + 0.7 * len(columns), 1.8 + 0.38 * len(rows)) as (axis,):
        image = axis.imshow(values, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
        for (y, x), value in np.ndenumerate(values):
            ink = "white" if value > 85 or value < 15 else "black"
            axis.text(
                x, y, "" if math.isnan(value) else f"{value:.0f}", ha="center", va="center", fontsize=10, color=ink
            )
        axis.set_xticks(range(len(columns)), columns)
        axis.set_yticks(range(len(rows)), rows)
        axis.set(title=title, xlabel="tokens", ylabel=label)
        axis.grid(False)
        axis.figure.colorbar(image, label="accuracy (%)")


def draw_depths(rows: list[dict], file: Path, bins: int = 10) -> None:
    """
    Accuracy by depth (down) and length of rows of one task whose records have a depth. Many different depths are put
    into bins.
    """
    pairs = [(depth, score, row["length"]) for row in rows for depth, score in _depths(row)]
    scores: dict[tuple[float, int], list[float]] = {}
    on_grid = len({depth for depth, *_ in pairs}) <= bins + 1
    for depth, score, length in pairs:
        if not on_grid:
            depth = (min(int(depth * bins), bins - 1) + 0.5) / bins
        scores.setdefault((round(depth, 4), length), []).append(score)
    cells = {(f"{100 * depth:.0f} %", short(length)): np.mean(x) for (depth, length), x in sorted(scores.items())}
    heat_map(cells, file, f"{named(rows[0]['task'])}: accuracy", "depth")


def _depths(row: dict) -> list[tuple[float, float]]:
    return list(zip(row["records"]["depth"], row["records"]["score"]))


def draw_pretraining(entries: list[dict], file: Path) -> None:
    """The log of `pretrain.py`: loss, accuracy of every task and, of HSA models, what answers retrieve, by tokens."""
    titles = ["loss of all tokens but answers", "accuracy by answer token"]
    if any("recall" in entry for entry in entries):
        titles.append("chunk an answer is copied from")
    tokens = [entry["tokens"] / 1e6 for entry in entries]

    def values(name: str) -> tuple[list, list]:
        kept = [(x, entry[name]) for x, entry in zip(tokens, entries) if name in entry]
        return [x for x, _ in kept], [value for _, value in kept]

    with panels(file, len(titles)) as axes:
        axes[0].plot(tokens, values("text_loss")[1])
        for name in sorted({name for entry in entries for name, value in entry.items() if isinstance(value, dict)}):
            x, measured = values(name)
            axes[1].plot(x, [value["accuracy"] for value in measured], label=named(name))
        for name, style in (("weight", "-"), ("recall", "--")):
            x, by_layer = values(name)
            for layer, y in enumerate(zip(*by_layer)):
                words = {"weight": "its weight", "recall": "share retrieved"}[name]
                axes[2].plot(x, y, style, color=f"C{layer}", label=f"{words}, HSA layer {layer + 1}")
        for axis, title in zip(axes, titles):
            axis.set(title=title, xlabel="million tokens")
            for _, stage in itertools.groupby(zip(tokens, entries), key=lambda pair: pair[1]["stage"]):
                axis.axvline(next(stage)[0], color="0.85", zorder=0)
        for axis in axes[1:]:
            axis.set_ylim(0, 1.02)
            axis.legend()


def draw_curves(
    curves: dict[str, tuple[Sequence, Sequence]],
    file: Path,
    title: str,
    x: str,
    y: str,
    marks: Sequence = (),
    **axes_are,
) -> None:
    """Lines, name -> (x, y), in one panel, with vertical lines at `marks`; `axes_are` goes to `Axes.set`."""
    with panels(file, 1, 8.4, 5) as (axis,):
        for label, (at, values) in curves.items():
            axis.plot(at, values, "o-" if len(at) < 20 else "-", label=label)
        for mark in marks:
            axis.axvline(mark, color="0.8", zorder=0)
        axis.set(title=title, xlabel=x, ylabel=y, **axes_are)
        if axes_are.get("xscale") == "log":
            length_ticks(axis, [at for line, _ in curves.values() for at in line])
        common_legend([axis])


def draw_band(axis, x: list, rows: list[dict], value: str, label: str | None = None) -> None:
    """Draws a line of the field `value` of rows, and the interval [low, high], where they have one, around it."""
    if not rows:
        return
    y = [row[value] for row in rows]
    low, high = ([at if row[name] is None else row[name] for at, row in zip(y, rows)] for name in ("low", "high"))
    line = axis.plot(x, y, "o-", markersize=4, label=label)[0]
    axis.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)


def length_ticks(axis, lengths: Sequence[int], **options) -> None:
    axis.set_xticks(sorted(set(lengths)), [short(length) for length in sorted(set(lengths))], **options)
    axis.minorticks_off()


def _decades(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten from `low` to `high`; of wide ranges only the powers."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if high / low < 100 else (1,)
    return [factor * 10.0**power for power in powers for factor in factors if low <= factor * 10.0**power <= high]
