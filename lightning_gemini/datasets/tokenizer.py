"""From text to tokens: bytes by default, a HuggingFace `tokenizer.json`, or any callable.

Seam: `tokenizer_of(...)` makes a `Tokenizer` of what the user set; `tokens_of` a stream of documents with the end-of-document token
after each. The `identity` goes into the cache's key: it must change whenever the tokens do. There is no state.

Failures: a missing package, file, identity or end-of-document token is told when the tokenizer is made, before anything is read; a
token outside of the vocabulary when it appears.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lightning_gemini.datasets.settings import optional, require
from lightning_gemini.datasets.store import Array
from lightning_gemini.datasets.writer import fitting

_ENDS = ("<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "</s>", "<eos>", "[EOS]")
"""What published tokenizers call their end of a document."""
_DOCUMENTS, _CHARACTERS = 512, 4 << 20
"""What is tokenised in one go, at most: enough to keep all cores busy, little enough to hold."""
_UINT16_IDS = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    identity: str
    vocabulary: int | None
    """Number of ids; None if unknown."""
    end_of_document: int
    encode: Callable[[list[str]], list[Any]]
    """Tokens of many texts at once; a function of a module, so that a data module can be pickled."""

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype("<u2" if self.vocabulary is not None and self.vocabulary <= _UINT16_IDS else "<i4")


def tokenizer_of(chosen: object, identity: str | None = None, end_of_document: int | str | None = None) -> Tokenizer:
    """`chosen`: None for bytes, the path of a tokenizer.json, or a callable str -> list of int."""
    if chosen is None:
        require(end_of_document is None, "end_of_document", end_of_document, "leave it out: with bytes it is 256")
        return Tokenizer(identity="bytes", vocabulary=257, end_of_document=256, encode=_bytes)
    if isinstance(chosen, (str, os.PathLike)):
        return _from_file(Path(chosen).expanduser(), end_of_document)
    require(callable(chosen), "tokenizer", chosen, "give the path of a tokenizer.json, a callable str -> list of int, or None for bytes")
    return _from_callable(chosen, identity, end_of_document)


def _bytes(texts: list[str]) -> list[Any]:
    return [np.frombuffer(text.encode(), np.uint8) for text in texts]


def _with_package(made: Any, texts: list[str]) -> list[Any]:
    return [found.ids for found in made.encode_batch(texts, add_special_tokens=False)]


def _one_by_one(chosen: Callable[[str], Any], texts: list[str]) -> list[Any]:
    return [chosen(text) for text in texts]


def _from_file(path: Path, end: int | str | None) -> Tokenizer:
    require(path.is_file(), "tokenizer", str(path), "no such file: give the path of a tokenizer.json")
    package = optional("tokenizers", f"tokenizer={str(path)!r}")
    content = path.read_bytes()
    try:
        made = package.Tokenizer.from_buffer(content)
    except Exception as error:  # the package raises nothing more precise
        raise ValueError(f"tokenizer={str(path)!r} is not valid: not a tokenizer.json: {error}") from error
    # Truncation and padding are for single samples; here they would cut documents.
    made.no_truncation()
    made.no_padding()
    names = [end] if isinstance(end, str) else _ENDS
    number = end if isinstance(end, int) else next((i for i in map(made.token_to_id, names) if i is not None), None)
    size = int(made.get_vocab_size(with_added_tokens=True))
    known = sorted(made.get_added_tokens_decoder().items())
    remedy = f"name the token that ends a document, or its id; the tokenizer's own are {[str(token) for _, token in known[:20]]}"
    require(number is not None and number >= 0 and made.id_to_token(number) is not None, "end_of_document", end, remedy)
    # Ids may have gaps, so their number says nothing about the largest.
    largest = max((*made.get_vocab(with_added_tokens=True).values(), size - 1))
    return Tokenizer(
        identity=f"tokenizer.json {hashlib.sha256(content).hexdigest()}",
        vocabulary=largest + 1,
        end_of_document=int(number or 0),
        encode=partial(_with_package, made),
    )


def _from_callable(chosen: Any, identity: str | None, end: int | str | None) -> Tokenizer:
    name = identity if identity is not None else getattr(chosen, "identity", None)
    remedy = "the cache must know what made it: give tokenizer_identity='name and version', or the callable an attribute `identity`"
    require(isinstance(name, str) and bool(name), "tokenizer_identity", name, remedy)
    number: Any = end if end is not None else getattr(chosen, "end_of_document", None)
    remedy = "give the id of the token that ends a document, or the callable an attribute `end_of_document`"
    require(isinstance(number, int) and not isinstance(number, bool) and number >= 0, "end_of_document", number, remedy)
    size = getattr(chosen, "vocabulary_size", None)
    require(size is None or (isinstance(size, int) and size > number), "tokenizer.vocabulary_size", size, f"more than {number}, or none")
    return Tokenizer(identity=f"callable {name}", vocabulary=size, end_of_document=number, encode=partial(_one_by_one, chosen))


def tokens_of(documents: Iterable[str], tokenizer: Tokenizer) -> Iterator[Array]:
    """The tokens of each document, and the token that ends it."""
    end = np.array([tokenizer.end_of_document], tokenizer.dtype)
    for texts in _portions(documents):
        for tokens in tokenizer.encode(texts):
            yield np.concatenate((fitting(tokens, tokenizer.dtype), end))


def _portions(documents: Iterable[str]) -> Iterator[list[str]]:
    held: list[str] = []
    size = 0
    for text in documents:
        held.append(text)
        size += len(text)
        if len(held) >= _DOCUMENTS or size >= _CHARACTERS:
            yield held
            held, size = [], 0
    if held:
        yield held
