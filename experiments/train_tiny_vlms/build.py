"""The shipped small VLMs from their configurations: transformers' own classes, tokenizer, processors; random weights.

Every model has a language tower (hidden 256, 4 layers, 8 heads, 4 key-value heads; of Llama kind in tiny_smolvlm, of Qwen2 kind
in the others) and a vision tower of width 128 with 4 layers. MLPs are 512 wide in tiny_llava_onevision (3.5 million parameters
in all) and 256 wide in the later ones: tiny_internvl with wider ones had room to spare and hardly felt 2 bits (LOG.md). All
families share one vocabulary, to which tiny_smolvlm adds the three marks of its processor.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    GotOcr2ImageProcessor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLTextConfig,
    Qwen2VLVideoProcessor,
    SiglipVisionConfig,
)
from transformers.processing_utils import ProcessorMixin

from mgvq.data.tiny_vqa.questions import corpus
from mgvq.data.tiny_vqa.scene import SIDE

PAD, END, USER, ASSISTANT = "<pad>", "<|im_end|>", "<|user|>", "<|assistant|>"
IMAGE, VIDEO, IMAGE_START, IMAGE_END = "<image>", "<video>", "<img>", "</img>"
# The last four are Qwen2-VL's: one vocabulary for every family.
QWEN_START, QWEN_END, QWEN_IMAGE, QWEN_VIDEO = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"
SPECIAL = [PAD, END, USER, ASSISTANT, IMAGE, VIDEO, IMAGE_START, IMAGE_END, QWEN_START, QWEN_END, QWEN_IMAGE, QWEN_VIDEO]
SMOLVLM_MARKS = ["<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
VOCAB_SIZE = 448
MEAN_STD = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
# "<|user|><image>how many things are there ?<|assistant|>"; the answer follows and ends with <|im_end|>.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{% if message['role'] == 'assistant' %}{{ '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
Text = TypeVar("Text", bound=PreTrainedConfig)


def tokenizer(image: str = IMAGE, video: str = VIDEO) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every word of the questions is one token and any other text still encodes."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        corpus(),
        trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=END,
        padding_side="left",
        model_max_length=512,
        extra_special_tokens={
            "image_token": image,
            "video_token": video,
            "start_image_token": IMAGE_START,
            "end_image_token": IMAGE_END,
            "context_image_token": image,
        },
    )


def text_config(intermediate_size: int, kind: type[Text] = Qwen2Config, **rope: list[int]) -> Text:
    return kind(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=intermediate_size,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, **rope},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=SPECIAL.index(END),
        pad_token_id=SPECIAL.index(PAD),
    )


def llava_onevision() -> tuple[PreTrainedModel, ProcessorMixin]:
    """SigLIP (patch 16) + Qwen2. 36 image tokens: 16 of the base picture, 16 of its one tile, 4 newlines."""
    tokens = tokenizer()
    size = {"height": SIDE, "width": SIDE}
    tiles = {"image_grid_pinpoints": [[SIDE, SIDE]]}  # the smallest tiling: anyres cannot be turned off
    config = LlavaOnevisionConfig(
        text_config=text_config(512),
        vision_config=SiglipVisionConfig(
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=SIDE,
            patch_size=16,
            vision_use_head=False,
        ),
        image_token_index=SPECIAL.index(IMAGE),
        video_token_index=SPECIAL.index(VIDEO),
        vision_aspect_ratio="anyres_max_1",
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        tie_word_embeddings=True,
        **tiles,
    )
    processor = LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(size=size, **tiles, **MEAN_STD),
        tokenizer=tokens,
        video_processor=LlavaOnevisionVideoProcessor(size=size, **MEAN_STD),
        num_image_tokens=(SIDE // 16) ** 2,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_1",
        image_token=IMAGE,
        video_token=VIDEO,
        chat_template=CHAT_TEMPLATE,
    )
    return LlavaOnevisionForConditionalGeneration(config), processor


def llava_features(model: PreTrainedModel, pixels: torch.Tensor) -> torch.Tensor:
    """(b, 3, h, w) -> (b, 36, 256): base and tile are the same picture here, so the tower runs once."""
    inner = model.model
    hidden = inner.vision_tower(pixels, output_hidden_states=True).hidden_states[-1]  # before the last norm
    base = inner.multi_modal_projector(hidden)
    side = SIDE // 16
    newline = inner.image_newline.to(base.dtype).expand(len(base), side, 1, -1)
    tile = torch.cat([base.unflatten(1, (side, side)), newline], 2).flatten(1, 2)
    return torch.cat([base, tile], 1)


def internvl() -> tuple[PreTrainedModel, ProcessorMixin]:
    """InternViT (patch 8) + pixel shuffle + Qwen2. 16 image tokens between <img> and </img>."""
    tokens = tokenizer()
    size = {"height": SIDE, "width": SIDE}
    num_image_tokens = (SIDE // 8) ** 2 // 4
    config = InternVLConfig(
        text_config=text_config(256),
        vision_config=InternVLVisionConfig(
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=[SIDE, SIDE],
            patch_size=[8, 8],
            attention_bias=True,
            norm_type="layer_norm",
            layer_scale_init_value=1.0,  # .1 slows training from scratch
        ),
        image_token_id=SPECIAL.index(IMAGE),
        image_seq_length=num_image_tokens,
        downsample_ratio=0.5,
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )
    processor = InternVLProcessor(
        # max_patches=1 is what turns tiling off: the processor class forces crop_to_patches.
        image_processor=GotOcr2ImageProcessor(size=size, crop_to_patches=True, min_patches=1, max_patches=1, **MEAN_STD),
        tokenizer=tokens,
        video_processor=InternVLVideoProcessor(size=size, **MEAN_STD),
        image_seq_length=num_image_tokens,
        chat_template=CHAT_TEMPLATE,
    )
    return InternVLForConditionalGeneration(config), processor


def internvl_features(model: PreTrainedModel, pixels: torch.Tensor) -> torch.Tensor:
    """(b, 3, h, w) -> (b, 16, 256)."""
    return model.model.get_image_features(pixel_values=pixels).pooler_output


def smolvlm() -> tuple[PreTrainedModel, ProcessorMixin]:
    """SigLIP (patch 8) + pixel shuffle + one linear layer + Llama: Idefics3, the class of the first SmolVLM.

    16 image tokens between marks. Image splitting is off: one tile, and no second look at the whole.
    """
    tokens = tokenizer()
    tokens.add_tokens(SMOLVLM_MARKS, special_tokens=True)
    num_image_tokens = (SIDE // 8) ** 2 // 4
    config = Idefics3Config(
        text_config=text_config(256, LlamaConfig),
        vision_config={
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": SIDE,
            "patch_size": 8,
        },
        image_token_id=SPECIAL.index(IMAGE),
        pad_token_id=SPECIAL.index(PAD),
        scale_factor=2,
        tie_word_embeddings=True,
    )
    processor = Idefics3Processor(
        image_processor=Idefics3ImageProcessor(
            size={"longest_edge": SIDE}, max_image_size={"longest_edge": SIDE}, do_image_splitting=False, **MEAN_STD
        ),
        tokenizer=tokens,
        image_seq_len=num_image_tokens,
        chat_template=CHAT_TEMPLATE,
    )
    return Idefics3ForConditionalGeneration(config), processor


def smolvlm_features(model: PreTrainedModel, pixels: torch.Tensor) -> torch.Tensor:
    """(b, 3, h, w) -> (b, 16, 256)."""
    inner = model.model
    return inner.connector(inner.vision_model(pixels).last_hidden_state)


def qwen2_vl() -> tuple[PreTrainedModel, ProcessorMixin]:
    """A tower with rotary positions (patch 8) that merges 2 x 2 patches + Qwen2 with M-RoPE. 16 image tokens between marks."""
    patches = {"patch_size": 8, "temporal_patch_size": 2}
    config = Qwen2VLConfig(
        text_config=text_config(256, Qwen2VLTextConfig, mrope_section=[4, 6, 6]),  # of the head's 16 frequencies
        vision_config={
            "embed_dim": 128,
            "hidden_size": 256,  # of the language tower
            "mlp_ratio": 2,
            "depth": 4,
            "num_heads": 4,
            "spatial_merge_size": 2,
            **patches,
        },
        image_token_id=SPECIAL.index(QWEN_IMAGE),
        video_token_id=SPECIAL.index(QWEN_VIDEO),
        vision_start_token_id=SPECIAL.index(QWEN_START),
        vision_end_token_id=SPECIAL.index(QWEN_END),
        tie_word_embeddings=True,
    )
    pixels = {"size": {"shortest_edge": SIDE * SIDE, "longest_edge": SIDE * SIDE}}  # areas, whatever the names say
    processor = Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(**pixels, merge_size=2, **patches, **MEAN_STD),
        tokenizer=tokenizer(QWEN_IMAGE, QWEN_VIDEO),
        video_processor=Qwen2VLVideoProcessor(**pixels, merge_size=2, **patches, **MEAN_STD),
        chat_template=CHAT_TEMPLATE.replace(IMAGE, QWEN_START + QWEN_IMAGE + QWEN_END),
    )
    return Qwen2VLForConditionalGeneration(config), processor


def qwen2_vl_features(model: PreTrainedModel, pixels: torch.Tensor) -> torch.Tensor:
    """(b, 3, h, w) -> (b, 16, 256): patches in runs of the 2 x 2 that are merged, each twice (the tower sees pairs of frames)."""
    side = SIDE // 16
    cells = pixels.unflatten(3, (side, 2, 8)).unflatten(2, (side, 2, 8))  # b c (row, of two, pixel) (column, of two, pixel)
    patches = cells.permute(0, 2, 5, 3, 6, 1, 4, 7).flatten(0, 4)
    frames = patches[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1)
    grid = torch.tensor([[1, 2 * side, 2 * side]] * len(pixels))
    return model.get_encoder(modality="image")(frames, grid_thw=grid).pooler_output.unflatten(0, (len(pixels), -1))


@dataclass(frozen=True)
class Family:
    """How to build a family, and its image features for a batch of pictures in one call.

    `compiled`: whether to compile its vision tower. Qwen2-VL's attends to one picture after another, each a graph of its own.
    """

    build: Callable[[], tuple[PreTrainedModel, ProcessorMixin]]
    features: Callable[[PreTrainedModel, torch.Tensor], torch.Tensor]
    compiled: bool = True


FAMILIES = {
    "tiny_llava_onevision": Family(llava_onevision, llava_features),
    "tiny_internvl": Family(internvl, internvl_features),
    "tiny_smolvlm": Family(smolvlm, smolvlm_features),
    "tiny_qwen2_vl": Family(qwen2_vl, qwen2_vl_features, compiled=False),
}


def build(name: str, seed: int) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Seeded random weights; the generation settings stop at <|im_end|> and are greedy."""
    torch.manual_seed(seed)
    model, processor = FAMILIES[name].build()
    model.generation_config = GenerationConfig(eos_token_id=SPECIAL.index(END), pad_token_id=SPECIAL.index(PAD), do_sample=False)
    return model, processor
