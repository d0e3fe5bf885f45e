"""SmolLM2's decoder for training: its weights are frozen, low-rank adapters learn, and layers that read the same are one product.

It computes what transformers' `LlamaModel` computes (train.py checks it before every training) in two thirds of the time: a
frozen matrix needs no gradient of its own, and one product of a stack of matrices, with one gradient of its input, costs less
than three.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaForCausalLM

RANK = 8  # of the adapters
SCALE = 2.0  # what they are multiplied by
FIRST_ADAPTED = 2  # block; with all of them the file of the adapters would be larger than 6 MB
# Layers of a block that read the same input.
GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
ADAPTED = tuple(kind for group in GROUPS for kind in group)


class Language(torch.nn.Module):
    """The decoder and its head. `adapters` is all that learns: `NUMBER_KIND_A` (rank, in) and `NUMBER_KIND_B` (out, rank)."""

    def __init__(self, model: LlamaForCausalLM, seed: int) -> None:
        super().__init__()
        config = model.config
        self.heads, self.groups, self.width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.eps = config.rms_norm_eps
        self.frequencies = config.rope_parameters["rope_theta"] ** (-torch.arange(0, self.width, 2) / self.width)
        state = {name: tensor.detach().float() for name, tensor in model.model.state_dict().items()}
        self.embedding, self.norm = state["embed_tokens.weight"], state["norm.weight"]
        self.adapters = torch.nn.ParameterDict()
        self.weights: list[dict[tuple[str, ...] | str, Tensor]] = []
        draw = torch.Generator().manual_seed(seed)
        for number in range(config.num_hidden_layers):
            named = {name.split(".")[-2]: state[f"layers.{number}.{name}"] for name in _names(state, number)}
            block: dict[tuple[str, ...] | str, Tensor] = {group: torch.cat([named[kind] for kind in group]) for group in GROUPS}
            block |= {kind: named[kind] for kind in ("input_layernorm", "post_attention_layernorm")}
            self.weights.append(block)
            for kind in ADAPTED if number >= FIRST_ADAPTED else ():
                rows, columns = named[kind].shape
                self.adapters[_key(number, kind, "A")] = torch.randn(RANK, columns, generator=draw) / columns**0.5
                self.adapters[_key(number, kind, "B")] = torch.zeros(rows, RANK)
        self.adapted = True

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        """The last hidden states (b, s, hidden) of embeddings `x`; `mask` is added to the scores, None is causal."""
        angles = positions[..., None] * self.frequencies
        cos, sin = (torch.cat([f(angles)] * 2, -1)[:, None] for f in (torch.cos, torch.sin))
        for number in range(len(self.weights)):
            x = self._block(number, x, cos, sin, mask)
        return F.rms_norm(x, self.norm.shape, self.norm, self.eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """Over the vocabulary: the head is the embedding."""
        return F.linear(hidden, self.embedding)

    def _block(self, number: int, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        block = self.weights[number]
        h = F.rms_norm(x, x.shape[-1:], block["input_layernorm"], self.eps)
        mixed = self._linear(number, GROUPS[0], h).unflatten(-1, (-1, self.width)).transpose(1, 2)
        turned, values = mixed.split([self.heads + self.groups, self.groups], 1)
        half = self.width // 2
        turned = turned * cos + torch.cat([-turned[..., half:], turned[..., :half]], -1) * sin
        queries, keys = turned.split([self.heads, self.groups], 1)
        keys, values = (t.repeat_interleave(self.heads // self.groups, 1) for t in (keys, values))
        seen = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=mask is None)
        x = x + self._linear(number, GROUPS[1], seen.transpose(1, 2).flatten(2))
        h = F.rms_norm(x, x.shape[-1:], block["post_attention_layernorm"], self.eps)
        gate, up = self._linear(number, GROUPS[2], h).chunk(2, -1)
        return x + self._linear(number, GROUPS[3], F.silu(gate) * up)

    def _linear(self, number: int, group: tuple[str, ...], x: Tensor) -> Tensor:
        y = F.linear(x, self.weights[number][group])
        if not self.adapted or number < FIRST_ADAPTED:
            return y
        down = torch.cat([self.adapters[_key(number, kind, "A")] for kind in group])
        up = torch.block_diag(*(self.adapters[_key(number, kind, "B")] for kind in group))
        return y + SCALE * F.linear(F.linear(x, down), up)


def _key(number: int, kind: str, part: str) -> str:
    return f"{number}_{kind}_{part}"  # a ParameterDict takes no dots


def _names(state: dict[str, Tensor], number: int) -> list[str]:
    start = f"layers.{number}."
    return [name.removeprefix(start) for name in state if name.startswith(start)]
