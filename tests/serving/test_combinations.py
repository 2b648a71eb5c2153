"""Random combinations of options and vLLM's arguments: each is a configuration, or ends in one sentence.

No engine starts, and a combination takes milliseconds.
"""

from __future__ import annotations

import os
import traceback
from collections import Counter
from random import Random
from typing import Any

from common import MODEL, ROOT, is_one_sentence
from pydantic import ValidationError

from vllm_adamas.errors import AdamasError
from vllm_adamas.serving import checks
from vllm_adamas.serving.plugin import register

Values = dict[
    str, tuple[list[Any], list[Any]]
]  #: of each name: what can be served, and what cannot

OPTIONS: Values = {
    "score": (["dot", "manhattan"], ["cosine"]),
    "token_budget": ([64, 256, 1 << 30, 0.05, 1.0], [1, 0, -3, 1.5, "64", None]),
    "min_token_budget": ([16, 64, 1 << 30], [1, 0]),
    "max_token_budget": ([None, 1 << 30], [0, 1, True, "64"]),
    "selection": (["kv_head", "query_head"], ["head"]),
    "combine": (["sum", None], ["max", "mean"]),
    "num_dense_layers": ([0, 1, 30, 65536, None], [-1]),
    "layer_budgets": (
        [{}, {"0": 64}, {"3": 0.5}, {"29": 2048}],
        [{"30": 64}, {"a": 1}, {"3": 0}, {"1": 1 << 31}, [0]],
    ),
    "num_sink_tokens": ([0, 4], [64, -1]),
    "recent_window": ([0, 32], [256, 1 << 30]),
    "min_context": ([0, 4096], [-5]),
    "thresholds": (["rms", "paper", 0.5], [0, "lloyd"]),
    "profile": ([None, "SmolLM2-135M-Instruct"], ["/no/file.json", "no-such-name", "", "/", 3]),
    "kernels": (["auto", "cpu", "reference"], ["cuda", "triton", "A-100"]),
    "log_interval": ([0, 60, 0.5], [-1]),
    "metrics": ([True, False], ["yes"]),
    "audit_interval": ([None, 0, 1, 64], [-1]),
    "audit_threshold": ([0.3, 1.0], [0]),
    "budget": ([], [64]),
}


def _connector(name: str, **options) -> dict[str, Any]:
    named = {"kv_connector": name, "kv_role": "kv_both"}
    return {**named, "kv_connector_extra_config": options}


_WINDOWS = {"layer_types": ["sliding_attention", "full_attention"] * 15, "sliding_window": 256}
ARGUMENTS: Values = {  # some of the second are vLLM's to refuse
    "block_size": ([32, 64, 128, 256], [16, 48, 1, 0, -64]),
    "kv_cache_dtype": (["auto", "bfloat16"], ["float16", "fp8", "int8_per_token_head"]),
    "dtype": (["auto", "bfloat16", "float16", "float32"], ["float64"]),
    "max_model_len": ([64, 2048, 8192, 1, -1], [1 << 20, 0]),
    "max_num_seqs": ([1, 8, 256], [4096, 0]),
    "max_num_batched_tokens": ([2048, 8192], [64, 1, 0]),
    "enable_prefix_caching": ([True, False], []),
    "enable_chunked_prefill": ([True, False], []),
    "enforce_eager": ([True, False], []),
    "async_scheduling": ([True, False], []),
    "tensor_parallel_size": ([1, 3], [2, 9]),
    "pipeline_parallel_size": ([1, 2], []),
    "data_parallel_size": ([1, 2], []),
    "decode_context_parallel_size": ([1], [2]),
    "prefill_context_parallel_size": ([1], [2]),
    "enable_dbo": ([False, True], []),
    "ubatch_size": ([0], [2]),
    "disable_hybrid_kv_cache_manager": ([False, True], []),
    "disable_sliding_window": ([False, True], []),
    "kv_sharing_fast_prefill": ([False], [True]),
    "kv_offloading_size": ([None], [1.0]),
    "num_gpu_blocks_override": ([None, 64], [0]),
    "scheduling_policy": (["fcfs", "priority"], ["lifo"]),
    "speculative_config": ([None], [{"method": "ngram", "num_speculative_tokens": 2}]),
    "kv_transfer_config": (
        [None],
        [
            *map(_connector, ("ExampleConnector", "OffloadingConnector", "NoSuchConnector")),
            _connector("OffloadingConnector", spec_name="TieringOffloadingSpec", secondary_tiers=1),
        ],
    ),
    "attention_config": ([{}], [{"use_non_causal": True}]),
    "compilation_config": ([{"mode": 0}, {"cudagraph_capture_sizes": [1, 8]}], []),
    "runner": (["auto", "generate"], ["pooling"]),
    "enable_lora": ([False, True], []),
    "hf_overrides": (
        [
            {"layer_types": []},
            {"attn_config": None},
            {"attn_config": ["x"]},
            {"attention_chunk_size": 8192},
            _WINDOWS,
        ],
        [
            {"head_dim": 80},
            {"num_key_value_heads": 0},
            {"num_key_value_heads": -3},
            {"num_attention_heads": 0},
            {"num_hidden_layers": 0},
            {"layer_types": "full_attention"},
            {"layer_types": [["sliding_attention"]] * 30},
            {"layer_types": 30},
            {"attention_chunk_size": 8200},
            {"attn_logit_softcapping": 50.0},
            {"v_head_dim": 32},
            {"alibi": True},
            {"attn_config": {"alibi": True}},
            {"is_causal": False},
            {"rope_parameters": None},
            {"rope_parameters": []},
        ],
    ),
}
PLACES: list[Any] = [None, {}, {"other": 1}, {"token_budget": 64}, {"adams": {}}, {"adamas": [1]}]
ROUNDS, SEED = 500, 0


