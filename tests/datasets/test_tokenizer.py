"""Tokens of bytes, of a tokenizer.json and of a callable; and which of them can be in a cache's key."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from lightning_gemini.datasets.tokenizer import tokenizer_of, tokens_of


class Letters:
    identity = "letters 1"
    end_of_document = 0

    def __call__(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]


def save(path: Path, words: dict[str, int], special: str | None = "</s>") -> Path:
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    if special:
        made.add_special_tokens([special])
        made.post_processor = tokenizers.processors.TemplateProcessing(single=f"$A {special}", special_tokens=[(special, len(words))])
    made.enable_truncation(2)
    made.enable_padding(length=9)
    made.save(str(path))
    return path


@given(st.lists(st.text(st.characters(codec="utf-8"))))
def test_bytes(texts: list[str]) -> None:
    tokenizer = tokenizer_of(None)
    found = list(tokens_of(texts, tokenizer))
    assert tokenizer.dtype == np.uint16 and all(tokens.dtype == np.uint16 and tokens[-1] == 256 for tokens in found)
    assert [bytes(tokens[:-1].astype(np.uint8)).decode() for tokens in found] == texts


def test_a_tokenizer_json(tmp_path: Path) -> None:
    """Nothing is added, cut or filled up but the token at the end."""
    path = save(tmp_path / "tokenizer.json", {"?": 0, "a": 1, "b": 2})
    tokenizer = tokenizer_of(str(path))
    assert [tokens.tolist() for tokens in tokens_of(["a b a c", "b"], tokenizer)] == [[1, 2, 1, 0, 3], [2, 3]]
    assert (tokenizer.dtype, tokenizer.vocabulary) == (np.dtype("u2"), 4)
    assert tokenizer_of(path, end_of_document="a").end_of_document == tokenizer_of(path, end_of_document=1).end_of_document == 1
    assert pickle.loads(pickle.dumps(tokenizer)).identity == tokenizer.identity
    other = save(tmp_path / "other.json", {"?": 0, "a": 2, "b": 1})
    assert tokenizer_of(other).identity != tokenizer.identity
    other.write_bytes(path.read_bytes())
    assert tokenizer_of(other).identity == tokenizer.identity, "the content, not the path"


def test_a_large_vocabulary(tmp_path: Path) -> None:
    path = save(tmp_path / "tokenizer.json", {"?": 0, "a": 1, "b": 70_000})
    tokenizer = tokenizer_of(path, end_of_document="?")
    assert [tokens.tolist() for tokens in tokens_of(["b"], tokenizer)] == [[70_000, 0]]
    assert tokenizer.dtype == np.int32, "ids may have gaps"


def test_a_callable() -> None:
    tokenizer = tokenizer_of(Letters())
    assert [tokens.tolist() for tokens in tokens_of(["ab", "🦎"], tokenizer)] == [[97, 98, 0], [ord("🦎"), 0]]
    assert tokenizer.dtype == np.int32 and tokenizer.identity == "callable letters 1"
    small: Any = Letters()
    small.vocabulary_size = 256
    with pytest.raises(ValueError, match="tokens from 129422 to 129422 do not fit uint16"):
        list(tokens_of(["🦎"], tokenizer_of(small)))
    plain = tokenizer_of(len, identity="mine", end_of_document=7)
    assert (plain.identity, plain.end_of_document) == ("callable mine", 7)


@pytest.mark.parametrize(
    ("chosen", "options", "match"),
    [
        (None, {"end_of_document": 3}, "end_of_document=3 is not valid: leave it out"),
        ("nowhere.json", {}, "tokenizer='nowhere.json' is not valid: no such file"),
        (3, {}, "tokenizer=3 is not valid: give the path"),
        (len, {"end_of_document": 3}, "tokenizer_identity=None is not valid: .* give tokenizer_identity='name and version'"),
        (len, {"identity": "x"}, "end_of_document=None is not valid: give the id"),
        (len, {"identity": "x", "end_of_document": -1}, "end_of_document=-1 is not valid"),
        (len, {"identity": "x", "end_of_document": "</s>"}, "end_of_document='</s>' is not valid"),
    ],
)
def test_what_cannot_be_used_is_told(chosen: Any, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        tokenizer_of(chosen, **options)


def test_a_tokenizer_json_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match="not a tokenizer.json"):
        tokenizer_of(path)
    save(path, {"?": 0, "a": 1}, special=None)
    with pytest.raises(ValueError, match="end_of_document=None is not valid: name the token that ends a document"):
        tokenizer_of(path)
    for end in ("</s>", 9, -1):
        with pytest.raises(ValueError, match=f"end_of_document={end!r} is not valid"):
            tokenizer_of(path, end_of_document=end)


def test_a_missing_package_is_told_with_its_extra(tmp_path: Path) -> None:
    """In an interpreter of its own, without the site's packages but numpy; reading files needs no torch there."""
    script = f"""
import sys
class Gone:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("tokenizers", "pyarrow", "torch", "lightning"):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Gone())
sys.argv[0] = "lightning-gemini"  # so that the package's root loads no torch
from pathlib import Path
from lightning_gemini.datasets import IndexedDataset, IndexedWriter
from lightning_gemini.datasets import arrow, tokenizer
path = Path({str(tmp_path)!r}) / "x"
path.write_text("PAR1")
for call in (lambda: list(arrow.arrow_documents(path, "text")), lambda: tokenizer.tokenizer_of(path)):
    try:
        call()
    except ImportError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith("reading Arrow and Parquet files needs 'pyarrow'") and first.endswith("pip install 'lightning_gemini[data]'")
    assert "needs 'tokenizers'" in second and second.endswith("pip install 'lightning_gemini[data]'")
