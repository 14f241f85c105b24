"""Draws the pictures of docs/assets/ from data files of the repository.

    python docs/figures/draw.py                    # all
    python docs/figures/draw.py mesh faults        # some

Drawn again with the same matplotlib, a picture has the same bytes. Needs matplotlib, which the requirements of the
package install.
"""

import csv
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
DATA = HERE / "data"
ASSETS = HERE.parent / "assets"

# Colours of Okabe and Ito, which colour-blind readers can tell apart. The ground is opaque, so that a picture looks the
# same on a light and on a dark page.
BLUE, ORANGE, GREEN, SKY, RED, PINK = "#0072B2", "#E69F00", "#009E73", "#56B4E9", "#D55E00", "#CC79A7"
INK, GREY, FAINT, GROUND = "#1a1a1a", "#595959", "#d0d0d0", "#ffffff"
TINTS = ("#d6ecfa", "#fdeec4", "#cdeee2", "#f6dcea")

MONO = "DejaVu Sans Mono"
STYLE = {
    "font.family": "DejaVu Sans", "font.size": 10, "text.color": INK, "axes.edgecolor": GREY, "axes.labelcolor": INK,
    "xtick.color": INK, "ytick.color": INK, "svg.hashsalt": "flax_mlm", "svg.fonttype": "path",
}  # fmt: skip


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """Returns a figure of so many inches, and axes over all of it whose units are inches."""
    figure = Figure(figsize=(width, height), facecolor=GROUND)
    axis = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
    axis.set_axis_off()
    return figure, axis


def box(
    axis: Axes, x: float, y: float, width: float, height: float, fill: str, edge: str = GREY, line: float = 1
) -> None:
    """Draws a box with round corners; (x, y) is its lower left corner."""
    shape = "round,pad=0,rounding_size=0.06"
    axis.add_patch(
        FancyBboxPatch((x, y), width, height, boxstyle=shape, facecolor=fill, edgecolor=edge, linewidth=line)
    )


def arrow(axis: Axes, start: tuple[float, float], end: tuple[float, float], bend: str = "arc3") -> None:
    """Draws an arrow."""
    style = {"arrowstyle": "-|>", "color": INK, "linewidth": 1.3, "shrinkA": 0, "shrinkB": 0, "connectionstyle": bend}
    axis.annotate("", end, start, arrowprops=style)


def pipeline() -> Figure:
    """The way of the data through the program."""
    figure, axis = canvas(11, 5.0)
    lanes = {
        "prepare": [
            ("Documents", "text, JSON lines, TFDS;\nplain, .gz, .zst"),
            ("Tokens", "SentencePiece, or a\ngiven tokenizer"),
            ("Packed rows", "L tokens each, of one or\nmore documents"),
            ("Corpus on disk", "numbered rows with\nchecksums; a held-out part"),
        ],
        "train": [
            ("Batch", "rows by number, from\n(corpora, seed, step)"),
            ("Masks", "in the jitted step, from\n(seed, row number)"),
            ("Encoder", "attention stays inside\na document"),
            ("Logits, loss", "only at the K predicted\npositions of a row"),
            ("Update", "gradients, optimizer,\nnew weights"),
        ],
        "export": [
            ("Checkpoint", "weights, optimizer state,\nconfig, tokenizer"),
            ("Hugging Face folder", "config, weights,\ntokenizer, model card"),
        ],
    }
    width, height, left, step = 1.72, 0.92, 1.2, 1.94
    centres: dict[str, tuple[float, float]] = {}
    for i, ((command, stages), tint) in enumerate(zip(lanes.items(), TINTS, strict=False)):
        y = 3.83 - 1.67 * i
        axis.text(0.15, y + height / 2, command, family=MONO, weight="bold", size=11, va="center")
        for j, (title, text) in enumerate(stages):
            x = left + step * j
            box(axis, x, y, width, height, tint)
            axis.text(x + width / 2, y + 0.71, title, weight="bold", ha="center", va="center")
            axis.text(x + width / 2, y + 0.31, text, size=8.2, ha="center", va="center", linespacing=1.25)
            centres[title] = (x + width / 2, y + height / 2)
            if j:
                arrow(axis, (x - step + width, y + height / 2), (x, y + height / 2))
    # From the end of a lane to the beginning of the next.
    for start, end in (("Corpus on disk", "Batch"), ("Update", "Checkpoint")):
        (x, y), (to, below) = centres[start], centres[end]
        middle = (y + below) / 2
        axis.plot([x, x, to], [y - height / 2, middle, middle], color=INK, linewidth=1.3)
        arrow(axis, (to, middle), (to, below + height / 2))
    notes = (
        "opens in transformers and sentence-transformers;\n"
        "train with init_from continues from it.\n"
        "evaluate, fill_mask, embed, compare and flax_mlm.load\n"
        "read either: a checkpoint or a folder."
    )
    x, y = centres["Hugging Face folder"]
    axis.text(x + width / 2 + 0.25, y, notes, size=9, va="center", color=INK, linespacing=1.45)
    return figure


