"""Compare the loss with vectors that were computed with the authors' released losses."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from fipo_megatron.algorithm.reference_cases import CaseErrors

EXAMPLES = """examples:
  python tools/check_reference.py --vectors tests/data/fipo_vectors
  python tools/check_reference.py --vectors tests/data/fipo_vectors --dtype float32 --json

DIR holds index.json, a list of {file, objective, config, loss_agg_mode, expected}, and the safetensors files it names.
exit status: 0 agreement, 1 an error above its tolerance (float64: 1e-9, metrics 1e-6; float32: 1e-4), 2 unusable input
"""

CASE_KEYS = ("file", "objective", "config", "loss_agg_mode", "expected")


def main(arguments: list[str] | None = None) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(
        prog="check_reference",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--vectors", type=Path, required=True, metavar="DIR", help="folder with index.json")
    parser.add_argument("--dtype", choices=("float64", "float32"), default="float64", help="of the inputs")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    options = parser.parse_args(arguments)

    import torch

    from fipo_megatron.algorithm.reference_cases import worst_errors

    dtype = torch.float64 if options.dtype == "float64" else torch.float32
    try:
        results = run_cases(options.vectors, dtype)
    except ValueError as error:
        print(f"check_reference: {error}", file=sys.stderr)
        return 2
    worst = worst_errors(errors for _, errors in results)
    ok = worst.within(dtype)
    if options.json:
        print(json.dumps({"cases": len(results), **{f"err_{k}": v for k, v in vars(worst).items()}, "ok": ok}))
    else:
        print_table(results, dtype)
    return 0 if ok else 1


def run_cases(folder: Path, dtype: torch.dtype) -> list[tuple[str, CaseErrors]]:
    """File name and errors of every case of `folder`/index.json, in order; ValueError where something is unreadable."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from fipo_megatron.algorithm.reference_cases import case_errors

    results = []
    for case in read_index(folder):
        try:
            results.append((case["file"], case_errors(case, load_file(folder / case["file"]), dtype)))
        except (OSError, SafetensorError) as error:
            raise ValueError(f"cannot read {folder / case['file']}: {error}") from error
        except ValueError as error:
            raise ValueError(f"case {case['file']}: {error}") from error
    return results


def read_index(folder: Path) -> list[dict[str, Any]]:
    """The entries of `folder`/index.json."""
    path = folder / "index.json"
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}; --vectors takes a folder with index.json") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(index, list) or not index:
        raise ValueError(f"{path} lists no cases: it must be a list of at least one")
    for number, case in enumerate(index, start=1):
        missing = [key for key in CASE_KEYS if not isinstance(case, dict) or key not in case]
        if missing:
            raise ValueError(f"case {number} of {path} lacks {', '.join(missing)}")
    return index


def print_table(results: list[tuple[str, CaseErrors]], dtype: torch.dtype) -> None:
    """One line a case, the worst errors below."""
    from fipo_megatron.algorithm.reference_cases import worst_errors

    width = max(len(name) for name, _ in results)
    print(f"{'relative error of':<{width}}  {'loss':>8}  {'gradient':>8}  {'future_kl':>9}  {'metrics':>8}")
    for name, errors in [*results, ("worst", worst_errors(e for _, e in results))]:
        verdict = "" if errors.within(dtype) else "  above tolerance"
        print(
            f"{name:<{width}}  {errors.loss:8.1e}  {errors.grad:8.1e}  {errors.future_kl:9.1e}  {errors.metrics:8.1e}"
            f"{verdict}"
        )


if __name__ == "__main__":
    sys.exit(main())
