"""Compare the update of parallel layouts with that of one transformers process, on tiny models in local processes."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

EXAMPLES = """\
examples:
  tools/check_layouts.py --layouts tp2 cp2
  tools/check_layouts.py --family qwen3_moe --layouts ep2 ep2_tp2_sp
  tools/check_layouts.py --logprob-from logits --json > layouts.jsonl
  tools/check_layouts.py --family qwen2 --layouts tp1 tp2_cp2_sp --max-response-tokens 16384

Memory is the rank's that took most, in GiB, at its peak: on a CPU that of the whole process, imports included.
Without options every family runs in every layout that supports it: about a minute a family on two CPU cores.
exit status: 0 all updates are equal, 1 an error above its tolerance or a rank failed, 2 unusable arguments
"""


def main(arguments: list[str] | None = None) -> int:
    """Exit status of the command."""
    from fipo_megatron.trainer.layouts import LAYOUTS
    from fipo_megatron.trainer.tiny_models import MODELS

    parser = argparse.ArgumentParser(
        prog="check_layouts", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", nargs="+", choices=MODELS, default=list(MODELS), metavar="F", help="families")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), metavar="L", help="layouts")
    parser.add_argument(
        "--max-response-tokens", type=int, metavar="N", help="one response is that long, packed with short ones"
    )
    parser.add_argument(
        "--logprob-from", choices=("hidden_states", "logits"), default="hidden_states", help="kernels.logprob_from"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object a layout and family")
    options = parser.parse_args(arguments)

    from fipo_megatron.observability.progress import print_table
    from fipo_megatron.trainer.layout_check import Checker
    from fipo_megatron.trainer.layouts import supports

    rows, ok = [], True
    with tempfile.TemporaryDirectory() as folder:
        for family in options.family:
            checker = Checker(family, Path(folder) / family, options.max_response_tokens)
            for layout in options.layouts:
                if not supports(family, layout):
                    continue
                print(f"{family} {layout} ...", file=sys.stderr, flush=True)
                try:
                    errors = checker.check(layout, kernels={"logprob_from": options.logprob_from})
                except RuntimeError as error:
                    print(f"check_layouts: {family} {layout}: {error}", file=sys.stderr)
                    ok = False
                    continue
                ok = ok and errors.ok
                if options.json:
                    row = {"layout": layout, "family": family, **vars(errors), "ok": errors.ok}
                    print(json.dumps(row), flush=True)
                figures = (errors.abs_err_logprob, errors.abs_err_loss, errors.rel_err_grad, errors.rel_err_parameters)
                equal = "yes" if errors.ok else "NO"
                rows.append((family, layout, equal, *(f"{x:.1e}" for x in figures), f"{errors.peak_gib:.2f}"))
    if not options.json:
        columns = ("family", "layout", "equal", "log-prob", "loss", "gradient", "parameters", "GiB")
        title = f"megatron-core {version('megatron-core')}: absolute, absolute, relative, relative differences"
        print_table(f"{title} from transformers in float64", columns, rows)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
