"""The answers of engines that are built one after another in one process, which is faster than servers.

    python engines.py < jobs > answers

Jobs are JSON: ``[[model folder, arguments of vllm.LLM], ...]``. For each, the tokens that follow each of
:func:`prompts`, asked for one after another and then all at once.
"""

import gc
import json
import os
import sys
from random import Random

COMMON = {
    "attention_backend": "adamas",
    "additional_config": {"adamas": {"token_budget": 128, "num_dense_layers": 1}},
    "dtype": "float32",
    "enforce_eager": True,
    "block_size": 64,
    "max_model_len": 2048,
    "max_num_batched_tokens": 2048,
    "max_num_seqs": 8,
}
TOKENS = 16


def prompts() -> list[list[int]]:
    """Token ids: within the budget, beyond it, and the start of one followed by others."""
    rng = Random(0)
    ids = [rng.randrange(100, 40000) for _ in range(1000)]
    return [ids[:5], ids[:100], ids[:300], ids[:700], ids[:640] + ids[800:950]]


def answers(model: str, arguments: dict) -> list[list[int]]:
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(model=model, skip_tokenizer_init=True, **{**COMMON, **arguments})
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
    requests = [{"prompt_token_ids": ids} for ids in prompts()]
    outputs = [llm.generate(request, sampling, use_tqdm=False)[0] for request in requests]
    outputs += llm.generate(requests, sampling, use_tqdm=False)
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    return [list(output.outputs[0].token_ids) for output in outputs]


if __name__ == "__main__":
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM logs to standard output
    json.dump([answers(*job) for job in json.load(sys.stdin)], out)
