"""The way in through transformers: after `import mgvq`, `AutoModelFor....from_pretrained(CHECKPOINT)` gives a packed model.

Little is imported here: transformers may be in the middle of being imported itself when `mgvq.checkpoint.hook` registers this.
"""

from pathlib import Path
from typing import Any

from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from mgvq.checkpoint.index import FIRST_SHARD, VERSION
from mgvq.errors import UserError
from mgvq.model.files import INDEX

METHOD = "mgvq"


class MgvqConfig(QuantizationConfigMixin):
    """What `config.json` says of the checkpoint, and how `mgvq.load` wants it to be read."""

    def __init__(self, dequantize: bool = False, verify: bool = True, **described: Any) -> None:
        """`dequantize`: decode all layers once. `verify`: hold the files against their digests. Neither is stored."""
        self.quant_method: Any = METHOD
        self.dequantize, self.verify = dequantize, verify
        self.described = {name: value for name, value in described.items() if name not in ("quant_method", "version")}

    def to_dict(self) -> dict[str, Any]:
        """As it stands in `config.json`."""
        return {**self.described, "quant_method": METHOD, "version": VERSION}


class MgvqQuantizer(HfQuantizer):
    """Puts packed layers into the empty model, has transformers read the tensors into them, and checks what was read."""

    quantization_config: Any  # a MgvqConfig
    requires_calibration = True  # a model that is not packed yet is quantised by a run, not while it is loaded

    def update_attn_implementation(self, config: Any) -> Any:
        """Called before transformers looks for weights: the name that it would not find becomes that of the first shard."""
        config.transformers_weights = FIRST_SHARD
        return config

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **_: Any) -> None:
        from mgvq.checkpoint.contents import open_checkpoint
        from mgvq.checkpoint.packed import Placing

        if not checkpoint_files:
            raise UserError("an mgvq checkpoint is loaded from its folder: from_pretrained takes no state_dict for it.")
        folder = Path(checkpoint_files[0]).parent
        if not (folder / INDEX).exists() and not Path(model.config.name_or_path).is_dir():
            from huggingface_hub import snapshot_download  # transformers has got the first shard alone

            commit, cache = getattr(model.config, "_commit_hash", None), folder.parents[2]  # CACHE/models--A--B/snapshots/COMMIT
            folder = Path(snapshot_download(model.config.name_or_path, revision=commit, cache_dir=cache))
        contents = open_checkpoint(folder, verify=self.quantization_config.verify)
        self.placing = Placing(model, contents, model.config.dtype)
        checkpoint_files[:] = [str(file) for file in contents.shards]  # the list that transformers goes on with

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        self.placing.finish()
        del self.placing
        if self.quantization_config.dequantize:
            self._dequantize(model, model.config.dtype)
        else:
            model.is_quantized = False  # else transformers refuses `half`; our layers keep what must not change
        return model

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        from mgvq.checkpoint.packed import decode_layers

        decode_layers(model, dtype)
        return model

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False
