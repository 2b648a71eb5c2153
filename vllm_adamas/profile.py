"""Calibration profiles: what `vllm-adamas calibrate` measured on a model, as versioned JSON.

A server uses two things of every layer and KV head. The mean key is subtracted before keys are coded.
The balance multiplies each channel of the keys by a power of two and divides that of the queries by it:
every q.k stays what it was, to the bit, but coarse codes of the balanced keys estimate it better. Both
are part of the codes, so they must be the same for every token of a server: the file is read before
the first token, and its hash travels with the configuration to every worker.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from vllm_adamas.errors import AdamasError

logger = logging.getLogger("vllm.adamas")
FORMAT = "vllm-adamas-profile"
VERSION = 1

#: Bytes of a profile: four times what 128 layers of 128 KV heads of size 256 take.
MAX_BYTES = 64 * 2**20

#: Of the balance: fp16 keys and queries still have room for such factors.
MAX_EXPONENT = 4

#: What a fingerprint reads: bytes of a tensor, and places in a file that is no safetensors.
SAMPLE_BYTES, SAMPLES = 1024, 64

#: Bytes of a safetensors header: the format's own limit.
MAX_HEADER_BYTES = 100_000_000


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelIdentity(_Part):
    """The model that was measured; ``fingerprint`` is :func:`fingerprint` of its files."""

    name: str
    fingerprint: str
    num_layers: int = Field(ge=1)
    num_query_heads: int = Field(ge=1)
    num_kv_heads: int = Field(ge=1)
    head_size: int = Field(ge=1)
    rope: str = Field(description="Parameters of the position encoding, as JSON.")


class LayerProfile(_Part):
    """One attention layer.

    Args:
        key_mean: float16 ``[num_kv_heads, head_size]``, little-endian, base64; after RoPE.
        balance: int8 ``[num_kv_heads, head_size]``, base64: exponents of the key channels' factors.
        key_rms: root of the mean square of key elements, per KV head.
        mean_share: ||mean||^2 over the mean ||key||^2, per KV head: 0 for centred keys, at most 1.
        mass: attention mass kept, per setting and budget, averaged over query heads; ``oracle`` is
            that of the tokens with the largest weights. Absent in sliding-window layers.
    """

    key_mean: str
    balance: str
    key_rms: list[float]
    mean_share: list[float]
    mass: dict[str, dict[str, float]] = Field(default_factory=dict)


class Suggestion(_Part):
    """Settings for a wanted share of the oracle's mass, from the profile's own tables."""

    wanted_recall: float
    token_budget: int
    num_dense_layers: int
    reached: bool


class Profile(_Part):
    """See :mod:`vllm_adamas.profile`; ``tokens`` and ``texts`` say what it was measured on."""

    format: Literal["vllm-adamas-profile"] = FORMAT
    version: Literal[1] = VERSION
    created_by: str
    model: ModelIdentity
    tokens: int
    texts: dict[str, str] = Field(description="Name and sha256 of every text.")
    context: int
    suggestion: Suggestion
    layers: list[LayerProfile]

    def key_mean(self, layer: int, heads: range) -> torch.Tensor:
        """Mean keys of some KV heads of a layer, float32 ``[len(heads), head_size]``, after RoPE."""
        raw = bytearray(base64.b64decode(self.layers[layer].key_mean))
        mean = torch.frombuffer(raw, dtype=torch.float16).float()
        return mean.view(self.model.num_kv_heads, self.model.head_size)[heads.start : heads.stop]

    def balance(self, layer: int, heads: range) -> torch.Tensor:
        """Exponents of two of some KV heads' key channels, int8 ``[len(heads), head_size]``."""
        raw = bytearray(base64.b64decode(self.layers[layer].balance))
        exponents = torch.frombuffer(raw, dtype=torch.int8)
        return exponents.view(self.model.num_kv_heads, -1)[heads.start : heads.stop]

    def save(self, path: Path) -> None:
        """Writes the file, complete or not at all."""
        partial = path.with_name(f"{path.name}.partial")
        partial.write_text(json.dumps(self.model_dump(), indent=1) + "\n")
        partial.replace(path)


def encode_mean(mean: torch.Tensor) -> str:
    """Of :attr:`LayerProfile.key_mean`."""
    return base64.b64encode(mean.to(torch.float16).contiguous().numpy().tobytes()).decode()


def encode_balance(exponents: torch.Tensor) -> str:
    """Of :attr:`LayerProfile.balance`."""
    return base64.b64encode(exponents.to(torch.int8).contiguous().numpy().tobytes()).decode()


def pin(option: str) -> str:
    """``FILE#sha256=HASH`` for the option ``FILE``; a pinned option is verified and kept.

    Raises:
        AdamasError: as :func:`load` does.
    """
    path, _, _ = option.partition("#sha256=")
    load(option)
    return f"{path}#sha256={_digest(_read(path))}"


@cache
def load(option: str) -> Profile:
    """The profile ``FILE`` or ``FILE#sha256=HASH``, read once per process.

    Raises:
        AdamasError: no such file, no profile, another version, or its content has another hash.
    """
    path, _, wanted = option.partition("#sha256=")
    content = _read(path)
    if wanted and _digest(content) != wanted:
        raise AdamasError(
            f"the profile {path} has changed since this server's configuration was read: profiles are "
            "immutable while a server runs, so restart it."
        )
    try:
        try:
            data = json.loads(content)
        except RecursionError:
            raise ValueError("it is nested too deeply") from None
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError("it has no format entry of one")
        if data.get("version") != VERSION:
            raise ValueError(f"version {data.get('version')!r}, this release reads {VERSION}")
        profile = Profile.model_validate(data)
        _check_sizes(profile)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise AdamasError(
            f"{path} is not a usable calibration profile ({where}: {first['msg']}): make it again "
            "with `vllm-adamas calibrate`."
        ) from None
    except ValueError as error:
        raise AdamasError(
            f"{path} is not a calibration profile ({error}): make one with `vllm-adamas calibrate`."
        ) from None
    return profile


def _check_sizes(profile: Profile) -> None:
    model = profile.model
    if len(profile.layers) != model.num_layers:
        raise ValueError(f"{len(profile.layers)} layers instead of {model.num_layers}")
    elements, heads = model.num_kv_heads * model.head_size, range(model.num_kv_heads)
    for number, layer in enumerate(profile.layers):
        for name, size in (("key_mean", 2 * elements), ("balance", elements)):
            if len(base64.b64decode(getattr(layer, name), validate=True)) != size:
                raise ValueError(f"{name} of layer {number} is not {size} bytes")
        if profile.balance(number, heads).abs().max() > MAX_EXPONENT:
            raise ValueError(f"balance of layer {number} is beyond ±{MAX_EXPONENT}")
        if not profile.key_mean(number, heads).isfinite().all():
            raise ValueError(f"key_mean of layer {number} is not finite")


#: Profiles of this package; the option may be the name of one instead of a path.
SHIPPED = Path(__file__).with_name("profiles")


def shipped_names() -> str:
    """Names of the shipped profiles, comma-separated."""
    return ", ".join(sorted(path.stem for path in SHIPPED.glob("*.json")))


def _read(path: str) -> bytes:
    shipped, file = SHIPPED / f"{path}.json", Path(path)
    try:
        if shipped.is_file() and shipped.parent == SHIPPED and not file.exists():
            return shipped.read_bytes()
        size = file.stat().st_size
        if not file.is_file():
            problem = "it is no regular file"
        elif size > MAX_BYTES:
            problem = f"it has {size} bytes and a profile at most {MAX_BYTES}"
        else:
            return file.read_bytes()
    except OSError as error:
        problem = error.strerror
    raise AdamasError(
        f"the profile {path} cannot be read ({problem}): give the path of a file that "
        f"`vllm-adamas calibrate` made, or the name of a shipped one ({shipped_names()})."
    )


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def check_fits(profile: Profile, path: str, identity: ModelIdentity) -> None:
    """
    Raises:
        AdamasError: the profile was made for another model; the sentence names both.
    """
    made_for = profile.model
    for field in ("num_layers", "num_query_heads", "num_kv_heads", "head_size", "rope"):
        theirs, ours = getattr(made_for, field), getattr(identity, field)
        if theirs != ours:
            _refuse(path, made_for, identity, f"{field} is {theirs} there and {ours} here")
    if not identity.fingerprint:  # files not on this host yet: the name must do
        if made_for.name != identity.name:
            _refuse(path, made_for, identity, "the names differ and no local files tell more")
    elif made_for.fingerprint != identity.fingerprint:
        _refuse(path, made_for, identity, "the weights or the config.json differ")


def _refuse(path: str, made_for: ModelIdentity, identity: ModelIdentity, why: str) -> None:
    raise AdamasError(
        f"the profile {path} was made for {made_for.name} and does not fit {identity.name} ({why}): "
        "calibrate this model with `vllm-adamas calibrate`, or remove the option."
    )


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
    """Where the files of a model lie on this host; None when they are not here (yet)."""
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
    """sha256 over name, dtype, shape and some bytes of every tensor, however files are cut.

    A fine-tuned or requantised model has another one; reading it takes milliseconds. Weights in other
    files than safetensors count with their size and 64 KiB spread over each.
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
    return _digest(json.dumps(sorted(tensors)).encode()) if tensors else ""


class _Tensor(BaseModel):
    """What a safetensors header says of one tensor; offsets in bytes, from the end of the header."""

    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


_TENSORS = TypeAdapter(dict[str, _Tensor])


def _safetensors(folder: Path) -> Iterator[tuple[Path, int, dict[str, _Tensor]]]:
    """Every safetensors file, where its data start, and what its header says of each tensor.

    Files that only bear the name, such as the pointers of Git LFS, are left out with a warning: a model
    need not use every file of its folder, and vLLM refuses to load those that it does use.
    """
    for path in sorted(folder.glob("*.safetensors")):
        try:
            yield path, *_header(path)
        except (OSError, ValueError) as error:
            logger.warning("%s is left out of what tells models apart (%s).", path, error)


def _header(path: Path) -> tuple[int, dict[str, _Tensor]]:
    """Where the data of a safetensors file start, and the tensors of its header.

    Raises:
        OSError, ValueError: it cannot be read; it is no complete safetensors file.
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
    if isinstance(header, dict):
        header.pop("__metadata__", None)
    try:
        tensors = _TENSORS.validate_python(header)
    except ValidationError:
        raise ValueError("its header describes no tensors") from None
    for name, tensor in tensors.items():
        first, last = tensor.data_offsets
        if not 0 <= first <= last <= size - start:
            raise ValueError(f"the data of {name} lie beyond its end")
    return start, tensors


#: Families whose attention normalises queries and keys, for models whose weights are not here yet.
QK_NORM_TYPES = ("gemma3", "gemma3_text", "qwen3", "qwen3_moe", "qwen3_next", "olmo2", "olmo3")
QK_NORM_TENSOR = re.compile(r"\b(k_norm|k_layernorm|key_layernorm)\.")


def has_qk_norm(model_config) -> bool:
    """Whether the model normalises its keys: by its tensors' names, or by its family."""
    folder = model_folder(model_config.model, model_config.revision)
    names = [name for _, _, header in _safetensors(folder) for name in header] if folder else []
    if names:
        return any(map(QK_NORM_TENSOR.search, names))
    return model_config.hf_text_config.model_type in QK_NORM_TYPES
