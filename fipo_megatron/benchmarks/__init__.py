"""The operations beside the machine's limits and beside other ways to compute the same: see tools/bench.py."""
