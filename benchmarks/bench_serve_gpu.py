"""TPOT of FLASH_ATTN and ADAMAS on one GPU under load, both servers alive and taking turns.

Dummy weights in the shape of Llama-3.1-8B: the speed of decode does not depend on their values. TPOT
of a request includes the prefill of those that arrive after it; the median inter-token latency (ITL)
is a decode step. The script first checks that both servers give the same greedy tokens below the token budget.

    python benchmarks/bench_serve_gpu.py --tokenizer DIR --loads 8000x32 32000x8
"""

from __future__ import annotations

import argparse
import json
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from bench_serve import MODEL, run_bench
from common import gpu_hardware, save, spread

from vllm_adamas.serving.launch import Server

BACKENDS = ("flash_attn", "adamas")
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 49152,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-05,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokenizer", default=str(MODEL), help="folder with a small tokenizer")
    parser.add_argument("--loads", nargs="+", default=["32000x8"])
    parser.add_argument("--output-len", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--config", default="{}", help="options of the adamas backend, JSON")
    parser.add_argument(
        "--kv-bytes",
        default="42G",
        help="KV cache of each server; equal, so that capacities compare",
    )
    parser.add_argument("--name", default="serve_gpu", help="result file")
    return parser.parse_args()


def make_model(folder: Path, tokenizer: Path) -> Path:
    (folder / "config.json").write_text(json.dumps(LLAMA_8B))
    for name in TOKENIZER_FILES:
        if (tokenizer / name).exists():
            (folder / name).write_bytes((tokenizer / name).read_bytes())
    return folder


def check_equal(servers: dict[str, Server]) -> int:
    """Greedy tokens of both servers on prompts shorter than the budget; returns how many agreed."""
    prompts = [f"Tell me about the number {n}." for n in range(4)]
    answers = {}
    for name, server in servers.items():
        body = {"max_tokens": 32, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        answers[name] = [
            server.post("/v1/completions", {**body, "prompt": prompt})["choices"][0]["token_ids"]
            for prompt in prompts
        ]
    dense, sparse = (answers[name] for name in BACKENDS)
    equal = sum(
        a == b for x, y in zip(dense, sparse, strict=True) for a, b in zip(x, y, strict=True)
    )
    print(f"below the budget: {equal} of {sum(map(len, dense))} greedy tokens equal")
    return equal


def measure(servers: dict[str, Server], load: str, args) -> dict:
    context, requests = map(int, load.split("x"))
    samples = {name: {"tpot": [], "itl": [], "ttft": []} for name in BACKENDS}
    for seed in range(args.rounds):
        for name in BACKENDS if seed % 2 == 0 else BACKENDS[::-1]:
            one = run_bench(
                servers[name], context, args.output_len, requests, seed, concurrency=requests
            )
            for key, values in one.items():
                samples[name][key] += values
    row = {"context": context, "concurrency": requests}
    for key in ("tpot", "itl", "ttft"):
        dense, sparse = (spread(samples[name][key]) for name in BACKENDS)
        row |= {f"dense_{key}_ms": dense, f"adamas_{key}_ms": sparse}
        row[f"{key}_ratio"] = dense["median"] / sparse["median"]
    print(
        f"{load:>12}  TPOT {row['dense_tpot_ms']['median']:.2f} -> {row['adamas_tpot_ms']['median']:.2f} ms, "
        f"{row['tpot_ratio']:.2f}x; ITL {row['itl_ratio']:.2f}x; TTFT {row['ttft_ratio']:.3f}x",
        flush=True,
    )
    return row


def main():
    args = parse_args()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        model = make_model(Path(folder), Path(args.tokenizer))
        extra = ["--load-format", "dummy", "--no-enable-prefix-caching", "--block-size", "64"]
        extra += ["--gpu-memory-utilization", "0.45", "--kv-cache-memory-bytes", args.kv_bytes]
        extra += ["--max-model-len", "131072"]

        def start(name: str) -> Server:
            config = json.loads(args.config) if name == "adamas" else None
            return Server(model, name, config, extra_args=extra)

        with ThreadPoolExecutor() as pool:
            servers = dict(zip(BACKENDS, pool.map(start, BACKENDS), strict=True))
        for server in servers.values():
            stack.callback(server.stop)
        lines = servers["adamas"].log().splitlines()
        capacity = {name: kv_tokens(server.log()) for name, server in servers.items()}
        print("KV cache tokens:", capacity)
        result = {
            "hardware": gpu_hardware(),
            "adamas": next(x for x in lines if "Using ADAMAS" in x).partition("backend: ")[2],
            "kv_cache_tokens": capacity,
            "equal_tokens_below_budget": check_equal(servers),
            "rows": [measure(servers, load, args) for load in args.loads],
            "adamas_counters": {
                k: v for k, v in servers["adamas"].metrics().items() if k.startswith("vllm_adamas")
            },
        }
    print(json.dumps(result["adamas_counters"]))
    print("wrote", save(args.name, result))


def kv_tokens(log: str) -> int:
    """From vLLM's line 'GPU KV cache size: N tokens'."""
    line = next(x for x in log.splitlines() if "KV cache size:" in x)
    return int(line.partition("KV cache size:")[2].split()[0].replace(",", ""))


if __name__ == "__main__":
    main()