def packed_row() -> Figure:
    """A row of three documents, with its masks, and who attends to whom."""
    row = json.loads((DATA / "packed_row.json").read_text())
    tokens = row["tokens"]
    figure, axis = canvas(11, 5.3)
    size, unit, gap, line = 8.5, 0.0733, 0.05, 0.66  # points, inches a character, between boxes, between lines
    x, y, right = 0.2, 4.25, 8.1
    axis.text(
        0.2,
        4.95,
        f"One row of {len(tokens)} tokens: three segments, each [CLS] … [SEP] from one document",
        weight="bold",
        size=11,
    )
    for token in tokens:
        masked, changed = token["shown"] == "[MASK]", token["shown"] != token["text"]
        text = token["shown"].replace("▁", " ").strip() or "▁"
        original = token["text"].replace("▁", " ").strip() or "▁"
        if token["text"].startswith("▁"):
            x += 0.03
        width = unit * max(len(text), len(original) if token["predicted"] else 0, 1) + 0.12
        if x + width > right:
            x, y = 0.2, y - line
        tint = TINTS[token["segment"] - 1]
        fill, ink, edge, thick = tint, INK, FAINT, 0.8
        if token["predicted"]:
            fill, ink, edge, thick = (
                (INK, GROUND, INK, 1) if masked else (RED, GROUND, RED, 1) if changed else (tint, INK, BLUE, 2.2)
            )
        box(axis, x, y, width, 0.27, fill, edge, thick)
        axis.text(x + width / 2, y + 0.125, text, size=size, family=MONO, color=ink, ha="center", va="center")
        if token["predicted"]:
            axis.text(
                x + width / 2, y - 0.11, original, size=size - 0.5, family=MONO, color=GREY, ha="center", va="center"
            )
        x += width + gap
    key = [("[MASK]", INK, INK, GROUND, "replaced by [MASK]"), ("word", RED, RED, GROUND, "by a random token")]
    key.append(("word", TINTS[0], BLUE, INK, "unchanged"))
    x = 0.2
    axis.text(
        x, 0.62, f"{sum(t['predicted'] for t in tokens)} tokens are predicted; the original is below each:", size=9
    )
    for text, fill, edge, ink, meaning in key:
        width = unit * len(text) + 0.12
        box(axis, x, 0.2, width, 0.27, fill, edge, 2.2 if edge == BLUE else 1)
        axis.text(x + width / 2, 0.325, text, size=size, family=MONO, color=ink, ha="center", va="center")
        axis.text(x + width + 0.08, 0.325, meaning, size=9, va="center")
        x += width + 0.35 + 0.083 * len(meaning)
    # Attention: a square for each segment.
    left, top, side = 8.62, 4.25, 2.1
    axis.text(left, 4.55, "Attention", weight="bold", size=10)
    axis.add_patch(Rectangle((left, top - side), side, side, facecolor="#f2f2f2", edgecolor=GREY, linewidth=0.8))
    scale = side / len(tokens)
    for number in range(1, 1 + max(t["segment"] for t in tokens)):
        own = [i for i, t in enumerate(tokens) if t["segment"] == number]
        begin, extent = own[0] * scale, len(own) * scale
        axis.add_patch(
            Rectangle(
                (left + begin, top - begin - extent),
                extent,
                extent,
                facecolor=TINTS[number - 1],
                edgecolor=GREY,
                linewidth=0.8,
            )
        )
        axis.text(left + begin + extent / 2, top - begin - extent / 2, str(number), size=8.5, ha="center", va="center")
    axis.text(left + side / 2, top - side - 0.17, "attended token", size=8.5, ha="center")
    axis.text(left - 0.1, top - side / 2, "attending token", size=8.5, ha="center", va="center", rotation=90)
    axis.text(
        left,
        1.62,
        "A token attends to its own\nsegment alone; positions\nbegin at 0 in each segment.",
        size=9,
        va="top",
        linespacing=1.4,
    )
    return figure


