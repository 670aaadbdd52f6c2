"""What SGLang accepts, by its own wheel: its request structs, built from its source without importing the rest of it.

Importing the module that defines them takes eleven seconds and packages that only its server needs.
"""

from __future__ import annotations

import ast
import io
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import msgspec

PRELUDE = """
from __future__ import annotations
from typing import Annotated, Any, Dict, List, Literal, Optional, Set, Union
import msgspec
class Base64Bytes: pass
FinishReasonDict = WeightVersionSpans = CustomParamValue = WatermarkRequestConfig = Any
TOP_K_ALL = 0
"""
STRUCTS = {  # of srt/managers/io_struct.py, by the path that takes them
    "/begin_weight_update": "BeginWeightUpdateReqInput",
    "/end_weight_update": "EndWeightUpdateReqInput",
    "/init_weights_update_group": "InitWeightsUpdateGroupReqInput",
    "/update_weights_from_distributed": "UpdateWeightsFromDistributedReqInput",
    "/update_weights_from_tensor": "UpdateWeightsFromTensorReqInput",
    "/update_weights_from_disk": "UpdateWeightFromDiskReqInput",
    "/update_weight_version": "UpdateWeightVersionReqInput",
    "/pause_generation": "PauseGenerationReqInput",
    "/continue_generation": "ContinueGenerationReqInput",
    "/abort_request": "AbortReq",
    "/release_memory_occupation": "ReleaseMemoryOccupationReqInput",
    "/resume_memory_occupation": "ResumeMemoryOccupationReqInput",
    "/flush_cache": "FlushCacheReqInput",
}


class RefusedError(ValueError):
    """SGLang would answer with an error."""


class Structs:
    """The structs of the SGLang that lies in a folder."""

    def __init__(self, sglang: Path) -> None:
        requests = _classes(sglang / "srt/managers/io_struct.py")
        sampling = _classes(sglang / "srt/sampling/sampling_params.py")
        self._module = types.ModuleType("structs_of_sglang")
        sys.modules[self._module.__name__] = self._module  # where the types in annotations are looked up
        wanted = [requests["BaseReq"], *(requests[name] for name in STRUCTS.values()), sampling["SamplingParams"]]
        exec(PRELUDE + "\n".join(ast.unparse(_without_methods(node)) for node in wanted), vars(self._module))
        self._generate = _field_names(requests["GenerateReqInput"])
        unpickler = _classes(sglang / "srt/utils/common.py")["SafeUnpickler"]
        (allowed,) = [
            node.value
            for node in unpickler.body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "ALLOWED_GLOBALS"
        ]
        self._allowed = ast.literal_eval(allowed)

    def check(self, path: str, body: Any) -> dict[str, Any]:
        """The body with defaults and converted values; RefusedError where SGLang would refuse it."""
        if path == "/generate":
            _refuse_unknown(body, self._generate)
            self._convert("SamplingParams", body["sampling_params"])
            return body
        if path not in STRUCTS:
            raise RefusedError(f"no such path: {path}")
        return self._convert(STRUCTS[path], body)

    def _convert(self, name: str, body: dict[str, Any]) -> dict[str, Any]:
        fields = {field.name: field for field in msgspec.structs.fields(getattr(self._module, name))}
        _refuse_unknown(body, fields.keys())
        values = {}
        for key, field in fields.items():
            if key not in body and field.required:
                raise RefusedError(f"{name}.{key}: is missing")
            try:
                values[key] = msgspec.convert(body[key], field.type) if key in body else field.default
            except msgspec.ValidationError as error:
                raise RefusedError(f"{name}.{key}: {error}") from error
        return values

    def unpickle(self, data: bytes) -> Any:
        """As SGLang's unpickler does, which knows a list of constructors alone."""
        allowed = self._allowed

        class Unpickler(pickle.Unpickler):
            def find_class(self, module: str, name: str) -> Any:
                if (module, name) not in allowed:
                    raise RefusedError(f"SGLang does not unpickle {module}.{name}")
                return super().find_class(module, name)

        return Unpickler(io.BytesIO(data)).load()


def _classes(path: Path) -> dict[str, ast.ClassDef]:
    return {node.name: node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)}


def _without_methods(node: ast.ClassDef) -> ast.ClassDef:
    body = [part for part in node.body if isinstance(part, ast.AnnAssign)]
    return ast.ClassDef(node.name, node.bases, node.keywords, body or [ast.Pass()], [])


def _field_names(node: ast.ClassDef) -> set[str]:
    return {ast.unparse(part.target) for part in node.body if isinstance(part, ast.AnnAssign)}


def _refuse_unknown(body: Any, known: Any) -> None:
    unknown = sorted(set(body) - set(known))
    if unknown:
        raise RefusedError(f"unknown: {', '.join(unknown)}")
