"""Tiny models with eyes, made by transformers with random weights, as the hub's files spell them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
import safetensors.torch
import tokenizers
import torch
import transformers
from conftest import TEXT
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from convert_hf_checkpoint import convert

VOCAB = 420
# Ids 0 to 7; the model's own text marks its places for images with the last three.
SPECIAL = ["<|endoftext|>", "</s>", "<|im_start|>", "<|im_end|>", "<|vision_pad|>"]
SPECIAL += ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>"]
IMAGE = SPECIAL.index("<|image_pad|>")
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part or 'image_url' in part %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT_SIZES = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=VOCAB, max_position_embeddings=2048, bos_token_id=0, eos_token_id=3, pad_token_id=0, rms_norm_eps=1e-6,
    tie_word_embeddings=False, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
)  # fmt: skip
VISION_SIZES = {
    "qwen2_vl": dict(depth=3, embed_dim=48, hidden_size=64, num_heads=3, mlp_ratio=2, patch_size=14),
    "qwen2_5_vl": dict(
        depth=4, hidden_size=48, out_hidden_size=64, num_heads=3, intermediate_size=40, patch_size=14, window_size=112,
        fullatt_block_indexes=[1, 3],
    ),
}  # fmt: skip
CLASSES = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL"}


@dataclass
class Made:
    folder: Path  # as published
    reference: Any
    processor: Qwen2VLImageProcessorPil

    def inputs(self, ids: list[int], images: list[PIL.Image.Image]) -> dict[str, torch.Tensor]:
        """What the reference takes: a prompt with a token for each image, and the images."""
        if not images:
            return {"input_ids": torch.tensor([ids])}
        seen = self.processor(images, return_tensors="pt")
        counts = (seen["image_grid_thw"].prod(1) // 4).tolist()
        longer = [token for i in ids for token in ([i] * (counts.pop(0) if i == IMAGE else 1))]
        tokens = torch.tensor([longer])
        kinds = {"mm_token_type_ids": (tokens == IMAGE).int(), "attention_mask": torch.ones_like(tokens)}
        return {"input_ids": tokens, **kinds, **seen}

    @torch.no_grad()
    def logits(self, ids: list[int], images: list[PIL.Image.Image]) -> torch.Tensor:
        """[S, V] of one forward over all of it, without a cache."""
        self.reference.model.rope_deltas = None
        return self.reference(**self.inputs(ids, images), use_cache=False).logits[0]

    def assert_greedy(self, ids: list[int], images: list[PIL.Image.Image], new: list[int]) -> None:
        """Each of the new tokens is the most likely one after those before it."""
        assert new == self.logits(ids + new, images)[-len(new) - 1 : -1].argmax(-1).tolist()

    def greedy(self, ids: list[int], images: list[PIL.Image.Image], count: int) -> list[int]:
        self.reference.model.rope_deltas = None
        given = self.inputs(ids, images)
        others = dict(max_new_tokens=count, do_sample=False, eos_token_id=VOCAB, pad_token_id=0)
        return self.reference.generate(**given, **others)[0, given["input_ids"].shape[1] :].tolist()


def make_tokenizer(folder: Path) -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet)
    backend.train_from_iterator(TEXT.splitlines(keepends=True), trainer)
    special = dict(eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


def make(kind: str, folder: Path, spelling: str = "old", **text: Any) -> Made:
    """A tiny model of "qwen2_vl" or "qwen2_5_vl" in float32. `spelling`: "old", as published: one flat config and
    `visual.`; "new": a nested one and `model.visual.`"""
    name = CLASSES[kind]
    ids = dict(image_token_id=IMAGE, video_token_id=4, vision_start_token_id=5, vision_end_token_id=7)
    text = TEXT_SIZES | text
    config = getattr(transformers, f"{name}Config")(
        text_config=text, vision_config=VISION_SIZES[kind], tie_word_embeddings=text["tie_word_embeddings"], **ids
    )
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).float().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            mean = 1.0 if "norm" in parameter_name or "ln_q" in parameter_name else 0.0
            mean = 0.0 if parameter_name.endswith("bias") else mean
            parameter.normal_(mean, 0.3 if parameter.dim() == 1 else 0.2, generator=generator)
    folder.mkdir(parents=True, exist_ok=True)
    make_tokenizer(folder)
    model.save_pretrained(folder)
    respell(folder, kind, spelling)
    processor = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=28 * 28 * 60)
    limits = {"min_pixels": 56 * 56, "max_pixels": 28 * 28 * 60}
    (folder / "preprocessor_config.json").write_text(json.dumps(limits | {"image_processor_type": "any"}))
    return Made(folder, model, processor)


def respell(folder: Path, kind: str, spelling: str) -> None:
    """Writes config and tensors in one of their spellings, whatever the installed transformers writes."""
    config, path = json.loads((folder / "config.json").read_text()), folder / "model.safetensors"
    tensors = {}
    for name, tensor in safetensors.torch.load_file(path).items():
        plain = name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
        if spelling == "new" and plain != "lm_head.weight":
            plain = (
                f"model.{plain}" if plain.startswith("visual.") else plain.replace("model.", "model.language_model.")
            )
        tensors[plain] = tensor
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    if spelling == "old":
        text = config.pop("text_config")
        rope = text.pop("rope_parameters")
        for name in ("model_type", "architectures", "layer_types"):
            text.pop(name, None)
        config = text | config | {"rope_theta": rope["rope_theta"]}
        config["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
        config["vision_config"]["in_chans"] = config["vision_config"].pop("in_channels", 3)
        config["vision_config"]["spatial_patch_size"] = 14
        for name in ("rope_parameters", "model_type", "dtype"):
            config["vision_config"].pop(name, None)
    (folder / "config.json").write_text(json.dumps(config))


def picture(width: int, height: int, seed: int = 0, mode: str = "RGB") -> PIL.Image.Image:
    """Noise over a gradient."""
    generator = torch.Generator().manual_seed(seed)
    channels = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4}[mode]
    noise = torch.randint(0, 120, (height, width, channels), generator=generator)
    slope = torch.linspace(0, 100, width)[None, :, None] + torch.linspace(0, 35, height)[:, None, None]
    pixels = (noise + slope).to(torch.uint8).contiguous()
    return PIL.Image.frombytes(mode, (width, height), pixels.numpy().tobytes())


def converted(made: Made, folder: Path) -> Path:
    convert(made.folder, folder)
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Configs as published

QWEN_2_VL = {
    "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645, "hidden_act": "silu",
    "image_token_id": 151655, "initializer_range": 0.02, "max_position_embeddings": 32768, "rms_norm_eps": 1e-06,
    "rope_scaling": {"mrope_section": [16, 24, 24], "type": "mrope"}, "rope_theta": 1000000.0, "sliding_window": 32768,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.41.2", "use_cache": True,
    "use_sliding_window": False, "video_token_id": 151656, "vision_end_token_id": 151653,
    "vision_start_token_id": 151652, "vision_token_id": 151654, "vocab_size": 152064,
    "architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl",
}  # fmt: skip
EYES_2 = {
    "depth": 32, "embed_dim": 1280, "in_channels": 3, "in_chans": 3, "mlp_ratio": 4, "num_heads": 16, "patch_size": 14,
    "spatial_merge_size": 2, "spatial_patch_size": 14, "temporal_patch_size": 2, "model_type": "qwen2_vl",
}  # fmt: skip
QWEN_2_5_VL = QWEN_2_VL | {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl",
    "max_position_embeddings": 128000,
}  # fmt: skip
EYES_2_5 = {
    "depth": 32, "fullatt_block_indexes": [7, 15, 23, 31], "hidden_act": "silu", "hidden_size": 1280, "in_chans": 3,
    "intermediate_size": 3420, "model_type": "qwen2_5_vl", "num_heads": 16, "patch_size": 14, "spatial_merge_size": 2,
    "spatial_patch_size": 14, "temporal_patch_size": 2, "tokens_per_second": 2, "window_size": 112,
}  # fmt: skip


def language(dim: int, ffn: int, layers: int, heads: int, kv_heads: int, **others: Any) -> dict[str, Any]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return dict(zip(names, (dim, ffn, layers, heads, kv_heads), strict=True)) | others


PUBLISHED = {
    "Qwen/Qwen2-VL-2B-Instruct": QWEN_2_VL
    | language(1536, 8960, 28, 12, 2, max_window_layers=28, tie_word_embeddings=True, vocab_size=151936)
    | {"vision_config": EYES_2 | {"hidden_size": 1536}},
    "Qwen/Qwen2-VL-7B-Instruct": QWEN_2_VL
    | language(3584, 18944, 28, 28, 4, max_window_layers=28)
    | {"vision_config": EYES_2 | {"hidden_size": 3584}},
    "Qwen/Qwen2-VL-72B-Instruct": QWEN_2_VL
    | language(8192, 29568, 80, 64, 8, max_window_layers=80, rms_norm_eps=1e-5)
    | {"vision_config": EYES_2 | {"hidden_size": 8192}},
    "Qwen/Qwen2.5-VL-3B-Instruct": QWEN_2_5_VL
    | language(2048, 11008, 36, 16, 2, max_window_layers=70, tie_word_embeddings=True, vocab_size=151936)
    | {"vision_config": EYES_2_5 | {"out_hidden_size": 2048}},
    "Qwen/Qwen2.5-VL-7B-Instruct": QWEN_2_5_VL
    | language(3584, 18944, 28, 28, 4, max_window_layers=28)
    | {"vision_config": EYES_2_5 | {"out_hidden_size": 3584}},
    "Qwen/Qwen2.5-VL-72B-Instruct": QWEN_2_5_VL
    | language(8192, 29568, 80, 64, 8, max_window_layers=80)
    | {"vision_config": EYES_2_5 | {"out_hidden_size": 8192, "intermediate_size": 3456}},
}
