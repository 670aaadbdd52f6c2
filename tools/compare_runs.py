"""Compare runs over seeds: accuracy, length, entropy and influence weights, as tables and one figure."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

EXAMPLES = """\
examples:
  tools/compare_runs.py runs/*
  tools/compare_runs.py runs/* --by algorithm.half_life_tokens --title 'Half-life' --out half_life.png
  tools/compare_runs.py runs/* --markdown > comparison.md

Runs with one value of the key are a group, its seeds are the observations. Intervals are Student's t over seeds, 95 %.
Differences are taken seed by seed. Tasks, or training files by name, get a row of panels each.
"""


def main() -> int:
    """Exit status of the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders, finished or not")
    parser.add_argument(
        "--by", default="algorithm", metavar="KEY", help="configuration key that makes the groups (default: algorithm)"
    )
    parser.add_argument(
        "--row-key",
        default="data",
        metavar="KEY",
        help="one row of panels for each value (default: task or data files)",
    )
    parser.add_argument("--title", default="Comparison of runs", help="of the figure")
    parser.add_argument(
        "--out", type=Path, default=Path("compare.png"), metavar="FILE.png", help="the figure (default: compare.png)"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print the numbers as JSON")
    form.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    options = parser.parse_args()
    from fipo_megatron.observability.compare import find_caveats, group_runs, paired_differences, read_run
    from fipo_megatron.observability.compare_report import comparison_json, comparison_tables, plot_comparison
    from fipo_megatron.observability.progress import print_table

    figure = options.out
    try:
        groups = group_runs([read_run(folder) for folder in options.runs], options.by, options.row_key)
        differences = paired_differences(groups)
        plot_comparison(groups, figure, options.title)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for caveat in find_caveats(groups, options.by):
        print(f"note: {caveat}", file=sys.stderr)
    if options.json:
        print(json.dumps(comparison_json(groups, differences), indent=2, allow_nan=False))
        return 0
    for table in comparison_tables(groups, differences):
        if options.markdown:
            print(f"{table.title[0].upper()}{table.title[1:]}:\n\n{table.markdown()}\n")
        else:
            print_table(table.title, table.header, table.rows)
    print(f"figure: {figure}", file=sys.stderr if options.markdown else sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