def drawn(rng: Random, table: Values, most: int) -> dict[str, Any]:
    """Values of up to ``most`` names, of which one in ten cannot be served."""
    found = {}
    for name in rng.sample(sorted(table), rng.randint(0, most)):
        right, wrong = table[name]
        found[name] = rng.choice(wrong if wrong and (not right or rng.random() < 0.1) else right)
    return found


def combination(rng: Random) -> dict[str, Any]:
    arguments = drawn(rng, ARGUMENTS, 6)
    options = {"adamas": drawn(rng, OPTIONS, 4)}
    arguments["additional_config"] = rng.choice(PLACES) if rng.random() < 0.05 else options
    return {name: value for name, value in arguments.items() if value is not None}


def is_ours(error: BaseException) -> bool:
    """Whether an error was raised while the package's own code ran."""
    frames = traceback.extract_tb(error.__traceback__)
    return any(frame.filename.startswith(str(ROOT / "serving")) for frame in frames)


def outcome(arguments: dict[str, Any]) -> str:
    """``passes``, ``refused`` in a sentence, or ``vLLM`` if it is vLLM that refuses.

    Raises:
        Exception: anything else is a mistake of the package.
    """
    from vllm.engine.arg_utils import EngineArgs

    attention = {"backend": "ADAMAS", **arguments.get("attention_config", {})}
    args = {**arguments, "model": str(MODEL), "attention_config": attention}
    try:
        config = EngineArgs(**args).create_engine_config()
    except AdamasError as error:
        assert is_one_sentence(str(error)), error
        assert ": " in str(error), f"no way out: {error}"
        return "refused"
    except ValidationError as error:  # of pydantic, which also wraps what a check of a field raises
        causes = [one.get("ctx", {}).get("error") for one in error.errors()]
        if any(cause is not None and is_ours(cause) for cause in causes):
            raise
        return "vLLM"
    except Exception as error:  # of vLLM before it asks the backend
        if is_ours(error):
            raise
        return "vLLM"
    assert checks.check_config(config) == checks.read_config(config)
    return "passes"


def test_any_combination_is_a_configuration_or_one_sentence(monkeypatch) -> None:
    register()
    monkeypatch.setattr(os, "environ", os.environ.copy())  # vLLM sets variables
    rng, found, mistakes = Random(SEED), Counter(), []
    for _ in range(ROUNDS):
        arguments = combination(rng)
        try:
            found[outcome(arguments)] += 1
        except Exception as error:
            mistakes.append(f"{arguments}: {type(error).__name__}: {error}")
    assert not mistakes, "\n".join(mistakes)
    assert min(found[kind] for kind in ("passes", "refused", "vLLM")) > ROUNDS // 50, found
