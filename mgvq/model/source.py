"""Where a model comes from: a folder in the hub's format, a shipped small model, or a hub repository that was downloaded."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from mgvq.checks import is_commit, whole_number
from mgvq.digest import file_digest
from mgvq.errors import UserError
from mgvq.model.files import INDEX, OLD_INDEX, missing_files

SHIPPED = Path(__file__).parent / "tiny"
DTYPES = ("float32", "bfloat16", "float16")
ATTENTIONS = ("eager", "sdpa")  # those that take the masks of packed questions (model/pack.py)
FLAG = "model:"  # flags that begin so say of which model a run is; tables put them beside its name
_WEIGHTS = (".safetensors", ".bin")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, kw_only=True)
class Stress:
    """Channel scales that leave the model's function as it is and make quantising hard (model/stress.py)."""

    sigma: float | None  # the scales are exp(sigma N(0, 1)); None: there are none
    seed: int  # draws the scales

    def __post_init__(self) -> None:
        if self.sigma is not None and not 0.2 <= self.sigma <= 2:
            raise UserError(
                f"model.stress.sigma must be null or 0.2 to 2, got {self.sigma!r}: scales are rounded to powers of two, so that "
                "less would change next to nothing, and far more would leave the range of 16-bit weights."
            )
        whole_number("model.stress.seed", self.seed)
        if self.seed and self.sigma is None:
            raise UserError(f"model.stress.seed={self.seed} has no effect without model.stress.sigma=0.7, say.")


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model and how it is loaded; a run never downloads."""

    name: str
    path: str  # a folder, or `organisation/name` on the hub
    revision: str | None  # on the hub: a commit of 40 hex digits, or a branch or tag, which stands for the commit that is here
    dtype: str  # float32 | bfloat16 | float16: of the computation
    attention: str | None = None  # eager | sdpa | None: as transformers chooses
    processor: Mapping[str, Any] = field(default_factory=dict)  # settings of the image processor in place of the repository's
    chat_template: str | None = None  # a jinja file in place of the repository's
    end_token: str | None = None  # the token behind an answer, in place of the tokenizer's
    pad_token: str | None = None  # the token that fills up the rows of a batch, in place of the tokenizer's
    family: Mapping[str, Any] = field(default_factory=dict)  # what cannot be found out about its modules (model/family.py)
    trust_remote_code: bool = False  # whether Python files of the repository are run
    stress: Stress = Stress(sigma=None, seed=0)
    shape: Mapping[str, Any] | None = None  # what the published config.json says of sizes, for counting what is not here
    setup: str = ""  # how to get the model, where downloading is not enough

    is_made: ClassVar[bool] = False
    """Whether the first who asks for `folder` makes it, from files of another kind; a dry run does not ask."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UserError(f"model.dtype must be float32, bfloat16 or float16, got {self.dtype!r}")
        if self.attention not in (None, *ATTENTIONS):
            raise UserError(f"model.attention must be null or one of {', '.join(ATTENTIONS)}; got {self.attention!r}")
        if self.chat_template is not None and not Path(self.chat_template).is_file():
            raise UserError(f"model.chat_template={self.chat_template} is not a file; give a .jinja file, or null.")
        if not isinstance(self.trust_remote_code, bool):
            raise UserError(f"model.trust_remote_code must be true or false, got {self.trust_remote_code!r}")
        if unknown := sorted(set(self.family) - {"towers", "shared_inputs", "packable"}):
            raise UserError(f"model.family has no {', '.join(unknown)}; there are towers, shared_inputs and packable.")
        for name in ("end_token", "pad_token"):
            if not isinstance(value := getattr(self, name), str | None) or value == "":
                raise UserError(f"model.{name} must be a token of the tokenizer, or null for its own; got {value!r}")

    @property
    def on_hub(self) -> bool:
        """Whether `path` is a name on the hub. Raises UserError where it is neither that nor a folder."""
        if Path(self.path).is_dir():
            return False
        if not _HUB_NAME.fullmatch(self.path) or self.path.startswith("."):
            raise UserError(
                f"model.path={self.path} is neither a folder nor a hub name (organisation/name). Give the folder that holds "
                "config.json and the safetensors."
            )
        return True

    @property
    def folder(self) -> Path:
        """Where the files are: the folder, or the downloaded snapshot of the repository.

        Raises UserError where they are missing or incomplete, with the command that gets them and how large they are.
        """
        if not self.on_hub:
            return Path(self.path)
        if self.revision is None:
            raise UserError(
                f"model.path={self.path} is not a local folder, so it is taken as a hub name, and that needs model.revision: "
                "the 40 hex digits of a commit, or a branch such as main, which is flagged in every table because it may move."
            )
        from huggingface_hub import constants, snapshot_download  # here: planning with local models needs none of it
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            wanted = {"revision": self.revision, "allow_patterns": ["config.json"]}  # the weights are looked for below
            found = Path(snapshot_download(self.path, local_files_only=True, **wanted))
        except (LocalEntryNotFoundError, FileNotFoundError) as error:
            raise self._not_here(f"is not in {constants.HF_HUB_CACHE}") from error
        if missing := missing_files(found):
            raise self._not_here(f"is incomplete in {found} ({', '.join(missing[:3])} missing)")
        return found

    def check(self) -> None:
        """Raises UserError where the files are missing, as `folder` does; makes none."""
        _ = self.folder

    def _not_here(self, why: str) -> UserError:
        from mgvq.model.shape import download_size  # here: it imports torch, which planning needs none of

        size = download_size(self)
        how = self.setup or f"hf download {self.path} --revision {self.revision}"
        known = "size unknown before its config.json is here" if size is None else f"about {size / 1e9:.1f} GB on disk"
        return UserError(
            f"model {self.name}: {self.path} at {self.revision} {why}. A run downloads nothing; with a network:\n"
            + "".join(f"  {line}\n" for line in how.splitlines())
            + f"  {known}; HF_HOME says where the hub's files go, and a machine without network takes a copy of that folder."
        )

    def identity(self) -> str:
        """What determines the weights: a digest of a folder's files, or the hub name with its commit.

        Raises UserError as `folder` does, and where the folder holds no weights, or those of a packed checkpoint.
        """
        if any((self.folder / name).is_file() for name in (INDEX, OLD_INDEX)):
            raise UserError(
                f"model.path={self.path} is an mgvq checkpoint, which is quantised already: mgvq.load({self.path!r}) gives "
                "its model. To quantise otherwise, give the model that it was made of (model.path in the config.yaml of its run)."
            )
        if not self.on_hub:
            return folder_digest(Path(self.path))
        return f"{self.path}@{self.folder.name}"  # the hub's cache names a snapshot's folder by its commit

    def choices(self) -> dict[str, Any]:
        """Settings that may move numbers, where they differ from the default: runs without them keep the names that they had."""
        template = hashlib.sha256(Path(self.chat_template).read_bytes()).hexdigest() if self.chat_template else None
        chosen = {"attention": self.attention, "processor": dict(self.processor), "chat_template": template}
        chosen |= {"family": dict(self.family), "end_token": self.end_token, "pad_token": self.pad_token}
        stress = asdict(self.stress) if self.stress.sigma is not None else None
        return {name: value for name, value in {**chosen, "stress": stress}.items() if value}

    def flags(self) -> list[str]:
        """What tables must say of this model: the stress variant, and a revision that may move."""
        flags = [f"{FLAG}stress {self.stress.sigma:g}"] if self.stress.sigma is not None else []
        moving = self.on_hub and not is_commit(self.revision)
        return [*flags, *([f"{FLAG}moving revision {self.revision}"] if moving else [])]

    def provenance(self) -> dict[str, Any]:
        """The path, the revision as it was asked for, and the commit that it stood for."""
        return {"path": self.path, "revision": self.revision, "commit": self.folder.name if self.on_hub else None}


def folder_digest(folder: Path) -> str:
    """SHA-256 over names and bytes of all files that a model is loaded from. Raises UserError where the folder holds no model."""
    files = sorted(f for f in folder.iterdir() if f.suffix in (*_WEIGHTS, ".json", ".jinja", ".txt", ".model", ".py"))
    if not (folder / "config.json").is_file() or not any(f.suffix in _WEIGHTS for f in files):
        raise UserError(f"model folder {folder} holds no model: it needs config.json and {' or '.join(_WEIGHTS)} files.")
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {file_digest(file)}\n".encode())
    return digest.hexdigest()
