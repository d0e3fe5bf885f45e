"""A GGUF file as the source of a model: planned by its digest, and refused in words before anything is read."""

import hashlib
from pathlib import Path

import pytest

from mgvq.errors import UserError
from mgvq.model.gguf import Gguf
from mgvq.runs.compose import composer
from mgvq.runs.identity import run_id

CONTENT = b"GGUF, but no more of it"
DIGEST = hashlib.sha256(CONTENT).hexdigest()


def source(file: Path, digest: str | None = DIGEST) -> Gguf:
    return Gguf(name="x", path=str(file), revision=digest, dtype="float32", cache=str(file.parent / "cache"))


def test_a_run_is_planned_without_the_file() -> None:
    with composer() as compose:
        first, moved = (
            compose("model=smollm2", "method=kmeans", "evaluation=perplexity", *more)
            for more in ([], ["model.path=/nowhere/x.gguf", "paths.results=/nowhere"])
        )
    assert run_id(first) == run_id(moved)


@pytest.mark.parametrize("digest", [None, "main", DIGEST[:40]])
def test_a_revision_that_is_no_digest_is_refused(tmp_path: Path, digest: str | None) -> None:
    with pytest.raises(UserError, match=r"model\.revision must be its SHA-256"):
        source(tmp_path / "x.gguf", digest).identity()


def test_what_is_missing_or_another_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    with pytest.raises(UserError, match="is missing: `make smollm2`"):
        assert source(file).folder
    file.write_bytes(CONTENT)
    with pytest.raises(UserError, match=f"its SHA-256 is {DIGEST}"):
        assert source(file, 64 * "0").folder


def test_without_the_reader_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.gguf").write_bytes(CONTENT)
    monkeypatch.setattr("mgvq.model.gguf.find_spec", lambda _: None)
    with pytest.raises(UserError, match="the package gguf is not installed: `make smollm2`"):
        assert source(tmp_path / "x.gguf").folder


def test_what_is_unpacked_is_not_read_again(tmp_path: Path) -> None:
    (tmp_path / "cache" / DIGEST).mkdir(parents=True)
    assert source(tmp_path / "gone.gguf").folder == tmp_path / "cache" / DIGEST
