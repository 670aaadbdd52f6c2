"""Wait until a Ray cluster has all its nodes: for scripts that start them, before they start a run."""

from __future__ import annotations

import argparse
import sys

EXAMPLES = """\
The cluster is that of RAY_ADDRESS, its token in the file RAY_AUTH_TOKEN_PATH.

example:
  RAY_ADDRESS=10.0.0.1:6379 RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=token tools/wait_for_ray.py --nodes 16

exit status: 0 they are there, 1 some are missing after the timeout, or the cluster can't be reached, 2 refused
"""


def main(arguments: list[str] | None = None) -> int:
    """Exit status of the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, required=True, metavar="N", help="how many there must be")
    parser.add_argument("--timeout", type=float, default=300, metavar="S", help="seconds; default 300")
    options = parser.parse_args(arguments)
    if options.nodes < 1:
        parser.error(f"--nodes {options.nodes}: must be 1 or more")
    from fipo_megatron.trainer.ray_cluster import wait_for_nodes

    try:
        addresses = wait_for_nodes(options.nodes, options.timeout)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{len(addresses)} Ray nodes: {', '.join(addresses)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
