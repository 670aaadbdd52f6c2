"""Stand-ins for packages that SGLang imports on a CPU too although they are for CUDA: `sgl_kernel` and `torchvision`.

They compute nothing. Whatever is imported from them raises when it is called. The environment that
`tools/install.py --sglang` builds imports this module first in every process (a line of its .pth file).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

VERSIONS = {"sgl_kernel": "0.4.10", "torchvision": "0.0"}  # SGLang compares that of its kernels


class StandIn:
    """A function, class or module of a package that is not there."""

    def __init__(self, name: str) -> None:
        self.__name__ = name

    def __getattr__(self, name: str) -> StandIn:
        return make_member(self.__name__, name)

    def __call__(self, *arguments: object, **options: object) -> None:
        raise NotImplementedError(f"{self.__name__} is for CUDA; on a CPU {__name__} stands in for it")


def make_member(owner: str, name: str) -> StandIn:
    """Any member but those by which Python and libraries probe what an object can do."""
    if name.startswith("__"):
        raise AttributeError(f"{owner} has no {name}")
    return StandIn(f"{owner}.{name}")


class StandInModule(ModuleType):
    """A module of a package that is not there."""

    __version__: str

    def __getattr__(self, name: str) -> StandIn:
        return make_member(self.__name__, name)


class StandInFinder(MetaPathFinder, Loader):
    """Finds the packages that are not there, and any module in them."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """A stand-in's specification, None for other modules."""
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] in VERSIONS else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """An empty module with any member that is asked for."""
        module = StandInModule(spec.name)
        module.__version__ = VERSIONS[spec.name.partition(".")[0]]
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run."""


sys.meta_path.insert(0, StandInFinder())
