"""What several test files need."""

import re
import shutil
from pathlib import Path

import pytest
import torch

from vllm_adamas.errors import AdamasError

ROOT = Path(__file__).parents[1]
MODEL = ROOT / ".models" / "SmolLM2-135M-Instruct"  # `make model` makes it


def is_one_sentence(text: str) -> bool:
    return text.endswith(".") and "\n" not in text and not re.search(r"[.!?] +[A-Z]", text)


def refused(call, *named: str) -> str:
    """The call ends in an AdamasError of one sentence that holds each of ``named``; returns the sentence."""
    with pytest.raises(AdamasError) as error:
        call()
    message = str(error.value)
    assert is_one_sentence(message), message
    assert all(part in message for part in named), message
    return message


def make_random(
    folder: Path, family: str, change=lambda model: None, kv_heads: int = 4, **config
) -> Path:
    """A small model of a family of transformers with random weights.

    Args:
        change: called with the model before it is saved.
        config: fields of its configuration.
    """
    import transformers

    names = {"vocab_size": 49152, "bos_token_id": 1, "eos_token_id": 2}
    shape = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 8, "num_key_value_heads": kv_heads, "initializer_range": 0.08}
    kind = getattr(transformers, f"{family}Config")
    config = kind(**{**names, **shape, **heads, "max_position_embeddings": 8192, **config})
    model = getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = model(config)
        change(made)
        made.half().save_pretrained(folder)
    for file in MODEL.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def random_llama(folder: Path, **config) -> Path:
    """A small Llama whose 8 query and 4 KV heads can be split; weights large enough that attention
    decides between tokens."""
    return make_random(folder, "Llama", **config)


def random_gemma(folder: Path) -> Path:
    """The same as a Gemma 3: every other layer has a sliding window of 256 tokens."""
    kinds = ["sliding_attention", "full_attention"] * 2
    return make_random(folder, "Gemma3Text", sliding_window=256, layer_types=kinds, pad_token_id=0)


def random_llama4(folder: Path) -> Path:
    """The same as a Llama 4: three of four layers attend within chunks of 256 tokens."""
    experts = {"num_local_experts": 1, "num_experts_per_tok": 1, "intermediate_size_mlp": 512}
    return make_random(folder, "Llama4Text", attention_chunk_size=256, pad_token_id=0, **experts)


def random_gemma2(folder: Path) -> Path:
    """The same as a Gemma 2, whose logits are capped near their standard deviation."""
    kinds = ["sliding_attention", "full_attention"] * 2

    def change(model) -> None:  # embeddings that do not outweigh what attention adds
        model.model.embed_tokens.weight.data *= 0.1

    caps = {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 64}
    return make_random(
        folder, "Gemma2", change, sliding_window=256, layer_types=kinds, pad_token_id=0, **caps
    )


def random_gpt_oss(folder: Path) -> Path:
    """The same as a gpt-oss, whose heads have sinks from next to none of the weight to most of it."""
    kinds = ["sliding_attention", "full_attention"] * 2

    def change(model) -> None:
        for number, layer in enumerate(model.model.layers):
            sinks = layer.self_attn.sinks.data
            sinks.copy_(torch.linspace(-2, 8, len(sinks)).roll(number))

    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return make_random(
        folder, "GptOss", change, sliding_window=256, layer_types=kinds, pad_token_id=0, **experts
    )


class Changed:
    """An object with some attributes replaced; the rest is the real one's."""

    def __init__(self, real, **changes):
        self._real, self._changes = real, changes

    def __getattr__(self, name: str):
        return self._changes[name] if name in self._changes else getattr(self._real, name)