LETTERS = {  # of the dimensions of a parameter of one layer, by the end of its name; 3: q, k and v
    "embeddings/token": "VD", "qkv/kernel": "D3Hd", "attention_out/kernel": "HdD", "mlp_in/kernel": "DF",
    "mlp_out/kernel": "FD",
}  # fmt: skip


def mesh() -> Figure:
    """A mesh of 2 × 2 × 2 devices, and the part of the batch and of each parameter that a device holds."""
    specs = {}
    for line in (ROOT / "tests" / "golden" / "bert_base.params.txt").read_text().splitlines():
        name, _, rest = line.partition(" ")
        if (end := next((end for end in LETTERS if name.endswith(end)), "")) and (
            found := re.search(r"P\((.*)\)$", rest)
        ):
            specs[end] = [axis.strip(" '") for axis in found[1].split(",")][-len(LETTERS[end]) :]
    colours = {(0, 0): SKY, (0, 1): ORANGE, (1, 0): GREEN, (1, 1): PINK}  # of a device's place on (fsdp, tensor)
    figure, axis = canvas(11, 5.6)
    axis.text(0.3, 5.25, "Mesh: data 2 × fsdp 2 × tensor 2 = 8 devices", weight="bold", size=11)
    side = 0.85
    for data in (0, 1):
        left, bottom = 0.95 + 2.45 * data, 2.95
        axis.text(left + side, bottom + 2 * side + 0.27, f"data {data}", size=10, ha="center", weight="bold")
        for tensor in (0, 1):
            axis.text(left + (tensor + 0.5) * side, bottom + 2 * side + 0.08, f"tensor {tensor}", size=8.5, ha="center")
        for (fsdp, tensor), colour in colours.items():
            x, y = left + tensor * side, bottom + (1 - fsdp) * side
            axis.add_patch(Rectangle((x, y), side, side, facecolor=colour, edgecolor=GROUND, linewidth=3))
            axis.text(x + side / 2, y + side / 2, str(4 * data + 2 * fsdp + tensor), ha="center", va="center", size=12)
        for fsdp in (0, 1):
            axis.text(left - 0.08, bottom + (1.5 - fsdp) * side, f"fsdp {fsdp}", size=8.5, ha="right", va="center")
    axis.text(0.3, 2.6, "Batch of B rows: split by data and fsdp", weight="bold", size=11)
    for part in range(4):
        x, y = 0.95 + 1.04 * part, 1.65
        axis.add_patch(Rectangle((x, y), 1.0, 0.6, facecolor="#ececec", edgecolor=GREY, linewidth=0.8))
        axis.text(x + 0.5, y + 0.3, f"quarter {part}", ha="center", va="center", size=9)
        axis.text(x + 0.5, y - 0.18, f"devices {2 * part}, {2 * part + 1}", ha="center", va="center", size=8.5)
    notes = (
        "Devices of one colour hold the same part of the parameters.\n"
        "A layer's parameters are gathered along fsdp just before use;\n"
        "gradients are summed over data and fsdp.\n"
        "V vocabulary, D width, H heads, d head width, F MLP width."
    )
    axis.text(0.3, 1.1, notes, size=9, va="top", linespacing=1.5)

    axis.text(5.9, 5.25, "Parameters: a letter is split by the axis below it", weight="bold", size=11)
    for i, (name, letters) in enumerate(LETTERS.items()):
        axes = specs[name]
        y = 4.2 - 0.92 * i
        axis.text(5.9, y + 0.45, name, size=9.5, family=MONO, va="center")
        for j, (letter, split) in enumerate(zip(letters, axes, strict=True)):
            x = 5.95 + 0.62 * j
            axis.text(x, y + 0.18, letter, size=10, weight="bold", family=MONO, va="center")
            axis.text(x, y - 0.05, split if split != "None" else "–", size=8, color=GREY, va="center")
        # Rows of the picture: the first split letter; columns: the second.
        first, second = [split for split in axes if split != "None"]
        width, height = 1.9, 0.66
        left, bottom = 8.75, y - 0.1
        for (fsdp, tensor), colour in colours.items():
            place = {"fsdp": fsdp, "tensor": tensor}
            x, z = left + place[second] * width / 2, bottom + (1 - place[first]) * height / 2
            axis.add_patch(Rectangle((x, z), width / 2, height / 2, facecolor=colour, edgecolor=GROUND, linewidth=2))
            held = f"{2 * fsdp + tensor}, {4 + 2 * fsdp + tensor}"
            axis.text(x + width / 4, z + height / 4, held, ha="center", va="center", size=8.5)
        split = [letter for letter, by in zip(letters, axes, strict=True) if by != "None"]
        axis.text(left - 0.1, bottom + height / 2, split[0], size=9, ha="right", va="center", family=MONO)
        axis.text(left + width / 2, bottom + height + 0.08, split[1], size=9, ha="center", va="center", family=MONO)
    axis.text(5.9, 0.08, "Vectors are whole on every device, but the biases of q, k and v are split like H.", size=9)
    return figure


