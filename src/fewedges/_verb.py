"""Let a stage's package be called like its verb: `fe.sparsify(...)` is `fewedges/sparsify/` and the function."""

import importlib
import os
import sys
from types import ModuleType
from typing import Any

from fewedges.errors import ModelError


def make_callable_(package: str, module: str, verb: str) -> None:
    """Make the package call `verb` of its submodule: Python binds a subpackage over a function of the same name."""

    class Verb(ModuleType):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            _check_model(verb, args[0] if args else kwargs.get("model", kwargs.get("what", ...)))
            return getattr(importlib.import_module(f"{package}.{module}"), verb)(*args, **kwargs)

    sys.modules[package].__class__ = Verb


def _check_model(verb: str, model: Any) -> None:
    """Refuse what is not yet a loaded model: its name, or a bare one of transformers."""
    if isinstance(model, str | os.PathLike):
        raise ModelError(f"{verb}({str(model)!r})", "a name, not a model", f"fe.{verb}(fe.load({str(model)!r}), ...)")
    import torch

    if model is None or isinstance(model, torch.nn.Module):
        hint = "what fe.load gives; a model in memory: save_pretrained it (with its tokenizer) and load the folder"
        raise ModelError(f"{verb}(model)", f"a {type(model).__name__}", hint)
