"""Windows of text tokens, from a file, a folder, or a streamed Hugging Face dataset.

Text is tokenised once into a flat file of token ids in the cache, and read through a memory map. Which windows
belong to step s is a pure function of (seed, s): a permutation per epoch. Documents are separated by a line
`<|endoftext|>` in plain text, by rows in jsonl, and by the separator token in the stream.
"""

import hashlib
import json
import lzma
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fewedges.data.batch import Batch
from fewedges.errors import DataError
from fewedges.store import cache_folder, sha256_of

SEPARATOR = "<|endoftext|>"
SUFFIXES = (".txt", ".md", ".jsonl", ".txt.xz", ".jsonl.xz", ".txt.gz", ".jsonl.gz")
PIECE = 2**24
"""Characters after which even one document is cut, so that memory stays bounded."""


@dataclass(frozen=True)
class Text:
    """Token ids as one long stream, cut into windows of `context_length` tokens for training."""

    name: str
    stream: np.ndarray
    """(N,) token ids, memory-mapped."""
    context_length: int
    seed: int = 0
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.windows < 1:
            found = f"{len(self.stream)} tokens, less than one window of {self.context_length}"
            raise DataError(f"text {self.name}", found, "more text, or a smaller context_length")

    @property
    def windows(self) -> int:
        """Number of whole windows in an epoch."""
        return len(self.stream) // self.context_length

    def at(self, step: int, size: int) -> Batch:
        """The `size` windows of step `step`; epochs follow each other without a gap, each shuffled anew."""
        places = [self._window(position) for position in range(step * size, (step + 1) * size)]
        rows = [self.stream[p * self.context_length : (p + 1) * self.context_length] for p in places]
        tokens = torch.from_numpy(np.stack(rows).astype(np.int64))  # (B, T)
        counts = torch.ones_like(tokens, dtype=torch.bool)
        counts[:, 0] = False
        return Batch(tokens, counts)

    def describe(self) -> dict[str, Any]:
        """Name, tokens, sha256 of what is read."""
        return {
            "name": self.name,
            "tokens": len(self.stream),
            "context_length": self.context_length,
            **self.facts,
        }

    def _window(self, position: int) -> int:
        epoch, place = divmod(position, self.windows)
        return int(_permutation(self.windows, self.seed, epoch)[place])


_PERMUTATIONS: dict[tuple[int, int, int], np.ndarray] = {}


def _permutation(windows: int, seed: int, epoch: int) -> np.ndarray:
    """The order of one epoch; the last two are remembered."""
    key = (windows, seed, epoch)
    if key not in _PERMUTATIONS:
        while len(_PERMUTATIONS) > 1:
            _PERMUTATIONS.pop(next(iter(_PERMUTATIONS)))
        _PERMUTATIONS[key] = np.random.default_rng([seed, epoch]).permutation(windows)
    return _PERMUTATIONS[key]


def read_text(
    source: str | Path, tokenizer: Any, *, context_length: int, seed: int = 0, max_tokens: int | None = None
) -> Text:
    """Tokenise a file (.txt .md .jsonl, also .xz .gz), a folder of them, or a hub dataset's train split.

    `max_tokens` bounds what is read; a streamed dataset needs it. Raises DataError when nothing can be read.
    """
    stream, facts = token_stream(source, tokenizer, max_tokens)
    return Text(str(source), stream, context_length, seed, facts)


def token_stream(
    source: str | Path, tokenizer: Any, max_tokens: int | None = None
) -> tuple[np.ndarray, dict[str, Any]]:
    """The token ids of a source (N,), from the cache when they are there, and the sha256 of what was read."""
    path = Path(source)
    local = path.exists()
    if not local and (max_tokens is None or path.suffix):
        hint = "an existing file or folder, or a hub dataset id with --max-tokens (pip install 'fewedges[data]')"
        raise DataError(f"text {source}", "no such file or folder", hint)
    digest = _digest(_files(path)) if local else hashlib.sha256(str(source).encode()).hexdigest()
    key = hashlib.sha256(f"{digest} {_tokenizer_key(tokenizer)} {max_tokens}".encode()).hexdigest()[:24]
    cached = cache_folder() / "tokens" / f"{key}.npy"
    if not cached.exists():
        pieces = _read_pieces(path) if local else _stream_pieces(str(source))
        _save_tokens(cached, _tokenise(pieces, tokenizer, max_tokens, str(source)))
    return _load_tokens(cached), {"sha256": digest, "max_tokens": max_tokens}


