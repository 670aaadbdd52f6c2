"""Turn the settings of a verl launcher into a configuration, and say what became of every key."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fipo_megatron.config.verl.convert import Translation

EXAMPLES = """\
examples:
  tools/import_verl_config.py run_dapo_qwen2.5_32b.sh
  tools/import_verl_config.py overrides.txt --out mine.yaml
  tools/train.py mine.yaml --dry-run

The file is a shell script that starts verl, or lines of key=value; it is read and never executed. Variables that it
assigns are put in, also ${NAME:-default} and $((1024 * 20)). What it leaves to verl's defaults is taken from those
where samples or updates depend on it. An FSDP launcher has no layout to take over: choose parallel.* yourself.

exit status: 0 translated, 2 refused
"""
FATES = ("taken over", "verl's default", "same as the default", "no counterpart", "unknown")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status of the command."""
    parser = argparse.ArgumentParser(
        prog="import_verl_config",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("launcher", type=Path, metavar="OVERRIDES_FILE", help="verl's launcher, or its overrides")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the configuration to this new file")
    options = parser.parse_args(arguments)
    try:
        from fipo_megatron.config.verl.convert import translate

        if not options.launcher.is_file():
            raise ValueError("no such file; correct the path")
        if options.out is not None and options.out.exists():
            raise ValueError(f"--out {options.out}: exists; give another name, or remove it")
        if options.out is not None and not options.out.absolute().parent.is_dir():
            raise ValueError(f"--out {options.out}: no folder {options.out.parent}; make it")
        translation = translate(read_text(options.launcher))
        print_rows(translation)
        print_remaining(translation)
        if options.out is not None:
            options.out.write_text(translation.to_yaml(), encoding="utf-8")
            print(f"written: {options.out}")
    except (ValueError, OSError) as error:
        print(f"error: {options.launcher}: {error}", file=sys.stderr)
        return 2
    return 0


def read_text(file: Path) -> str:
    """The text of a launcher.

    Raises:
        ValueError: it is no text.
    """
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"is no text in UTF-8 ({error.reason} at byte {error.start}); give a shell script") from None


def print_rows(translation: Translation) -> None:
    """A table for each fate that some key has."""
    from fipo_megatron.observability.progress import print_table

    for fate in FATES:
        rows = [(row.key, row.given, row.ours) for row in translation.rows if row.fate == fate]
        if rows:
            print_table(f"{fate}: {len(rows)}", ("verl", "value", "here"), rows)


def print_remaining(translation: Translation) -> None:
    """What has to be done before a run can start."""
    from fipo_megatron.config.checks import check_config

    for line in translation.to_do:
        print(f"to do: {line}")
    try:
        check_config(translation.config)
    except ValueError as error:
        for line in str(error).splitlines()[1:]:
            print(f"to do: {line.strip()}")
    if translation.config.parallel.world_size == 1:
        print("to do: parallel: the launcher has no layout of Megatron's; choose one, docs/recipes.md has examples")


if __name__ == "__main__":
    sys.exit(main())
