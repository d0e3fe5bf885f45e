"""`import mgvq` tells transformers how to read our checkpoints; neither it nor torch is imported for that."""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_MODULE = "transformers.quantizers.auto"


def register() -> None:
    """Register the quantiser with transformers, at once or as soon as somebody imports the module that keeps the list."""
    if _MODULE in sys.modules:
        _tell()
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


class _Waiting(MetaPathFinder):
    """Finds nothing by itself: sees the one module being imported, and tells it once it is there."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        loader: Any = spec.loader if spec else None
        if loader is not None:
            whole = loader.exec_module

            def and_tell(module: ModuleType) -> None:
                whole(module)
                _tell()

            loader.exec_module = and_tell
        return spec


def _tell() -> None:
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer

    from mgvq.checkpoint.quantizer import METHOD, MgvqConfig, MgvqQuantizer

    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(MgvqConfig)
        register_quantizer(METHOD)(MgvqQuantizer)
