"""Write docs/configuration.md, the reference of all settings, from the schema."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = """\
examples:
  tools/write_config_reference.py
  tools/write_config_reference.py --check

exit status: 0 written or up to date, 1 out of date (--check), or no such folder
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status of the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs/configuration.md", metavar="FILE", help="the page")
    parser.add_argument("--check", action="store_true", help="write nothing, say whether the page is up to date")
    options = parser.parse_args(arguments)
    from fipo_megatron.config.reference import write_reference

    page = write_reference()
    if not options.out.parent.is_dir():
        print(f"error: --out {options.out}: no folder {options.out.parent}; make it", file=sys.stderr)
        return 1
    if not options.check:
        options.out.write_text(page, encoding="utf-8")
    elif not options.out.exists() or options.out.read_text(encoding="utf-8") != page:
        print(f"error: {options.out} is not what the schema says; run tools/write_config_reference.py", file=sys.stderr)
        return 1
    print(f"{'up to date' if options.check else 'written'}: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
