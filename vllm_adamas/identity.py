"""The identity of a model: its heads, position encoding, fingerprint of the weights, and QK-norm."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_adamas.errors import AdamasError, shortened

logger = logging.getLogger("vllm.adamas")

#: Bytes that a fingerprint reads per sample, and samples that it takes from a file in another format
#: than safetensors.
SAMPLE_BYTES, SAMPLES = 1024, 64

#: The format's own limit on the bytes of a safetensors header.
MAX_HEADER_BYTES = 100_000_000


class ModelIdentity(BaseModel):
    """The model that was measured; ``fingerprint`` is :func:`fingerprint` of its files."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str
    fingerprint: str
    num_layers: int = Field(ge=1)
    num_query_heads: int = Field(ge=1)
    num_kv_heads: int = Field(ge=1)
    head_size: int = Field(ge=1)
    rope: str = Field(description="Parameters of the position encoding, as JSON.")


class Heads(NamedTuple):
    """Query heads Hq, KV heads Hkv and head size D of a layer."""

    query: int
    kv: int
    size: int

    @classmethod
    def parse(cls, text: str) -> Heads:
        """Heads from a text such as ``32x8x128``.

        Raises:
            ValueError: the text is not three positive numbers, or Hkv does not divide Hq.
        """
        parts = [int(part) if part.isdecimal() else 0 for part in text.split("x")]
        if len(parts) != 3 or 0 in parts or parts[0] % parts[1]:
            raise ValueError(
                f"{text!r} is not a layer's shape: give query heads x KV heads x head size, as in 32x8x128, with "
                "a whole number of query heads per KV head."
            )
        return cls(*parts)

    @classmethod
    def of(cls, text: dict[str, Any]) -> Heads:
        """The heads of a model's layers, from :func:`text_config`.

        Raises:
            KeyError: the configuration does not tell them.
        """
        query = count_of(text, "num_attention_heads")
        kv = count_of(text, "num_key_value_heads") if text.get("num_key_value_heads") else query
        if text.get("head_dim"):
            return cls(query, kv, count_of(text, "head_dim"))
        return cls(query, kv, count_of(text, "hidden_size") // query)

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.query // self.kv

    def __str__(self) -> str:
        return "x".join(map(str, self))


def text_config(folder: str) -> dict[str, Any]:
    """The config.json in a model's folder, that of its text part above all.

    Raises:
        AdamasError: the folder has none, or it is not a model's.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise AdamasError(
            f"{path} does not exist: give --model the folder of a Hugging Face model."
        )
    try:
        model = json.loads(path.read_text())
        text = {**model, **model.get("text_config", {})}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        raise AdamasError(
            f"{path} is not a model's configuration: give --model the folder of a Hugging Face model."
        ) from None
    return text


def count_of(text: dict[str, Any], name: str) -> int:
    """A number of a model's configuration, from :func:`text_config`.

    Raises:
        KeyError: it is not there, or is not a positive integer.
    """
    if type(text[name]) is not int or text[name] <= 0:
        raise KeyError(name)
    return text[name]


def identify(model_config) -> ModelIdentity:
    """The identity of the model of a vLLM ModelConfig."""
    text = model_config.hf_text_config
    rope = getattr(text, "rope_parameters", None) or {
        "rope_theta": getattr(text, "rope_theta", None),
        "rope_scaling": getattr(text, "rope_scaling", None),
    }
    folder = model_folder(model_config.model, model_config.revision)
    name = Path(model_config.model).name if folder else model_config.model
    return ModelIdentity(
        name=name.rpartition("/")[2],
        fingerprint=fingerprint(folder) if folder else "",
        num_layers=text.num_hidden_layers,
        num_query_heads=text.num_attention_heads,
        num_kv_heads=model_config.get_total_num_kv_heads(),
        head_size=model_config.get_head_size(),
        rope=json.dumps(rope, sort_keys=True, default=str),
    )


def model_folder(model: str, revision: str | None = None) -> Path | None:
    """The folder of a model's files on this host; None when they are not here (yet)."""
    if (Path(model) / "config.json").is_file():
        return Path(model)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def fingerprint(folder: Path) -> str:
    """sha256 over name, dtype, shape and some bytes of every tensor, however the files are sharded.

    A fine-tuned or requantised model has another one. Computing it takes milliseconds. Of weights in
    other formats than safetensors it reads the size of each file and 64 KiB spread over it.

    Returns:
        Hexadecimal digits; empty when the folder holds no weights.
    """
    tensors = []
    for path, start, header in _safetensors(folder):
        with path.open("rb") as file:
            for name, tensor in header.items():
                first, last = tensor.data_offsets
                file.seek(start + first + max(0, (last - first - SAMPLE_BYTES) // 2))
                sample = file.read(min(SAMPLE_BYTES, last - first))
                tensors.append((name, tensor.dtype, tensor.shape, sample.hex()))
    for path in () if tensors else sorted(filter(Path.is_file, folder.glob("*.bin"))):
        size = path.stat().st_size
        with path.open("rb") as file:
            for sample in range(SAMPLES):
                file.seek(max(0, (size - SAMPLE_BYTES) * sample // (SAMPLES - 1)))
                tensors.append((path.name, size, file.read(SAMPLE_BYTES).hex()))
    return hashlib.sha256(json.dumps(sorted(tensors)).encode()).hexdigest() if tensors else ""


class _Tensor(BaseModel):
    """A tensor's entry in a safetensors header; offsets in bytes from the end of the header."""

    dtype: str
    shape: list[int] = Field(max_length=64)  # as many as PyTorch has
    data_offsets: tuple[int, int]


def _safetensors(folder: Path) -> Iterator[tuple[Path, int, dict[str, _Tensor]]]:
    """Every safetensors file of a model, the offset of its data in bytes, and the tensors of its header.

    Where an index lists the files, others are not the model's, such as a second copy in one file. vLLM
    leaves them out too. Files that only have the suffix, such as Git LFS pointers, are skipped with a warning. A model need
    not use every file of its folder, and vLLM refuses to load those that it does use.
    """
    listed = _listed_files(folder / "model.safetensors.index.json")
    for path in sorted(folder.glob("*.safetensors")):
        if listed and path.name not in listed:
            continue
        try:
            yield path, *_header(path)
        except (OSError, ValueError) as error:
            logger.warning("%s is left out of what tells models apart (%s).", path, error)


def _listed_files(index: Path) -> set[str]:
    """Names of the files that a safetensors index lists; empty if there is no index that can be read."""
    try:
        if not index.is_file() or index.stat().st_size > MAX_HEADER_BYTES:
            return set()
        weights = json.loads(index.read_bytes())["weight_map"]
        return {name for name in weights.values() if isinstance(name, str)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        logger.warning("%s is not a safetensors index (%s): every file counts.", index, error)
        return set()


def _header(path: Path) -> tuple[int, dict[str, _Tensor]]:
    """The offset of a safetensors file's data in bytes, and the tensors of its header.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a complete safetensors file.
    """
    if not path.is_file():
        raise ValueError("it is no regular file")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        if not 8 < start <= min(size, 8 + MAX_HEADER_BYTES):
            raise ValueError("it has no safetensors header")
        try:
            header = json.loads(file.read(start - 8))
        except RecursionError:
            raise ValueError("its header is nested too deeply") from None
    if not isinstance(header, dict):
        raise ValueError("its header describes no tensors")
    header.pop("__metadata__", None)
    try:  # one by one, since each error of a model is kept until its validation ends
        tensors = {name: _Tensor.model_validate(entry) for name, entry in header.items()}
    except ValidationError:
        raise ValueError("its header describes no tensors") from None
    for name, tensor in tensors.items():
        first, last = tensor.data_offsets
        if not 0 <= first <= last <= size - start:
            raise ValueError(f"the data of {shortened(name)} lie beyond its end")
    return start, tensors


#: Model types whose attention normalises queries and keys, for models whose weights are not here yet.
QK_NORM_TYPES = (
    *("exaone4", "gemma3", "gemma3_text", "gemma3n", "gemma3n_text", "gemma4", "gemma4_text"),
    *("olmo2", "olmo3"),
    *("lfm2", "qwen3", "qwen3_moe", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"),
)
QK_NORM_TENSOR = re.compile(r"\b(k_norm|k_layernorm|key_layernorm)\.")


def has_qk_norm(model_config) -> bool:
    """Whether the model normalises its keys, judged by its tensors' names or else by its type."""
    folder = model_folder(model_config.model, model_config.revision)
    names = [name for _, _, header in _safetensors(folder) for name in header] if folder else []
    if names:
        return any(map(QK_NORM_TENSOR.search, names))
    return model_config.hf_text_config.model_type in QK_NORM_TYPES