def _tokenise(pieces: Iterator[str], tokenizer: Any, limit: int | None, source: str) -> np.ndarray:
    """Documents to ids, a separator token between them, at most `limit` ids."""
    vocabulary = tokenizer.get_vocab()
    separator = vocabulary.get(SEPARATOR, tokenizer.eos_token_id)
    kind = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    parts: list[np.ndarray] = []
    count = 0
    while documents := list(islice(pieces, 256)):
        for ids in _ids(documents, tokenizer, source):
            closed = ids if separator is None else [*ids, separator]
            parts.append(np.asarray(closed, dtype=kind))
            count += len(closed)
        if limit is not None and count >= limit:
            break
    if not count:
        raise DataError(f"text {source}", "no text in it", "a file that holds text")
    return np.concatenate(parts)[:limit]


def _ids(documents: list[str], tokenizer: Any, source: str) -> list[list[int]]:
    try:
        return tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]
    except Exception as error:  # the tokenizers package raises Exception itself
        found = f"the tokenizer cannot write it as tokens ({error})"
        raise DataError(f"text {source}", found, "text in the characters this model knows") from error


def _save_tokens(path: Path, ids: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".part.npy")
    np.save(fresh, ids)
    fresh.replace(path)


def _load_tokens(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"tokens {path}", f"it is damaged ({error})", "delete it, it will be made again") from error


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.name.endswith(SUFFIXES))
    if not files:
        raise DataError(f"text {path}", f"no {', '.join(SUFFIXES)} file in it", "a folder of text files")
    return files


def _read_pieces(path: Path) -> Iterator[str]:
    """Documents of local files, long ones cut at line ends into pieces a tokenizer takes in one bite."""
    for file in _files(path):
        try:
            yield from _documents(file)
        except (UnicodeDecodeError, OSError, lzma.LZMAError, zlib.error, EOFError) as error:
            raise DataError(f"text {file}", f"{type(error).__name__}: {error}", "a UTF-8 text file") from error


def _documents(file: Path) -> Iterator[str]:
    lines: list[str] = []
    size = 0
    with _open(file) as handle:
        for number, line in enumerate(handle, 1):
            if ".jsonl" in file.suffixes:
                yield _json_text(file, number, line)
                continue
            ends = line.strip() == SEPARATOR
            if not ends:
                lines.append(line)
                size += len(line)
            if (ends or size > PIECE) and lines:
                yield "".join(lines)
                lines, size = [], 0
    if lines:
        yield "".join(lines)


def _json_text(file: Path, number: int, line: str) -> str:
    try:
        found = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError):
        found = None
    if not isinstance(found, str):
        raise DataError(f"text {file} line {number}", "no json object with a text field", '{"text": "..."}')
    return found


def _open(file: Path) -> Any:
    import gzip

    if file.suffix == ".xz":
        return lzma.open(file, "rt", encoding="utf-8")
    return gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else open(file, encoding="utf-8")


def _stream_pieces(name: str) -> Iterator[str]:
    try:
        from datasets import load_dataset  # type: ignore[import-not-found]
    except ImportError as error:
        hint = "an existing file or folder, or pip install 'fewedges[data]' for hub datasets"
        raise DataError(f"text {name}", "no such file, and the datasets package is missing", hint) from error
    try:
        for row in load_dataset(name, split="train", streaming=True):
            yield row["text"]
    except Exception as error:  # the hub raises many kinds
        raise DataError(f"dataset {name}", str(error).splitlines()[0], "a dataset with a text column") from error


def _digest(files: list[Path]) -> str:
    """sha256 of one file's bytes, or over the digests of several."""
    digests = [sha256_of(file) for file in files]
    return digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()


def _tokenizer_key(tokenizer: Any) -> str:
    """sha256 of all that decides ids: vocabulary, separator, and the rules (merges, normalizer, pre-tokenizer)."""
    known: dict[str, Any] = {"words": sorted(tokenizer.get_vocab().items()), "end": tokenizer.eos_token_id}
    if hasattr(tokenizer, "backend_tokenizer"):
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        known |= {name: rules[name] for name in ("normalizer", "pre_tokenizer", "model")}
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()
