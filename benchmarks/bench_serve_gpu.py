"""TPOT of FLASH_ATTN and ADAMAS as a client measures it under load on a GPU.

The weights are dummies in the shape of Llama-3.1-8B, since the speed of decode does not depend on their
values. Prompts of random tokens are sent cold, for TTFT, and then again. By then their prefixes are cached,
so TPOT and the inter-token latency (ITL) are those of decode steps with every request running. After
`--loads` follows a mixed load: new questions about cached documents, which arrive at a fixed average rate.

`vllm bench serve` then measures `--client-loads`, as a second client.

For these loads both servers share one GPU and take turns. The `--big-loads`, whose KV cache needs a whole
GPU, run before them, on one server after the other, or side by side with one GPU each (`--devices`).

    python benchmarks/bench_serve_gpu.py --tokenizer DIR --devices 0 1
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from bench_serve import MODEL, VOCABULARY, in_turn, one_request, random_prompt
from records import RESULTS, environment, save, spread

from vllm_adamas.config import AdamasConfig
from vllm_adamas.serving.launch import Server
from vllm_adamas.tables import plain

BACKENDS = ("flash_attn", "adamas")
MAX_MODEL_LEN = 131072
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": MAX_MODEL_LEN,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-05,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KV_BYTES = 2 * 2 * 8 * 128 * 32  # a token of LLAMA_8B, all layers
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
MIXED = {"documents": 8, "context": 32000, "question": 500, "requests": 48, "rate": 6.0}
KEYS = ("ttft", "tpot", "itl")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokenizer", default=str(MODEL), help="folder with a small tokenizer")
    parser.add_argument(
        "--loads", nargs="*", default=["1000x64", "32000x1", "32000x8"], help="CONTEXTxREQUESTS"
    )
    parser.add_argument(
        "--big-loads", nargs="*", default=["32000x22", "128000x5"], help="one GPU per server"
    )
    parser.add_argument(
        "--client-loads", nargs="*", default=["32000x8"], help="loads of `vllm bench serve`"
    )
    parser.add_argument("--output-len", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3, help="warm rounds of every load")
    parser.add_argument(
        "--cold", type=int, default=256_000, help="least tokens of cold prompts for each of --loads"
    )
    parser.add_argument("--mixed-rounds", type=int, default=1, help="rounds of the mixed load")
    parser.add_argument("--config", default="{}", help="options of the adamas backend as JSON")
    parser.add_argument("--kv-bytes", default="42G", help="KV cache of servers that share a GPU")
    parser.add_argument(
        "--big-kv-bytes", default="96G", help="KV cache of a server with its own GPU"
    )
    parser.add_argument("--devices", nargs=2, help="one GPU per server of --big-loads, run at once")
    parser.add_argument("--name", default="serve_gpu", help="result file")
    return parser.parse_args()


def make_model(folder: Path, tokenizer: Path) -> Path:
    (folder / "config.json").write_text(json.dumps(LLAMA_8B))
    for name in TOKENIZER_FILES:
        if (tokenizer / name).exists():
            (folder / name).write_bytes((tokenizer / name).read_bytes())
    return folder


def server_arguments(kv_bytes: str) -> list[str]:
    """Arguments of every measured server."""
    args = ["--load-format", "dummy", "--block-size", "64", "--max-num-seqs", "64"]
    args += ["--gpu-memory-utilization", "0.45", "--kv-cache-memory-bytes", kv_bytes]
    return [*args, "--max-model-len", str(MAX_MODEL_LEN)]


def at_once(server: Server, prompts: list[list[int]], tokens: int, waits=None) -> list[dict]:
    waits = waits or [0.0] * len(prompts)
    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(lambda p, w: one_request(server, p, tokens, w), prompts, waits))


@dataclass
class Load:
    """`requests` prompts of `context` tokens sent at once, and samples per backend and key."""

    context: int
    requests: int
    samples: dict = field(default_factory=lambda: {b: {k: [] for k in KEYS} for b in BACKENDS})

    @classmethod
    def parse(cls, text: str) -> Load:
        return cls(*map(int, text.split("x")))

    def prompts(self, turn: int = 0) -> list[list[int]]:
        name = f"{self.context}x{self.requests}/{turn}"  # distinct, so that no load finds another's prompts cached
        return [random_prompt(f"{name}/{i}", self.context) for i in range(self.requests)]

    def measure(
        self,
        servers: dict[str, Server],
        output_len: int,
        cold: int,
        rounds: int,
        apart: bool = False,
    ) -> None:
        """Sends `cold` rounds of new prompts, then the last ones again, `rounds` times.

        Servers take turns. Those that are `apart`, with one GPU each, run cold prompts at once, since these
        take long.
        """
        for turn in range(cold):
            prompts, names = self.prompts(turn), in_turn(servers, turn)
            with ThreadPoolExecutor(len(names) if apart else 1) as pool:
                answers = pool.map(lambda n, p=prompts: at_once(servers[n], p, 1), names)
                for name, results in zip(names, answers, strict=True):
                    self.add(name, results, ("ttft",))
        for turn in range(rounds):
            for name in in_turn(servers, turn):
                self.add(name, at_once(servers[name], prompts, output_len), ("tpot", "itl"))

    def add(self, name: str, results: list[dict], keys: tuple[str, ...]) -> None:
        for key in keys:
            self.samples[name][key] += [one[key] for one in results]
        shown = "  ".join(
            f"{key} {statistics.median(one[key] for one in results):.2f} ms" for key in keys
        )
        print(f"{self.context:>7} x {self.requests:<3} {name:<11} {shown}", flush=True)

    def row(self, config: dict, read_rate: float) -> dict:
        row = {"context": self.context, "concurrency": self.requests}
        for key in KEYS:
            dense, sparse = (spread(self.samples[name][key]) for name in BACKENDS)
            row |= {f"dense_{key}_ms": dense, f"adamas_{key}_ms": sparse}
            row[f"{key}_ratio"] = dense["median"] / sparse["median"]
        dense, sparse = floors(self.context, self.requests, config, read_rate)
        return row | {"floor_ms": {"dense": dense, "adamas": sparse}}


def floors(context: int, rows: int, config: dict, read_rate: float) -> tuple[float, float]:
    """Time in ms to read the data of a decode step, dense and sparse.

    These are the weights, and K and V, or the signatures and the selected K and V.
    """
    m = LLAMA_8B
    kv_width = m["num_key_value_heads"] * m["head_dim"]
    layer = 2 * m["hidden_size"] ** 2 + 2 * m["hidden_size"] * kv_width
    layer += 3 * m["hidden_size"] * m["intermediate_size"]
    layers = m["num_hidden_layers"]
    weights = 2 * (layers * layer + m["vocab_size"] * m["hidden_size"])
    options = AdamasConfig.parse(config).resolved()
    sets = 4 if options.selection == "query_head" else 1
    token = KV_BYTES // layers
    signature = m["num_key_value_heads"] * (m["head_dim"] // 4 + 2)
    dense = weights + rows * layers * token * context
    ours = weights
    for layer in range(layers):
        sparse = signature * context + sets * token * options.budget_of(layer).of(context)
        ours += rows * (token * context if options.is_dense(layer) else sparse)
    return 1e3 * dense / read_rate, 1e3 * ours / read_rate


def measured_read_rate() -> float:
    """Highest rate in bytes per second at which FlashAttention reads K and V in `decode_gpu.json`."""
    cells = json.loads((RESULTS / "decode_gpu.json").read_text())["cells"]
    return 1e9 * max(cell["fa3"]["GBps"] for cell in cells)


def run_bench(server: Server, load: Load, tokens: int) -> dict:
    """Runs `vllm bench serve`, always with the same random prompts; per request in ms: TPOT and median inter-token
    latency."""
    requests = str(load.requests)
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve",
            "--base-url", server.url, "--model", server.model, "--dataset-name", "random",
            "--random-input-len", str(load.context), "--random-output-len", str(tokens),
            "--num-prompts", requests, "--max-concurrency", requests, "--seed", "0", "--ignore-eos",
            "--ready-check-timeout-sec", "0", "--disable-tqdm", "--temperature", "0",
            "--save-result", "--save-detailed", "--result-dir", folder, "--result-filename", "r.json",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(
                f"vllm bench serve failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
            )
        result = json.loads((Path(folder) / "r.json").read_text())
    if result["completed"] != load.requests:
        raise SystemExit(f"only {result['completed']} of {requests} requests completed")
    gaps = [itl for itl in result["itls"] if itl]  # a request of one token has none
    return {
        "tpot": [1e3 * sum(itl) / len(itl) for itl in gaps],
        "itl": [1e3 * statistics.median(itl) for itl in gaps],
    }


def second_client(servers: dict[str, Server], load: Load, output_len: int, rounds: int) -> dict:
    """The load as `vllm bench serve` measures it, with the medians and quartiles of its requests, in ms.

    It makes the same random prompts in every round, so they are cached after the first one, which is not measured.
    """
    samples: dict = {name: {"tpot": [], "itl": []} for name in BACKENDS}
    for turn in range(rounds + 1):
        for name in in_turn(servers, turn):
            tokens = output_len if turn else 1
            one = run_bench(servers[name], load, tokens)
            for key, kept in samples[name].items():
                kept += one[key] if turn else []
    result = {"context": load.context, "concurrency": load.requests, "rounds": rounds}
    result |= {n: {f"{k}_ms": spread(v) for k, v in one.items()} for n, one in samples.items()}
    for key in ("tpot", "itl"):
        dense, sparse = (result[name][f"{key}_ms"]["median"] for name in BACKENDS)
        result[f"{key}_ratio"] = dense / sparse
        shown = f"{key} {dense:.2f} -> {sparse:.2f} ms"
        print(f"vllm bench serve, {load.context} x {load.requests}: {shown}", flush=True)
    return result


def mixed_load(servers: dict[str, Server], output_len: int, rounds: int) -> dict:
    """Sends questions about cached documents, new ones in every round, to both servers in turn.

    Arrivals are a Poisson process, the same for both servers.
    """
    documents = Load(MIXED["context"], MIXED["documents"]).prompts()
    rng, waits = random.Random(0), [0.0]
    while len(waits) < MIXED["requests"]:
        waits.append(waits[-1] + rng.expovariate(MIXED["rate"]))
    for server in servers.values():
        at_once(server, documents, 1)  # cached from here on
    samples: dict = {name: {key: [] for key in (*KEYS, "seconds", "hit_rate")} for name in BACKENDS}
    for turn in range(rounds):
        prompts = [
            documents[i % len(documents)] + random_prompt(f"{turn}/{i}", MIXED["question"])
            for i in range(MIXED["requests"])
        ]
        for name in in_turn(BACKENDS, turn):
            server, kept = servers[name], samples[name]
            before, start = server.metrics(), time.perf_counter()
            results = at_once(server, prompts, output_len, waits)
            kept["seconds"].append(time.perf_counter() - start)
            after = server.metrics()
            hits, queries = (
                after[f"vllm:prefix_cache_{x}_total"] - before[f"vllm:prefix_cache_{x}_total"]
                for x in ("hits", "queries")
            )
            kept["hit_rate"].append(hits / queries)
            for key in KEYS:
                kept[key] += [one[key] for one in results]
            shown = "  ".join(
                f"{key} {statistics.median(one[key] for one in results):.1f} ms" for key in KEYS
            )
            print(f"mixed {name:<11} {shown}  {kept['seconds'][-1]:.1f} s", flush=True)
    result = dict(MIXED, output_len=output_len, rounds=rounds)
    for name, kept in samples.items():
        result[name] = {f"{key}_ms": spread(kept[key]) for key in KEYS}
        result[name] |= {"seconds": kept["seconds"], "prefix_hit_rate": kept["hit_rate"]}
    dense, sparse = (result[name] for name in BACKENDS)
    for key in KEYS:
        result[f"{key}_ratio"] = dense[f"{key}_ms"]["median"] / sparse[f"{key}_ms"]["median"]
    return result


def check_equal(servers: dict[str, Server]) -> dict:
    """Compares greedy tokens of both servers on prompts shorter than the budget."""
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
    total = sum(map(len, dense))
    print(f"below the budget: {equal} of {total} greedy tokens equal", flush=True)
    return {"equal": equal, "of": total}


class Bench:
    """The servers of one benchmark, and the facts that are recorded about them."""

    def __init__(self, args, model: Path):
        self.args, self.model = args, model
        self.facts: dict = {"environment": environment(), "devices": args.devices or ["0", "0"]}
        self.loads: list[Load] = []

    def start(
        self, names: tuple[str, ...], kv_bytes: str, devices: list[str] | None, stack: ExitStack
    ) -> dict[str, Server]:
        extra = server_arguments(kv_bytes)

        def one(name: str) -> Server:
            config = json.loads(self.args.config) if name == "adamas" else None
            env = {}
            if devices:
                env["CUDA_VISIBLE_DEVICES"] = devices[BACKENDS.index(name)]
            return Server(self.model, name, config, extra_args=extra, env=env)

        begin = time.perf_counter()
        with ThreadPoolExecutor() as pool:
            futures = [pool.submit(one, name) for name in names]
        servers = dict(zip(names, (future.result() for future in futures), strict=True))
        for server in servers.values():
            stack.callback(server.stop)
        print(f"{' and '.join(names)}: started in {time.perf_counter() - begin:.0f} s", flush=True)
        for name, server in servers.items():
            tokens = kv_tokens(server.log())
            self.facts.setdefault("kv_cache_tokens", {}).setdefault(kv_bytes, {})[name] = tokens
            at_once(server, [random_prompt("warm up", 2000)] * 2, 8)  # warm up
        return servers

    def run(self) -> dict:
        """Runs every load and updates the file after each, because a run is long and may be interrupted."""
        args = self.args
        big = [Load.parse(x) for x in args.big_loads]
        turns = [BACKENDS] if args.devices else [(name,) for name in BACKENDS]
        for names in turns if big else ():
            with ExitStack() as stack:
                servers = self.start(names, args.big_kv_bytes, args.devices, stack)
                for load in big:
                    load.measure(servers, args.output_len, 1, args.rounds, apart=True)
                    self.keep(load)
        if args.loads or args.client_loads or args.mixed_rounds:
            self.run_on_one_gpu([Load.parse(x) for x in args.loads])
        return self.result()

    def run_on_one_gpu(self, loads: list[Load]) -> None:
        """Measures both servers in turn on one GPU."""
        args = self.args
        with ExitStack() as stack:
            one_gpu = args.devices and args.devices[:1] * 2
            servers = self.start(BACKENDS, args.kv_bytes, one_gpu, stack)
            log = servers["adamas"].log().splitlines()
            line = next(x for x in log if "Using ADAMAS" in x)
            self.facts["adamas"] = line.partition("backend: ")[2]
            self.facts["below_budget"] = check_equal(servers)
            for load in loads:
                cold = -(-args.cold // (load.context * load.requests))
                load.measure(servers, args.output_len, cold, args.rounds)
                self.keep(load)
            for load in map(Load.parse, args.client_loads):
                found = second_client(servers, load, args.output_len, args.rounds)
                self.facts.setdefault("second_client", []).append(found)
                save(args.name, self.result())
            if args.mixed_rounds:
                self.facts["mixed"] = mixed_load(servers, args.output_len // 2, args.mixed_rounds)
                save(args.name, self.result())
            metrics = servers["adamas"].metrics()
            self.facts["adamas_counters"] = {
                k: v for k, v in metrics.items() if k.startswith("vllm_adamas")
            }

    def keep(self, load: Load) -> None:
        if load not in self.loads:
            self.loads.append(load)
        save(self.args.name, self.result())

    def result(self) -> dict:
        rate, config = measured_read_rate(), json.loads(self.args.config)
        measured = [x for x in self.loads if all(x.samples[b]["itl"] for b in BACKENDS)]
        measured.sort(key=lambda load: (load.context, load.requests))
        rows = [load.row(config, rate) for load in measured]
        return {**self.facts, "output_len": self.args.output_len, "read_rate": rate, "rows": rows}


def kv_tokens(log: str) -> int:
    """Tokens in the KV cache, from vLLM's line 'GPU KV cache size: N tokens'."""
    line = next(x for x in log.splitlines() if "KV cache size:" in x)
    return int(line.partition("KV cache size:")[2].split()[0].replace(",", ""))


def table(rows: list[dict]) -> str:
    """Medians, their ratios, and the times that reading alone would take."""
    headers = ["context", "requests", "dense TPOT ms", "adamas TPOT ms", "ratio", "ITL ratio"]
    return plain(
        [*headers, "TTFT ratio", "dense floor ms", "adamas floor ms"],
        [
            [
                row["context"],
                row["concurrency"],
                *(f"{row[f'{name}_tpot_ms']['median']:.2f}" for name in ("dense", "adamas")),
                f"{row['tpot_ratio']:.2f}",
                f"{row['itl_ratio']:.2f}",
                f"{row['ttft_ratio']:.3f}",
                *(f"{row['floor_ms'][name]:.2f}" for name in ("dense", "adamas")),
            ]
            for row in rows
        ],
    )


def main():
    args = parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder), Path(args.tokenizer))
        result = Bench(args, model).run()
    print(table(result["rows"]))
    print("wrote", save(args.name, result))


if __name__ == "__main__":
    main()
