"""Compare the update of parallel layouts with that of one transformers process, on tiny models in local processes."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

EXAMPLES = """\
examples:
  tools/check_layouts.py --layouts tp2 cp2
  tools/check_layouts.py --family qwen3_moe --layouts ep2 ep2_tp2_sp
  tools/check_layouts.py --json > layouts.jsonl

Without options every family runs in every layout that supports it: about two minutes a family on two CPU cores.
exit status: 0 all updates are equal, 1 an error above its tolerance or a rank failed, 2 unusable arguments
"""


def main(arguments: list[str] | None = None) -> int:
    """Exit status of the command."""
    from fipo_megatron.trainer.layout_check import LAYOUTS
    from fipo_megatron.trainer.tiny_models import MODELS

    parser = argparse.ArgumentParser(
        prog="check_layouts", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", nargs="+", choices=MODELS, default=list(MODELS), metavar="F", help="families")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), metavar="L", help="layouts")
    parser.add_argument("--json", action="store_true", help="print one JSON object a layout and family")
    options = parser.parse_args(arguments)

    from fipo_megatron.observability.progress import print_table
    from fipo_megatron.trainer.layout_check import Checker, supports

    rows, ok = [], True
    with tempfile.TemporaryDirectory() as folder:
        for family in options.family:
            checker = Checker(family, Path(folder) / family)
            for layout in options.layouts:
                if not supports(family, layout):
                    continue
                print(f"{family} {layout} ...", file=sys.stderr, flush=True)
                try:
                    errors = checker.check(layout)
                except RuntimeError as error:
                    print(f"check_layouts: {family} {layout}: {error}", file=sys.stderr)
                    ok = False
                    continue
                ok = ok and errors.ok
                if options.json:
                    row = {"layout": layout, "family": family, **vars(errors), "ok": errors.ok}
                    print(json.dumps(row), flush=True)
                figures = (errors.abs_err_logprob, errors.abs_err_loss, errors.rel_err_grad, errors.rel_err_parameters)
                rows.append((family, layout, *(f"{x:.1e}" for x in figures), "yes" if errors.ok else "NO"))
    if not options.json:
        columns = ("family", "layout", "log-prob", "loss", "gradient", "parameters", "equal")
        print_table("difference from transformers: absolute, absolute, relative, relative", columns, rows)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
