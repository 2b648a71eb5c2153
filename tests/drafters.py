"""Models with drafters of random weights, made so that a part of the drafts is accepted.

The targets count down: the row of a token in the head is the embedding of the token after it, and embeddings mostly
outweigh what the layers add. Where the layers win, attention decides about the next token. The drafters count down as
well and know no exceptions.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from common import make_random
from safetensors.torch import load_file, save_file

EMBEDDING = 14.0  #: factor of the embeddings, by which about half of the drafts are accepted
LOGITS = 0.1  #: factor of the logits, which large embeddings make large
WEIGHTS = "model.safetensors"
SMALL = 0.02  #: standard deviation of the weights that are not there to count down
MASK = 5  #: token that stands for those that are drafted in parallel
DRAFTS = 3  #: per step
AUXILIARY = [1, 2, 3]  #: layers of the target whose states an EAGLE-3 head reads


def target(folder: Path, family: str = "Llama", **config) -> Path:
    """A model that counts down."""

    def change(model) -> None:
        embeddings = model.get_input_embeddings().weight.data
        embeddings *= EMBEDDING
        model.get_output_embeddings().weight.data = embeddings.roll(-1, 0)
        model.base_model.norm.weight.data *= LOGITS

    return make_random(folder, family, change, **config)


class _Head:
    """The tensors of a drafter, for a target in a folder."""

    def __init__(self, model: Path):
        self.config = json.loads((model / "config.json").read_text())
        self.hidden = self.config["hidden_size"]
        self._random = torch.Generator().manual_seed(0)
        self.tensors: dict[str, torch.Tensor] = {}

    def small(self, *shape: int) -> torch.Tensor:
        return SMALL * torch.randn(*shape, generator=self._random)

    def pass_first(self, halves: int = 2) -> torch.Tensor:
        """``[hidden, halves * hidden]``: what stands first, and a little of the rest."""
        weight = self.small(self.hidden, halves * self.hidden)
        weight[:, : self.hidden] = torch.eye(self.hidden)
        return weight

    def layer(self, name: str, inputs: int, norms: tuple[str, ...]) -> None:
        """A decoder layer of small weights."""
        config, wide = self.config, self.config["intermediate_size"]
        heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
        heads["v"] = heads["k"]
        for part, number in heads.items():
            rows = number * config["head_dim"]
            self.tensors[f"{name}self_attn.{part}_proj.weight"] = self.small(rows, inputs)
        rows = heads["q"] * config["head_dim"]
        self.tensors[f"{name}self_attn.o_proj.weight"] = self.small(self.hidden, rows)
        for part, shape in (("gate", (wide, -1)), ("up", (wide, -1)), ("down", (-1, wide))):
            shape = [self.hidden if size < 0 else size for size in shape]
            self.tensors[f"{name}mlp.{part}_proj.weight"] = self.small(*shape)
        for norm in norms:
            self.tensors[f"{name}{norm}.weight"] = torch.ones(self.hidden)

    def save(self, folder: Path, **config) -> Path:
        folder.mkdir(exist_ok=True)
        tensors = {name: tensor.half().contiguous() for name, tensor in self.tensors.items()}
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})
        (folder / "config.json").write_text(json.dumps({**self.config, **config}))
        return folder


def eagle(folder: Path, model: Path) -> Path:
    """An EAGLE head, whose layer gets the embedding of the last token."""
    head = _Head(model)
    head.tensors["fc.weight"] = head.pass_first()
    head.layer("layers.0.", head.hidden, ("post_attention_layernorm",))
    return head.save(folder, num_hidden_layers=1)


def eagle3(folder: Path, model: Path, parallel: bool = False) -> Path:
    """An EAGLE-3 head, which has the embedding of the last token from its attention alone.

    Queries and keys are alike, so that every token attends to itself; values are embeddings.

    Args:
        parallel: draft all tokens of a step at once, from masks.
    """
    head = _Head(model)
    queries, keys = (head.config[f"num_{kind}_heads"] for kind in ("attention", "key_value"))
    size = head.config["head_dim"]
    assert keys * size == head.hidden, "values have to hold an embedding"
    norms = ("hidden_norm", "input_layernorm", "post_attention_layernorm")
    head.layer("midlayer.", 2 * head.hidden, norms)
    whole = torch.eye(head.hidden, 2 * head.hidden)
    group = queries // keys
    repeated = whole.view(keys, size, -1).repeat_interleave(group, 0)
    back = repeated[..., : head.hidden].reshape(-1, head.hidden).T / group
    attention = {"q": 4 * repeated.reshape(-1, 2 * head.hidden), "k": 2 * whole, "v": whole}
    for part, weight in (*attention.items(), ("o", back)):
        head.tensors[f"midlayer.self_attn.{part}_proj.weight"] = weight
    head.tensors["fc.weight"] = head.small(head.hidden, len(AUXILIARY) * head.hidden)
    head.tensors["norm.weight"] = torch.ones(head.hidden)
    if parallel:
        head.config["ptd_token_id"] = MASK
        head.tensors["mask_hidden"] = head.small(1, len(AUXILIARY) * head.hidden)
    return head.save(
        folder,
        num_hidden_layers=1,
        architectures=["LlamaForCausalLMEagle3"],
        eagle_aux_hidden_state_layer_ids=AUXILIARY,
    )


def medusa(folder: Path, model: Path, heads: int) -> Path:
    """Medusa's heads, each of which counts on from the one before."""
    head = _Head(model)
    rows = load_file(model / WEIGHTS)["lm_head.weight"]
    for number in range(heads):
        head.tensors[f"blocks.{number}.layers.0.weight"] = head.small(head.hidden, head.hidden)
        head.tensors[f"lm_heads.{number}.weight"] = rows.roll(-1 - number, 0)
    head.config = {"hidden_size": head.hidden, "vocab_size": head.config["vocab_size"]}
    return head.save(folder, model_type="medusa", num_heads=heads, num_hidden_layers=1)


def with_mtp(folder: Path) -> Path:
    """A target with a layer for multi-token prediction in its own checkpoint."""
    dense = {"moe_layer_start_index": 99, "moe_layer_end_index": 99, "tie_word_embeddings": False}
    model = target(folder, "Ernie4_5_Moe", num_nextn_predict_layers=1, **dense)
    head = _Head(model)
    head.layer("model.mtp_block.0.", head.hidden, ("input_layernorm", "post_attention_layernorm"))
    head.tensors["model.mtp_linear_proj.0.weight"] = head.pass_first()
    for name in ("emb", "hidden"):
        head.tensors[f"model.mtp_{name}_norm.0.weight"] = torch.ones(head.hidden)
    head.tensors |= {name: one.clone() for name, one in load_file(model / WEIGHTS).items()}
    return head.save(folder)


def drafting(method: str, **config) -> dict:
    """A speculative configuration."""
    return {"method": method, "num_speculative_tokens": DRAFTS, **config}


def methods(folder: Path, model: Path) -> dict[str, dict]:
    """Speculative configurations of a target by the names of the drafters, which are made in the folder.

    EAGLE heads draft one token after another. The draft model is the target itself.
    """
    return {
        "draft model": drafting("draft_model", model=str(model)),
        "eagle": drafting("eagle", model=str(eagle(folder / "eagle", model))),
        "eagle3": drafting("eagle3", model=str(eagle3(folder / "eagle3", model))),
        "medusa": drafting("medusa", model=str(medusa(folder / "medusa", model, DRAFTS))),
        "mtp": drafting("mtp"),  # whose layer a target brings: see with_mtp
    }
