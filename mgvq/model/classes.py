"""Which class of transformers makes a model of a config."""

from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig


def is_text_only(config: PretrainedConfig) -> bool:
    """Whether this is a language model by itself, not a model of several towers that has one."""
    return config.get_text_config(decoder=True) is config


def model_class(config: PretrainedConfig) -> Any:
    """The auto class of transformers that makes a model of it."""
    return AutoModelForCausalLM if is_text_only(config) else AutoModelForImageTextToText


def num_positions(config: PretrainedConfig) -> int | None:
    """How many tokens of a text the model was made for; None where its config does not say."""
    number = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return number if isinstance(number, int) and number > 0 else None
