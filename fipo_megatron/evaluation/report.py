"""A set's summary as a table for people, beside what was published on the set."""

from __future__ import annotations

from collections.abc import Mapping

from fipo_megatron.evaluation.sets import Published, published_figures

PUBLISHED_K = 32  # samples a problem of all published figures
OTHER_ROWS = (
    ("mean_response_tokens", "tokens, mean", ".0f"),
    ("truncated_frac", "truncated", ".3f"),
    ("verifies_frac", "verifies", ".3f"),
    ("rederives_frac", "re-derives", ".3f"),
    ("corrects_frac", "corrects itself", ".3f"),
)


def summary_table(name: str, k: int, summary: Mapping[str, float]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a set's table: every metric of `protocol.summarize` with its interval and published figures.

    avg@k expects the same for every k; cons@k and pass@k of another k than the published are not set beside them.
    """
    published = published_figures(name)
    rows = []
    for metric in ("avg", "cons", "pass"):
        key = f"{metric}@{k}"
        interval = f"{summary[f'{key}_low']:.3f} to {summary[f'{key}_high']:.3f}"
        figures = [_figure(entry, metric) if metric == "avg" or k == PUBLISHED_K else "" for entry in published]
        rows.append([key, f"{summary[key]:.3f}", interval, *figures])
    for key, label, form in OTHER_ROWS:
        rows.append([label, f"{summary[key]:{form}}", "", *("" for _ in published)])
    return ["", "measured", "95 % interval", *(entry.label for entry in published)], rows


def _figure(entry: Published, metric: str) -> str:
    value = {"avg": entry.avg_at_32, "cons": entry.cons_at_32, "pass": entry.pass_at_32}[metric]
    if value is None:
        return ""
    return f"{value:.2f}" if value == round(value, 2) else f"{value:.3f}"  # as precise as it was published
