"""A language model in a GGUF file, unpacked once into the hub's format: to read the file takes transformers a minute."""

import fcntl
import functools
import logging
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from mgvq.checks import told_as
from mgvq.digest import file_digest
from mgvq.errors import UserError
from mgvq.model.source import Source
from mgvq.model.terms import bring_terms

_SHA256 = re.compile(r"[0-9a-f]{64}")
_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
_READER = "`make smollm2` installs what reads it"
_VERSIONS = (2, 3)
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Gguf(Source):
    """A source whose `path` is a GGUF file, and whose `revision` is the SHA-256 of that, or None: of the file that is there."""

    cache: str  # the folder in which model and tokenizer are unpacked

    is_made: ClassVar[bool] = True

    @property
    def on_hub(self) -> bool:
        """False: the source is a file here."""
        return False

    def identity(self) -> str:
        """The revision, so that runs can be planned where the file is not; without one the digest of the file, which is logged.

        Raises UserError for a revision that is no digest, and for a file that is missing where its digest is needed.
        """
        if self.revision is None:
            _check_file(Path(self.path), self._how())
            return _told(self.path, file_digest(Path(self.path)))
        if not _SHA256.fullmatch(self.revision):
            raise UserError(f"model.path={self.path} is a GGUF file: model.revision must be its SHA-256, got {self.revision!r}")
        return self.revision

    @property
    def folder(self) -> Path:
        """The unpacked model, with the terms that lie beside the file; the first who asks writes it.

        Weights are decoded and kept in bfloat16, as such models are published before they become GGUF. Raises UserError where the
        file is missing, another than the revision says, or nothing that transformers makes a language model of.
        """
        folder = unpacked(Path(self.cache) / self.identity(), self._unpack)
        with suppress(OSError):  # a cache that another user has filled
            bring_terms(Path(self.path).parent, folder)  # also to one that was unpacked without them
        return folder

    def check(self) -> None:
        """Raises UserError where the model is not unpacked yet, and the file, or what reads it, is not here."""
        if not (Path(self.cache) / self.identity()).is_dir():
            self._check_readable()

    def provenance(self) -> dict[str, Any]:
        """The path, the revision as it was asked for, and the digest of the file."""
        return {"path": self.path, "revision": self.revision, "sha256": self.identity()}

    def _how(self) -> str:
        return f"`{self.setup}` installs it" if self.setup else "give the path of a .gguf file"

    def _unpack(self, folder: Path) -> None:
        file = self._check_readable()
        if (found := file_digest(file)) != self.identity():
            raise UserError(f"{file} is not the file that model.revision={self.revision} names; its SHA-256 is {found}.")
        unpack(file, folder)

    def _check_readable(self) -> Path:
        file = Path(self.path)
        _check_file(file, self._how())
        if find_spec("gguf") is None:
            raise UserError(f"model.path={file} is a GGUF file, and the package gguf is not installed: {_READER}.")
        return file


def unpacked(folder: Path, write: Any) -> Path:
    """The folder, which `write(FOLDER)` fills where it is not there yet: whole, or not at all, and by one process of several."""
    if folder.is_dir():  # whole, since it is renamed at the end; the lock may be another user's
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            temporary = folder.with_suffix(".tmp")
            shutil.rmtree(temporary, ignore_errors=True)
            write(temporary)
            temporary.rename(folder)
    return folder


def unpack(file: Path, folder: Path) -> None:
    """Write model and tokenizer of a GGUF file in the hub's format.

    Raises UserError for an architecture, a kind of tensor or a tokenizer that transformers does not read, for a damaged file, and
    for weights that are not those of the architecture.
    """
    import torch  # here: planning needs none of it
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    from mgvq.model.health import check_complete

    where = {"gguf_file": file.name, "local_files_only": True}
    advice = (
        "The file must be whole, and hold a language model with its tokenizer, of an architecture that transformers reads: "
        f"{', '.join(sorted(GGUF_SUPPORTED_ARCHITECTURES))}."
    )
    with told_as(f"model.path={file} cannot be read as a language model", advice):
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **where)
        loading: Any = AutoModelForCausalLM.from_pretrained(
            file.parent, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True, **where
        )
        model, info = loading
        _begin(tokenizer, file)
    check_complete(file, info)
    del model.config.__dict__["quantization_config"]  # of the file; the weights are decoded
    model.config.dtype = torch.bfloat16
    saved = AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16)  # the model that was read refuses to be saved
    saved.load_state_dict(model.state_dict())
    saved.generation_config = model.generation_config
    saved.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _check_file(file: Path, how: str) -> None:
    """Raises UserError unless the file begins as a GGUF file does, and is one file, not a part of one."""
    if not file.is_file():
        raise UserError(f"model.path={file} is {'a folder' if file.is_dir() else 'missing'}: {how}.")
    with file.open("rb") as stream:
        head = stream.read(8)
    if head[:4] != b"GGUF":
        raise UserError(f"model.path={file} is no GGUF file: it begins with {head[:4]!r}, and not with b'GGUF'.")
    version = int.from_bytes(head[4:8], "little")
    if version not in _VERSIONS:
        raise UserError(
            f"model.path={file} is a GGUF file of version {version}, read as little-endian numbers; versions 2 and 3 are known."
        )
    if _PART.search(file.name):
        raise UserError(
            f"model.path={file} is one part of a split GGUF file, and transformers reads whole ones: put the parts together with "
            "llama.cpp's `llama-gguf-split --merge`."
        )


def _begin(tokenizer: Any, file: Path) -> None:
    """Have the tokenizer begin texts with a token where the file says so (add_bos_token) and it does not by itself."""
    from gguf import GGUFReader
    from tokenizers.processors import TemplateProcessing

    fields: Mapping[str, Any] = GGUFReader(file).fields
    wanted = fields.get("tokenizer.ggml.add_bos_token")
    begin = tokenizer.bos_token
    if wanted is None or not wanted.contents() or begin is None:
        return
    if tokenizer("a").input_ids[:1] != [tokenizer.bos_token_id]:
        ids = [(begin, tokenizer.bos_token_id)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=[begin, "$A"], special_tokens=ids)


@functools.cache
def _told(path: str, digest: str) -> str:
    log.info("the SHA-256 of %s is %s; model.revision=%s holds a run to this file", path, digest, digest)
    return digest
