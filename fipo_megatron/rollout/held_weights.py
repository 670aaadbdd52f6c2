"""Which weights an engine holds, and whether it may sample from them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class HeldWeights:
    """`version` of the weights; -1 until the first update where the engine has started from dummy weights."""

    def __init__(self, version: int) -> None:
        self.version = version
        self.failure: str | None = None  # of the update that left it half-updated

    def check(self) -> None:
        """Return if the engine may sample.

        Raises:
            RuntimeError: it holds dummy weights, or an update failed.
        """
        self._check_whole()
        if self.version < 0:
            raise RuntimeError("the engine holds dummy weights: push the policy's before generating")

    @contextmanager
    def updating(self, version: int) -> Iterator[None]:
        """Around an update to `version`: if it fails, the engine says so at every later call.

        Raises:
            RuntimeError: one has failed already.
        """
        self._check_whole()
        self.version = -1
        try:
            yield
        except BaseException as error:
            self.failure = f"{type(error).__name__}: {error}"
            raise
        self.version = version

    def _check_whole(self) -> None:
        if self.failure is not None:
            raise RuntimeError(f"the engine is half-updated and must be rebuilt; its update failed: {self.failure}")
