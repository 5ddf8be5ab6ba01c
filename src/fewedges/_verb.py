"""Let a stage's package be called like its verb: `fe.sparsify(...)` is `fewedges/sparsify/` and the function."""

import importlib
import sys
from types import ModuleType
from typing import Any


def make_callable_(package: str, module: str, verb: str) -> None:
    """Make the package call `verb` of its submodule: Python binds a subpackage over a function of the same name."""

    class Verb(ModuleType):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return getattr(importlib.import_module(f"{package}.{module}"), verb)(*args, **kwargs)

    sys.modules[package].__class__ = Verb