def loss_against_minutes() -> Figure:
    """Held-out loss of flax_mlm and of transformers' BERT against minutes."""
    figure = Figure(figsize=(9, 4.8), facecolor=GROUND, layout="constrained")
    axis = figure.subplots()
    curves = {f"transformers, BERT, {rate}": f"transformers-{float(rate):g}" for rate in ("1e-4", "3e-4", "1e-3")}
    looks = [(ORANGE, "s", "--"), (PINK, "^", "-."), (GREEN, "v", ":"), (BLUE, "o", "-")]
    for (name, file), (colour, marker, dash) in zip((curves | {"flax_mlm": "flax_mlm"}).items(), looks, strict=True):
        curve = json.loads((ROOT / "benchmarks" / "curves" / f"{file}.json").read_text())["curve"]
        points = [(point["seconds"] / 60, point["loss"]) for point in curve if point["step"]]
        axis.plot(
            *zip(*points, strict=True),
            color=colour,
            marker=marker,
            markersize=4,
            linestyle=dash,
            linewidth=1.8,
            label=name,
        )
        minutes, loss = points[-1]
        if name == "flax_mlm":
            axis.annotate(
                f"flax_mlm, {loss:.2f} nats\nafter {minutes:.1f} minutes",
                (minutes, loss),
                (minutes + 1.5, loss + 0.1),
                color=BLUE,
                va="center",
            )
    axis.set(xlabel="minutes", ylabel="held-out loss, nats per masked token", xlim=(0, 66), ylim=(3.5, 8.2))
    axis.grid(color=FAINT, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(loc="center right", facecolor=GROUND, edgecolor="none", framealpha=1)
    return figure


def faults() -> Figure:
    """Outcomes of the injected faults, by kind."""
    with (DATA / "faults.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    outcomes = {"detected": BLUE, "recovered": GREEN, "harmless": ORANGE, "failed": RED}
    heads = {"failed": "lost or\nsilent"}
    half = -(-len(rows) // 2)
    line, bottom = 0.27, 0.5
    top = bottom + line * half
    figure, axis = canvas(13.2, top + 0.55)
    for panel, part in enumerate((rows[:half], rows[half:])):
        left = 0.15 + 6.55 * panel
        columns = {name: left + 3.9 + 0.7 * i for i, name in enumerate(outcomes)}
        for name, x in columns.items():
            head = heads.get(name, name)
            axis.text(x, top + 0.1, head, size=8, ha="center", va="bottom", weight="bold", linespacing=1.1)
        for i, row in enumerate(part):
            y = top - line * (i + 0.5)
            if i % 2 == 0:
                axis.add_patch(Rectangle((left, y - line / 2), 6.35, line, facecolor="#f4f4f4", edgecolor="none"))
            axis.text(left + 0.3, y, row["kind"], size=8, ha="right", va="center", color=GREY)
            axis.text(left + 0.4, y, row["fault"].replace("; unquoted values in scripts", ", …"), size=8, va="center")
            for name, colour in outcomes.items():
                if count := int(row[name]):
                    axis.scatter(columns[name] - 0.14, y, s=3 * count, color=colour, linewidth=0)
                    axis.text(columns[name] + 0.17, y, str(count), size=8, ha="center", va="center")
    axis.text(left + 0.4, bottom - 0.2, f"all {len(rows)} kinds", size=8.5, weight="bold", va="center")
    for name, x in columns.items():
        total = sum(int(row[name]) for row in rows)
        axis.text(x + 0.17, bottom - 0.2, str(total), size=8.5, weight="bold", ha="center", va="center")
    return figure


def objectives() -> Figure:
    """Scores of four objectives, with standard errors."""
    with (DATA / "objectives.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    panels = {(row["task"], row["metric"]): [] for row in rows if row["metric"] != "next-token loss ↓"}
    for row in rows:
        if (row["task"], row["metric"]) in panels:
            panels[row["task"], row["metric"]].append(row)
    looks = {"mlm_15": (BLUE, "o"), "mlm_30": (GREEN, "s"), "clm": (RED, "^"), "clm_mlm": (PINK, "D")}
    figure = Figure(figsize=(12, 5), facecolor=GROUND, layout="constrained")
    axes = figure.subplots(2, 4).flat
    for axis, ((task, metric), found) in zip(axes, panels.items(), strict=False):
        for row in found:
            colour, marker = looks[row["model"]]
            height = -list(looks).index(row["model"])
            axis.errorbar(
                float(row["value"]),
                height,
                xerr=float(row["standard_error"]),
                color=colour,
                marker=marker,
                capsize=3,
                linewidth=1.5,
            )
        axis.set_title(f"{task}: {metric}", size=9.5)
        axis.set_yticks([0, -1, -2, -3], looks)
        axis.set_ylim(-3.5, 0.5)
        axis.tick_params(labelsize=8.5)
        axis.locator_params(axis="x", nbins=5)
        axis.grid(axis="x", color=FAINT, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    last = list(figure.axes)[-1]
    last.set_axis_off()
    lines = [
        ("mlm_15", "masked, 15%"),
        ("mlm_30", "masked, 30%"),
        ("clm", "causal"),
        ("clm_mlm", "half causal, half masked"),
    ]
    for i, (model, meaning) in enumerate(lines):
        colour, marker = looks[model]
        last.plot(0.03, 0.75 - 0.14 * i, marker=marker, color=colour, transform=last.transAxes, clip_on=False)
        last.text(0.1, 0.75 - 0.14 * i, f"{model}: {meaning}", va="center", size=9, transform=last.transAxes)
    last.text(0, 0.15, "↓ lower is better\n↑ higher is better", va="center", size=9, transform=last.transAxes)
    return figure


FIGURES: dict[str, Callable[[], Any]] = {
    "pipeline": pipeline,
    "packed-row": packed_row,
    "mesh": mesh,
    "loss-against-minutes": loss_against_minutes,
    "faults": faults,
    "objectives": objectives,
}


def main(names: list[str]) -> None:
    if unknown := set(names) - FIGURES.keys():
        raise SystemExit(f"there is no figure '{min(unknown)}'; there are {', '.join(FIGURES)}")
    ASSETS.mkdir(exist_ok=True)
    with matplotlib.rc_context(STYLE):
        for name in names or FIGURES:
            FIGURES[name]().savefig(ASSETS / f"{name}.svg", format="svg", metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    main(sys.argv[1:])
