"""Draws the pictures of docs/concepts.md as SVG files, which need no script to be shown: run it after a change here."""

from __future__ import annotations

from html import escape
from pathlib import Path

IMAGES = Path(__file__).resolve().parents[2] / "docs/images"
BLUE, GREEN, AMBER, RED, GREY = "#dbe7fb", "#dcf1e0", "#fdeecb", "#fbdcdc", "#eceff3"
INK, FAINT = "#1f2a3a", "#66758a"


class Picture:
    """An SVG of a size in pixels, on white, so that it can be read on a dark page, too."""

    def __init__(self, title: str, width: int, height: int) -> None:
        self._lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'role="img" font-family="Helvetica, Arial, sans-serif" font-size="13" fill="{INK}">',
            f"<title>{escape(title)}</title>",
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            f'orient="auto"><path d="M0 0 8 4 0 8z" fill="{FAINT}"/></marker></defs>',
            f'<rect width="{width}" height="{height}" rx="8" fill="#ffffff"/>',
        ]

    def box(self, x: float, y: float, width: float, height: float, text: str = "", fill: str = GREY) -> None:
        """A box with lines of text, the first one bold."""
        self._lines.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4" fill="{fill}" stroke="{FAINT}"/>'
        )
        lines = text.split("\n") if text else []
        for number, line in enumerate(lines):
            middle = y + height / 2 + 4.5 + 16 * (number - (len(lines) - 1) / 2)
            self.text(x + width / 2, middle, line, "middle", bold=number == 0 and len(lines) > 1)

    def text(
        self, x: float, y: float, text: str, anchor: str = "start", bold: bool = False, faint: bool = False
    ) -> None:
        """A line of text."""
        weight, color = ' font-weight="bold"' if bold else "", f' fill="{FAINT}"' if faint else ""
        self._lines.append(f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}"{weight}{color}>{escape(text)}</text>')

    def arrow(self, *points: tuple[float, float]) -> None:
        """A line through the points, with a tip at its end."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        self._lines.append(
            f'<polyline points="{path}" fill="none" stroke="{FAINT}" stroke-width="1.5" marker-end="url(#tip)"/>'
        )

    def write(self, name: str) -> None:
        """Write the file."""
        (IMAGES / name).write_text("\n".join([*self._lines, "</svg>", ""]), encoding="utf-8")


def draw_step() -> None:
    """One step, from prompts to new weights in the engine."""
    picture = Picture("One step", 880, 300)
    above = (
        ("prompts\ntask or files", GREY),
        ("rollout\nengines sample G", AMBER),
        ("reward, filter\ndrop groups\nwithout spread", GREEN),
        ("advantages\nwithin a group", GREEN),
    )
    for number, (text, fill) in enumerate(above):
        picture.box(20 + 220 * number, 30, 180, 70, text, fill)
        if number:
            picture.arrow((20 + 220 * number - 40, 65), (20 + 220 * number, 65))
    below = (
        ("weight sync\nversion + 1, verified", AMBER),
        ("update\nloss, gradient, AdamW", BLUE),
        ("mini-batch\nwhole groups, packed", BLUE),
        ("old log-probs\nby the trainer", BLUE),
    )
    for number, (text, fill) in enumerate(below):
        picture.box(20 + 220 * number, 170, 180, 70, text, fill)
        if number:
            picture.arrow((20 + 220 * number, 205), (20 + 220 * number - 40, 205))
    picture.arrow((770, 100), (770, 170))
    picture.arrow((110, 170), (110, 135), (330, 135), (330, 100))
    picture.arrow((330, 240), (330, 268), (550, 268), (550, 240))
    picture.text(
        440, 287, "several updates a batch: only from the second on does FIPO differ from DAPO", "middle", faint=True
    )
    picture.text(345, 140, "the next batch is sampled from the new weights", faint=True)
    picture.write("step.svg")


def draw_layouts() -> None:
    """Eight ranks of tensor 2 x pipeline 2 x data 2, and where a layer, a stage and a sample are."""
    picture = Picture("A layout: tensor 2, pipeline 2, data 2", 880, 330)
    for replica in range(2):
        left = 20 + 430 * replica
        picture.box(left, 40, 410, 210, "", "#fafbfd")
        picture.text(left + 12, 30, f"data {replica}: half of each mini-batch's samples", bold=True)
        for stage in range(2):
            top = 60 + 95 * stage
            for shard in range(2):
                layers = "first half of the layers" if stage == 0 else "second half, head, loss"
                text = f"rank {4 * stage + 2 * replica + shard}\n{layers}\ntensor slice {shard}"
                picture.box(left + 15 + 195 * shard, top, 185, 75, text, BLUE if stage == 0 else GREEN)
        picture.arrow((left + 205, 135), (left + 205, 155))
    picture.text(
        20, 272, "tensor: a layer cut over ranks, all-reduce in every layer (sequence_parallel cuts its norms, too)"
    )
    picture.text(20, 290, "pipeline: stages of layers, activations from stage to stage, microbatch after microbatch")
    picture.text(
        20, 308, "data: the gradient is summed over replicas; the distributed optimizer shards its state over them"
    )
    picture.write("layouts.svg")


def draw_context() -> None:
    """Zig-zag chunks of one sequence over two context-parallel ranks."""
    picture = Picture("Context parallelism: zig-zag chunks", 880, 215)
    picture.text(
        20,
        28,
        "one sequence, context: 2 -> 4 chunks of equal length; each rank holds an early and a late one",
        bold=True,
    )
    for chunk, rank in enumerate((0, 1, 1, 0)):
        picture.box(20 + 210 * chunk, 45, 200, 50, f"chunk {chunk}\nrank {rank}", BLUE if rank == 0 else GREEN)
    for rank, chunks in enumerate(((0, 3), (1, 2))):
        left = 20 + 430 * rank
        picture.text(left, 132, f"rank {rank}")
        for place, chunk in enumerate(chunks):
            picture.box(left + 60 + 150 * place, 115, 140, 36, f"chunk {chunk}", BLUE if rank == 0 else GREEN)
    picture.text(
        20, 178, "Under a causal mask both have the same work: early tokens attend to few others, late ones to many."
    )
    picture.text(
        20,
        196,
        "On GPUs a rank has the activations of half the sequence; the scan exchanges two numbers a chunk.",
        faint=True,
    )
    picture.write("context.svg")


def draw_scan() -> None:
    """The future-KL of six tokens, and how it becomes a weight."""
    picture = Picture("The future-KL scan", 880, 285)
    picture.text(20, 28, "one response, read from its end: F(t) = M(t) d(t) + gamma F(t+1)", bold=True)
    changes = ("+0.02", "-0.01", "+0.30", "+0.05", "0.00", "+0.08")
    future, total, sums = 0.5 ** (1 / 32), 0.0, []
    for change in reversed(changes):
        total = float(change) + future * total
        sums.append(total)
    for place, (change, value) in enumerate(zip(changes, reversed(sums), strict=True)):
        left = 150 + 120 * place
        picture.box(left, 45, 105, 36, change, GREEN if float(change) >= 0 else RED)
        picture.box(left, 110, 105, 36, f"{value:+.2f}", BLUE)
        picture.box(left, 175, 105, 36, f"{min(max(2.718281828**value, 1), 1.2):.2f}", AMBER)
        picture.arrow((left + 52, 81), (left + 52, 110))
        picture.arrow((left + 52, 146), (left + 52, 175))
        if place:
            picture.arrow((left, 128), (left - 15, 128))
    for top, name in ((68, "d: log-ratio"), (133, "F: future-KL"), (198, "w: weight")):
        picture.text(20, top, name)
    picture.text(
        20,
        240,
        "w = exp(F), here clipped to [1, 1.2] (fipo_32b), multiplies its advantage. No gradient goes through it.",
    )
    picture.text(
        20,
        260,
        "A token whose future the updates have made likelier counts more. Half-life: 32 tokens; cost: one pass.",
        faint=True,
    )
    picture.write("scan.svg")


def draw_sync() -> None:
    """Shards from two trainer ranks to an engine that cuts the same matrix otherwise."""
    picture = Picture("Weight sync: boxes of a matrix", 880, 300)
    picture.text(20, 28, "trainer: tensor 2, rows cut in 2", bold=True)
    picture.text(500, 28, "engine: tensor 4, rows cut in 4", bold=True)
    for rank in range(2):
        picture.box(20, 45 + 90 * rank, 200, 80, f"rank {rank}\nrows {4 * rank} to {4 * rank + 3}", BLUE)
    for worker in range(4):
        top = 45 + 45 * worker
        picture.box(640, top, 220, 36, f"worker {worker}: rows {2 * worker}, {2 * worker + 1}", GREEN)
        source = 45 + 90 * (worker // 2) + (25 if worker % 2 == 0 else 55)
        picture.arrow((220, source), (380, top + 18))
        picture.box(380, top + 2, 150, 32, "bucket", AMBER)
        picture.arrow((530, top + 18), (640, top + 18))
    picture.text(
        20,
        252,
        "Every process makes the same plan. Each element that a worker stores travels once, memory to memory.",
    )
    picture.text(
        20,
        272,
        "Then both ends compare checksums, versions and numbers of updates: a sync either is proven or ends the run.",
        faint=True,
    )
    picture.write("sync.svg")


if __name__ == "__main__":
    for draw in (draw_step, draw_layouts, draw_context, draw_scan, draw_sync):
        draw()
