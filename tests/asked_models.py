"""Models as anyone loads them, and what they answer."""

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, LlamaConfig, LlamaForCausalLM

from mgvq.data.tiny_vqa.dataset import draw_test
from mgvq.model.encode import chat_prompt
from mgvq.model.source import SHIPPED


def shipped(name: str = "tiny_internvl") -> tuple:
    """A shipped model and its processor."""
    model = AutoModelForImageTextToText.from_pretrained(SHIPPED / name, dtype=torch.float32)
    return model, AutoProcessor.from_pretrained(SHIPPED / name)


def text_model() -> LlamaForCausalLM:
    """A model that reads only text, without weights."""
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**sizes))


def answers(model, processor, questions: int = 4) -> list[str]:
    """To the first questions of the test, one of each picture."""
    pictures = draw_test("test", 0, questions)
    texts = [chat_prompt(processor, p.questions[0].text) for p in pictures]
    inputs = processor(images=[p.pixels for p in pictures], text=texts, return_tensors="pt", padding=True)
    tokens = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    return processor.tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
