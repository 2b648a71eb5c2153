"""Folders as a hub would give them: a configuration, and random weights that Transformers initialises."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path

import torch
from architectures import COMMON, VOCABULARY
from safetensors.torch import load_file, save_file


def write_config(folder: Path, config: dict) -> Path:
    """A folder with a configuration alone, which is all that the checks before a start read."""
    from transformers.models.auto import modeling_auto

    folder.mkdir(parents=True, exist_ok=True)
    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config["model_type"])
    whole = {"architectures": [causal], **COMMON, **config}
    (folder / "config.json").write_text(json.dumps(whole))
    return folder


def write_model(folder: Path, config: dict) -> Path:
    """A folder with a model. Biases and norms get noise too, as Transformers makes them all alike."""
    import transformers

    made = transformers.AutoConfig.for_model(
        **deepcopy({**COMMON, **config})
    )  # it changes its arguments
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(made, dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn_like(parameter)
        model.get_input_embeddings().weight *= config.get("embedding_factor", 1.0)
        model.save_pretrained(folder)
    return folder


GROUP = 64  #: input channels that share a scale


def _pack(codes: torch.Tensor) -> torch.Tensor:
    """8 codes of 4 bits, the last dimension of ``codes``, as one int32; the first lies in the lowest bits."""
    shifted = codes.long() << torch.arange(0, 32, 4)
    packed = shifted.sum(-1)
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).int()


def _int4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes ``[in, out]`` of 0 to 15 around 8, and scales ``[in / GROUP, out]``, of a weight ``[out, in]``."""
    grouped = weight.T.unflatten(0, (-1, GROUP))  # [in/G, G, out]
    scales = grouped.abs().amax(1) / 7
    codes = (grouped / scales[:, None]).round().int() + 8
    return codes.flatten(0, 1), scales.half()


def _gptq(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    codes, scales = _int4(weight)
    zeros = torch.full(
        (scales.shape[0], scales.shape[1] // 8, 8), 7
    )  # one less than the zero point
    return {
        "qweight": _pack(codes.unflatten(0, (-1, 8)).transpose(1, 2)),  # [in/8, out]
        "qzeros": _pack(zeros),
        "scales": scales,
        "g_idx": torch.arange(len(codes), dtype=torch.int32) // GROUP,
    }


def _awq(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    codes, scales = _int4(weight)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    zeros = torch.full((scales.shape[0], scales.shape[1] // 8, 8), 8)
    return {
        "qweight": _pack(codes.unflatten(1, (-1, 8))[..., order]),  # [in, out/8]
        "qzeros": _pack(zeros),
        "scales": scales,
    }


def _int8(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    scales = weight.float().abs().amax(1, keepdim=True) / 127
    return {"weight": (weight / scales).round().to(torch.int8), "weight_scale": scales}


BLOCK = 128  #: rows and columns that share a scale


def _fp8(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    element, (rows, columns) = torch.float8_e4m3fn, weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))  # [R/B, B, C/B, B]
    scales = blocks.abs().amax((1, 3)) / torch.finfo(element).max
    codes = (blocks / scales[:, None, :, None]).flatten(2, 3).flatten(0, 1)
    return {"weight": codes[:rows, :columns].to(element), "weight_scale_inv": scales}


def _eight_bits(strategy: str, dynamic: bool) -> dict:
    return {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": strategy,
        "dynamic": dynamic,
    }


_INT8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": _eight_bits("channel", False),
            "input_activations": _eight_bits("token", True),
        }
    },
}
_INT4 = {"bits": 4, "group_size": GROUP}
_FP8 = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
}
QUANTISED = {  # name -> quantization_config of a checkpoint, and the tensors of a linear layer
    "GPTQ": ({"quant_method": "gptq", "desc_act": False, "sym": True, **_INT4}, _gptq),
    "AWQ": ({"quant_method": "awq", "version": "gemm", "zero_point": True, **_INT4}, _awq),
    "INT8": (_INT8, _int8),
    "FP8": (_FP8, _fp8),
}


def write_quantised(folder: Path, model: Path, name: str) -> Path:
    """A model's weights, quantised, in another folder."""
    method, tensors_of = QUANTISED[name]
    config = json.loads((model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": method}))
    tensors = {}
    for key, weight in load_file(model / "model.safetensors").items():
        if key.endswith("_proj.weight"):
            stem = key.removesuffix("weight")
            tensors |= {
                stem + part: tensor.contiguous() for part, tensor in tensors_of(weight).items()
            }
        else:
            tensors[key] = weight
    save_file(tensors, folder / "model.safetensors")
    return folder


def write_lora(folder: Path, model: Path, rank: int = 8) -> Path:
    """An adapter of a model's query and value projections."""
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    generator, tensors = torch.Generator().manual_seed(0), {}
    for key, weight in load_file(model / "model.safetensors").items():
        if key.endswith(("q_proj.weight", "v_proj.weight")):
            stem = f"base_model.model.{key.removesuffix('.weight')}"
            out, inner = weight.shape
            tensors[f"{stem}.lora_A.weight"] = torch.randn(rank, inner, generator=generator) * 0.1
            tensors[f"{stem}.lora_B.weight"] = torch.randn(out, rank, generator=generator) * 0.1
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


QUERIES = 16  #: tokens that stand for an image
IMAGE = VOCABULARY - 1  #: their id in prompts


def write_blip2(folder: Path, text: dict) -> Path:
    """A folder with a BLIP-2 around a model of text: a small encoder of images, and as small a Q-Former."""
    import transformers
    from tokenizers import Tokenizer, models

    narrow = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    narrow |= {"num_attention_heads": 2, "initializer_range": 0.08}
    config = transformers.Blip2Config(
        vision_config={**narrow, "image_size": 56, "patch_size": 14},
        qformer_config={**narrow, "encoder_hidden_size": 64, "vocab_size": 8},
        text_config={**COMMON, **text},
        num_query_tokens=QUERIES,
        image_token_index=IMAGE,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = transformers.Blip2ForConditionalGeneration(config)
        for parameter in model.parameters():
            if parameter.dim() == 1 or parameter is model.query_tokens:
                parameter += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(folder)
    words = {f"w{number}": number for number in range(IMAGE)} | {"<image>": IMAGE}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, "w0")), unk_token="w0"
    )
    size = {"height": 56, "width": 56}
    images = transformers.BlipImageProcessor(size=size)
    transformers.Blip2Processor(images, tokenizer, QUERIES).save_pretrained(folder)
    return folder
