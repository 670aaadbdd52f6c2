"""Compare the update of parallel layouts with that of one transformers process, on tiny models in local processes."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

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

FIGURES = ("abs_err_logprob", "abs_err_loss", "rel_err_grad", "rel_err_parameters", "peak_gib")


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
        "--max-response-tokens", type=_length, metavar="N", help="one response is that long, packed with short ones"
    )
    parser.add_argument(
        "--logprob-from", choices=("hidden_states", "logits"), default="hidden_states", help="kernels.logprob_from"
    )
    parser.add_argument("--platform", choices=("cpu", "cuda"), default="cpu", help="cuda: a device for each rank")
    parser.add_argument("--json", action="store_true", help="print one JSON object a layout and family")
    options = parser.parse_args(arguments)

    from fipo_megatron.trainer.layouts import supports

    pairs = [(family, layout) for family in options.family for layout in options.layouts]
    supported = [pair for pair in pairs if supports(*pair)]
    if options.layouts != list(LAYOUTS):  # else it is no news that families differ
        for family, layout in pairs:
            if not supports(family, layout):
                print(f"check_layouts: {layout} is no layout of {family}: left out", file=sys.stderr)
    if not supported:
        print("error: --layouts: none of them is one of --family; see --help for all", file=sys.stderr)
        return 2
    return 0 if check_pairs(supported, options) else 1


def check_pairs(pairs: Sequence[tuple[str, str]], options: argparse.Namespace) -> bool:
    """Check families in layouts and print what is found; whether all updates are equal."""
    from fipo_megatron.observability.progress import print_table
    from fipo_megatron.trainer.layout_check import Checker

    rows, ok = [], True
    with tempfile.TemporaryDirectory() as folder:
        for family, of_family in groupby(pairs, key=itemgetter(0)):
            checker = Checker(family, Path(folder) / family, options.max_response_tokens, options.platform)
            for _, layout in of_family:
                print(f"{family} {layout} ...", file=sys.stderr, flush=True)
                found: dict[str, Any] = dict.fromkeys(FIGURES)
                equal = False
                try:
                    errors = checker.check(layout, kernels={"logprob_from": options.logprob_from})
                    found, equal = vars(errors), errors.ok
                except RuntimeError as error:
                    print(f"check_layouts: {family} {layout}: {error}", file=sys.stderr)
                ok = ok and equal
                if options.json:
                    print(json.dumps({"layout": layout, "family": family, **found, "ok": equal}), flush=True)
                figures = ("failed" if found[name] is None else f"{found[name]:.1e}" for name in FIGURES[:-1])
                peak = found[FIGURES[-1]]
                rows.append((family, layout, "yes" if equal else "NO", *figures, "" if peak is None else f"{peak:.2f}"))
    if not options.json:
        columns = ("family", "layout", "equal", "log-prob", "loss", "gradient", "parameters", "GiB")
        title = f"megatron-core {version('megatron-core')}: absolute, absolute, relative, relative differences"
        print_table(f"{title} from transformers in float64", columns, rows)
    return ok


def _length(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no length of a response: give a number of tokens, 1 or more")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
