"""What several test files need."""

import re
import shutil
from pathlib import Path

import pytest
import torch

from vllm_adamas.errors import AdamasError

MODEL = Path(__file__).parents[1] / ".models" / "SmolLM2-135M-Instruct"  # `make model` makes it


def is_one_sentence(text: str) -> bool:
    return text.endswith(".") and "\n" not in text and not re.search(r"[.!?] +[A-Z]", text)


def refused(call, *named: str) -> None:
    """The call ends in an AdamasError of one sentence that holds each of ``named``."""
    with pytest.raises(AdamasError) as error:
        call()
    message = str(error.value)
    assert is_one_sentence(message), message
    assert all(part in message for part in named), message


def random_llama(folder: Path) -> Path:
    """A small Llama whose 8 query and 4 KV heads can be split; weights large enough that attention
    decides between tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "initializer_range": 0.08}
    names = {"vocab_size": 49152, "bos_token_id": 1, "eos_token_id": 2}
    config = LlamaConfig(**shape, **heads, **names, max_position_embeddings=8192)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).half().save_pretrained(folder)
    for file in MODEL.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder
