"""Calibration profiles: measurements of `vllm-adamas calibrate` on a model, as versioned JSON.

A server uses two entries per layer and KV head. The mean key is subtracted before keys are coded. The
balance multiplies each key channel by a power of two and divides the same query channel by it: every
q.k keeps its exact value, but coarse codes of the balanced keys estimate it better. Codes depend on
both, so they must be the same for every token of a server. The file is therefore read before the first
token, and its hash travels with the configuration to every worker.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import os
import stat
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_adamas.errors import AdamasError, shortened
from vllm_adamas.identity import ModelIdentity

logger = logging.getLogger("vllm.adamas")
FORMAT = "vllm-adamas-profile"
VERSION = 1

#: Maximum size of a profile: four times that of 128 layers with 128 KV heads of size 256.
MAX_BYTES = 64 * 2**20

#: Most commas in a profile, four times those of such a model. They bound how many values it has, and so the
#: memory that reading it takes: tensors are single strings.
MAX_COMMAS = 2**18

#: Largest exponent of a balance: fp16 keys and queries still have room for such factors.
MAX_EXPONENT = 4


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class LayerProfile(_Part):
    """One attention layer.

    Args:
        key_mean: float16 ``[num_kv_heads, head_size]``, little-endian, base64; after RoPE.
        balance: int8 ``[num_kv_heads, head_size]``, base64: exponents of two, one per key channel.
        key_rms: root of the mean square of key elements, per KV head.
        mean_share: ||mean||^2 over the mean of ||key||^2, per KV head: 0 for centred keys, at most 1.
        mass: attention mass kept, per setting and budget, averaged over query heads; ``oracle`` is
            that of the tokens with the largest weights. Empty for sliding-window layers.
    """

    key_mean: str
    balance: str
    key_rms: list[float]
    mean_share: list[float]
    mass: dict[str, dict[str, float]] = Field(default_factory=dict)


class Suggestion(_Part):
    """Settings from the profile's own tables, which say whether they reach a target share of the oracle's mass.

    Args:
        layer_budgets: of layers that need more or fewer tokens than others.
    """

    wanted_recall: float
    token_budget: int
    num_dense_layers: int
    reached: bool
    layer_budgets: dict[int, int] = Field(default_factory=dict)


class Profile(_Part):
    """A calibration profile (:mod:`vllm_adamas.profile`), measured on ``tokens`` tokens of ``texts``."""

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
        """Balance of some KV heads of a layer, exponents of two, int8 ``[len(heads), head_size]``."""
        raw = bytearray(base64.b64decode(self.layers[layer].balance))
        exponents = torch.frombuffer(raw, dtype=torch.int8)
        return exponents.view(self.model.num_kv_heads, -1)[heads.start : heads.stop]

    def save(self, path: Path) -> None:
        """Writes the file atomically."""
        partial = path.with_name(f"{path.name}.partial")
        partial.write_text(json.dumps(self.model_dump(), indent=1) + "\n")
        partial.replace(path)


def encode_mean(mean: torch.Tensor) -> str:
    """Encodes :attr:`LayerProfile.key_mean`."""
    return base64.b64encode(mean.to(torch.float16).contiguous().numpy().tobytes()).decode()


def encode_balance(exponents: torch.Tensor) -> str:
    """Encodes :attr:`LayerProfile.balance`."""
    return base64.b64encode(exponents.to(torch.int8).contiguous().numpy().tobytes()).decode()


def pin(option: str) -> str:
    """``FILE#sha256=HASH`` for the option ``FILE``: the hash of the bytes that :func:`load` has checked.

    Raises:
        AdamasError: as :func:`load` does.
    """
    path, _, _ = option.partition("#sha256=")
    return f"{path}#sha256={_load(option)[1]}"


def load(option: str) -> Profile:
    """The profile ``FILE`` or ``FILE#sha256=HASH``, read once per process.

    Raises:
        AdamasError: there is no such file, it is not a profile, or its version or hash differs.
    """
    return _load(option)[0]


@cache
def _load(option: str) -> tuple[Profile, str]:
    """The profile and the sha256 of the bytes that it was made from."""
    path, _, wanted = option.partition("#sha256=")
    content = _read(path)
    digest = hashlib.sha256(content).hexdigest()
    if wanted and digest != wanted:
        raise AdamasError(
            f"the profile {path} has changed since this server's configuration was read: profiles are "
            "immutable while a server runs, so restart it."
        )
    try:
        if content.count(b",") > MAX_COMMAS:
            raise ValueError("it has more values than the largest profile")
        try:
            data = json.loads(content)
        except RecursionError:
            raise ValueError("it is nested too deeply") from None
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError("it has no format entry of one")
        if data.get("version") != VERSION:
            raise ValueError(
                f"version {shortened(data.get('version'))}, this release reads {VERSION}"
            )
        profile = Profile.model_validate(data)
        _check_sizes(profile)
    except ValidationError as error:
        first = error.errors()[0]
        where = shortened(".".join(map(str, first["loc"])))
        raise AdamasError(
            f"{path} is not a usable calibration profile ({where}: {first['msg']}): make it again "
            "with `vllm-adamas calibrate`."
        ) from None
    except ValueError as error:
        raise AdamasError(
            f"{path} is not a calibration profile ({error}): make one with `vllm-adamas calibrate`."
        ) from None
    return profile, digest


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


#: Shipped profiles; the option may be the name of one instead of a path.
SHIPPED = Path(__file__).with_name("profiles")


def shipped_names() -> str:
    """Names of the shipped profiles, comma-separated."""
    return ", ".join(sorted(path.stem for path in SHIPPED.glob("*.json")))


def _read(path: str) -> bytes:
    """The bytes of a profile, of one open file and at most ``MAX_BYTES``."""
    shipped, file = SHIPPED / f"{path}.json", Path(path)
    try:
        if shipped.is_file() and shipped.parent == SHIPPED and not file.exists():
            file = shipped
        with open(file, "rb", opener=_open_at_once) as opened:
            if not stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
                problem = "it is no regular file"
            elif len(content := opened.read(MAX_BYTES + 1)) > MAX_BYTES:
                problem = f"it has more than the {MAX_BYTES} bytes of the largest profile"
            else:
                return content
    except OSError as error:
        problem = error.strerror
    except ValueError:
        problem = "its name holds a null character"
    raise AdamasError(
        f"the profile {path} cannot be read ({problem}): give the path of a file that "
        f"`vllm-adamas calibrate` made, or the name of a shipped one ({shipped_names()})."
    )


def _open_at_once(path: str, flags: int) -> int:
    """A pipe is opened too, where ``open`` would wait for a writer."""
    return os.open(path, flags | os.O_NONBLOCK)


def check_fits(profile: Profile, path: str, identity: ModelIdentity) -> None:
    """
    Raises:
        AdamasError: the profile was made for another model; the message names both.
    """
    made_for = profile.model
    for field in ("num_layers", "num_query_heads", "num_kv_heads", "head_size", "rope"):
        theirs, ours = getattr(made_for, field), getattr(identity, field)
        if theirs != ours:
            _refuse(
                path,
                made_for,
                identity,
                f"{field} is {shortened(theirs)} there and {shortened(ours)} here",
            )
    if not identity.fingerprint:  # the weights are not on this host yet: compare names
        if made_for.name != identity.name:
            _refuse(path, made_for, identity, "the names differ and no local files tell more")
    elif made_for.fingerprint != identity.fingerprint:
        _refuse(path, made_for, identity, "the weights or the config.json differ")


def _refuse(path: str, made_for: ModelIdentity, identity: ModelIdentity, why: str) -> None:
    raise AdamasError(
        f"the profile {path} was made for {shortened(made_for.name)} and does not fit {shortened(identity.name)} ({why}): "
        "calibrate this model with `vllm-adamas calibrate`, or remove the option."
    )
