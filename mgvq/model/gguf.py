"""A language model in a GGUF file, unpacked once into the hub's format: to read the file takes transformers a minute."""

import fcntl
import hashlib
import re
import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from mgvq.errors import UserError
from mgvq.model.source import Source

_SHA256 = re.compile(r"[0-9a-f]{64}")
_INSTALL = "`make smollm2` installs the model and what reads it"


@dataclass(frozen=True, kw_only=True)
class Gguf(Source):
    """A source whose `path` is a GGUF file, and whose `revision` is the SHA-256 of that."""

    cache: str  # the folder in which model and tokenizer are unpacked

    @property
    def on_hub(self) -> bool:
        """False: the source is a file here."""
        return False

    def identity(self) -> str:
        """The revision, so that runs can be planned where the file is not. Raises UserError for one that is no digest."""
        if not _SHA256.fullmatch(self.revision or ""):
            raise UserError(f"model.path={self.path} is a GGUF file: model.revision must be its SHA-256, got {self.revision!r}")
        return str(self.revision)

    @property
    def folder(self) -> Path:
        """The unpacked model; the first who asks writes it.

        Weights are decoded and kept in bfloat16, as such models are published before they become GGUF. Raises UserError where the
        file is missing or another than the revision says, and where nothing reads GGUF.
        """
        folder = Path(self.cache) / self.identity()
        folder.parent.mkdir(parents=True, exist_ok=True)
        with folder.with_suffix(".lock").open("w", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.is_dir():
                self._check_file()
                temporary = folder.with_suffix(".tmp")
                shutil.rmtree(temporary, ignore_errors=True)
                _unpack(Path(self.path), temporary)
                temporary.rename(folder)
        return folder

    def _check_file(self) -> None:
        if not Path(self.path).is_file():
            raise UserError(f"model.path={self.path} is missing: {_INSTALL}.")
        with Path(self.path).open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != self.revision:
            raise UserError(f"{self.path} is not the file that model.revision={self.revision} names; its SHA-256 is {found}.")
        if find_spec("gguf") is None:
            raise UserError(f"model.path={self.path} is a GGUF file, and the package gguf is not installed: {_INSTALL}.")


def _unpack(file: Path, folder: Path) -> None:
    import torch  # here: planning needs none of it
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"gguf_file": file.name, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **where)
    del model.config.__dict__["quantization_config"]  # of the file; the weights are decoded
    model.config.dtype = torch.bfloat16
    saved = AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16)  # the model that was read refuses to be saved
    saved.load_state_dict(model.state_dict())
    saved.generation_config = model.generation_config
    saved.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, **where).save_pretrained(folder)
