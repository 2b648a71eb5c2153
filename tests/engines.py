"""The answers of engines that are built one after another in one process, which is faster than servers.

    python engines.py < jobs > answers

Jobs are JSON: ``[[model folder, arguments of vllm.LLM], ...]``. An answer holds the ``tokens`` that follow
each of :func:`prompts`, asked for one after another and then all at once, and the numbers of ``drafted``
and ``accepted`` tokens of speculative decoding.
"""

import gc
import json
import os
import subprocess
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
    "disable_log_stats": False,
}
TOKENS = 16


def prompts() -> list[list[int]]:
    """Token ids: within the budget, beyond it, and the start of one followed by others."""
    rng = Random(0)
    ids = [rng.randrange(100, 40000) for _ in range(1000)]
    return [ids[:5], ids[:100], ids[:300], ids[:700], ids[:640] + ids[800:950]]


def ask(jobs: list) -> list[dict]:
    """The answers to jobs, from a process of their own."""
    done = subprocess.run(
        [sys.executable, __file__], input=json.dumps(jobs), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def answer(model: str, arguments: dict) -> dict:
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(model=model, skip_tokenizer_init=True, **{**COMMON, **arguments})
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
    requests = [{"prompt_token_ids": ids} for ids in prompts()]
    outputs = [llm.generate(request, sampling, use_tqdm=False)[0] for request in requests]
    outputs += llm.generate(requests, sampling, use_tqdm=False)
    values = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    return {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "drafted": values.get("vllm:spec_decode_num_draft_tokens", 0),
        "accepted": values.get("vllm:spec_decode_num_accepted_tokens", 0),
    }


if __name__ == "__main__":
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM logs to standard output
    json.dump([answer(*job) for job in json.load(sys.stdin)], out)
