"""Storms over servers of many configurations: traffic like that of ordinary clients, with answers checked.

On GPUs eight servers run side by side; they cover all pairs of values of six properties. A stock server
scores those whose budget is above every context, and the others are replayed. A second stock server runs
through the same storm: its distances are those of rounding and batching alone. On a CPU three servers run
one after another. The exit status is 0 if all is well.

    python benchmarks/storm.py --minutes 20
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from bench_serve import MODEL
from records import environment, save

from vllm_adamas.serving.launch import Server
from vllm_adamas.serving.storm.traffic import WEIGHTS

CONTEXT = 131072  #: longest context of GPU servers in tokens; the model was trained with 8192
BLOCK_TOKENS = CONTEXT + 4096  #: tokens in a GPU server's KV cache, so few that bursts preempt
GPU_SERVER = [
    *f"--max-model-len {CONTEXT} --gpu-memory-utilization 0.08 --kv-cache-memory-bytes 4G "
    "--cudagraph-capture-sizes 1 2 4 8 16 32 --hf-overrides".split(),
    json.dumps({"max_position_embeddings": CONTEXT}),
]
GPU_STORM = "--concurrency 24 --max-prompt 1536 --max-tokens 64 --burst 160 --distance 0.5"
#: Rounding can move K and V by a step of fp8, and positions far beyond its training make the model unstable.
WIDE = " --distance 1"
SHORT = ",".join(kind for kind in WEIGHTS if kind != "longest")
CPU_SERVER = "--max-model-len 2048 --max-num-seqs 16 --num-gpu-blocks-override {blocks}"


@dataclass
class Configuration:
    """A server and its storm.

    Args:
        scored: whether the stock server scores it; otherwise it is replayed.
    """

    args: list[str]
    storm: str
    backend: str = "adamas"
    options: dict = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    scored: bool = False

    def start(self, model: str) -> Server:
        options = self.options if self.backend == "adamas" else None
        return Server(model, self.backend, options, self.args, self.env)


def gpu_configurations(swap: bool) -> dict[str, Configuration]:
    """An orthogonal array: each pair of values of two properties occurs twice.

    Args:
        swap: gives the budget above the contexts to the other four servers.
    """
    found = {}
    for a, b, c in itertools.product((0, 1), repeat=3):
        v1, eager, triton, small, fp8, above = a, b, c, a ^ b, a ^ c, b ^ c ^ swap
        block = 16 if small else 64
        names = (
            "v1" if v1 else "v2",
            "eager" if eager else "graphs",
            "triton" if triton else "cuda",
        )
        names += (f"block {block}", "fp8" if fp8 else "bf16", "dense" if above else "sparse")
        args = [*GPU_SERVER, "--block-size", str(block)]
        args += ["--num-gpu-blocks-override", str(BLOCK_TOKENS // block)]
        args += ["--enforce-eager"] * eager + ["--kv-cache-dtype", "fp8"] * fp8
        options: dict = {"kernels": "triton" if triton else "cuda"}
        if above:
            options["token_budget"] = 1_000_000
        found[", ".join(names)] = Configuration(
            args,
            # The longest context takes a second of a whole GPU, so only one server gets it.
            f"{GPU_STORM} --block-size {block}"
            + WIDE * bool(fp8 or not found)
            + f" --kinds {SHORT}" * bool(found),
            options=options,
            env={"VLLM_USE_V2_MODEL_RUNNER": "0"} if v1 else {},
            # The stock server has K and V in bf16.
            scored=bool(above and not fp8),
        )
    return found


def stock_configuration() -> Configuration:
    """vLLM's own backend under the same traffic."""
    blocks = ["--block-size", "16", "--num-gpu-blocks-override", str(BLOCK_TOKENS // 16)]
    return Configuration([*GPU_SERVER, *blocks], f"{GPU_STORM} --kinds {SHORT}", "flash_attn")


def cpu_configurations() -> dict[str, Configuration]:
    """A server with usual settings, one in float32, where distances are exact, and a stock server."""
    storm = "--max-prompt 400 --max-tokens 24"
    usual = [*CPU_SERVER.format(blocks=64).split(), "--block-size", "64"]
    exact = [*CPU_SERVER.format(blocks=96).split(), "--dtype", "float32", "--block-size", "32"]
    return {
        "bf16": Configuration(usual, f"{storm} --block-size 64"),
        "float32": Configuration(
            [*exact, "--enforce-eager"],
            f"{storm} --block-size 32 --distance 0.01",
            options={"token_budget": 128},
        ),
        "stock": Configuration(usual, f"{storm} --block-size 64", "cpu_attn"),
    }


def gpus() -> list[str]:
    """The GPUs by their names in CUDA_VISIBLE_DEVICES."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named:
        return named.split(",")
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True)
    return [str(number) for number, _ in enumerate(listed.stdout.splitlines())]


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "gpu"), help="default: gpu if there is one")
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--minutes", type=float, default=20.0, help="minutes of traffic")
    parser.add_argument("--only", help="run configurations whose name contains this")
    parser.add_argument("--swap", action="store_true", help="GPU: exchange sparse and dense")
    parser.add_argument("--check", type=int, default=200, help="answers to check per server")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", help="result file; default: storm_cpu or storm_gpu")
    return parser.parse_args()


def run_storm(
    name: str,
    configuration: Configuration,
    server: Server,
    oracle: str | None,
    seconds: float,
    args,
) -> dict:
    """Runs a storm and returns its record; progress goes to stderr, prefixed with the configuration."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "storm.json"
        command = [sys.executable, "-m", "vllm_adamas.cli", "storm", server.url]
        command += f"--seconds {seconds:g} --check {args.check} --seed {args.seed}".split()
        command += ["--pid", str(server.pid), "--json", str(file), *configuration.storm.split()]
        if oracle is not None:
            command += ["--oracle", oracle]
        process = subprocess.Popen(
            command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for line in process.stderr:
            print(f"{name}: {line}", end="", file=sys.stderr, flush=True)
        print(f"{name}:\n{process.stdout.read()}", flush=True)
        process.wait()
        if not file.exists():
            return {"ok": False, "problems": [f"the storm ended with status {process.returncode}"]}
        return json.loads(file.read_text())


class Storms:
    """Runs configurations and updates the result file after each, because a run may be interrupted."""

    def __init__(self, args, device: str):
        self.args, self.name = args, args.name or f"storm_{device}"
        self.result = {
            "environment": environment(),
            "model": Path(args.model).name,
            "seed": args.seed,
            "minutes": args.minutes,
            "configurations": {},
        }

    def one(
        self,
        name: str,
        configuration: Configuration,
        seconds: float,
        oracle: Future[Server] | None = None,
    ) -> None:
        begin = time.monotonic()
        try:
            with configuration.start(self.args.model) as server:
                print(f"{name}: started in {time.monotonic() - begin:.0f} s", flush=True)
                line = next((x for x in server.log().splitlines() if "Using ADAMAS" in x), "")
                url = oracle.result().url if oracle else None
                record = run_storm(name, configuration, server, url, seconds, self.args)
                if not record["ok"]:
                    print(f"{name}: the end of the server's log\n{server.log_tail()}", flush=True)
        except RuntimeError as error:  # it did not start
            line, record = "", {"ok": False, "problems": [str(error)]}
            print(f"{name}: {error}", flush=True)
        for place in ("url", "oracle", "model"):  # they belong to this host
            record.pop(place, None)
        for check in record.get("checks", {}).values():
            for wrong in check["first_wrong"]:
                wrong["prompt"] = wrong["prompt"][-64:]  # seed and unit reproduce the rest
        self.result["configurations"][name] = {
            "server": configuration.args,
            "env": configuration.env,
            "adamas": line.partition("backend: ")[2],
            **record,
        }
        save(self.name, self.result)

    def in_turn(self, configurations: dict[str, Configuration]) -> None:
        for name, configuration in configurations.items():
            self.one(name, configuration, 60 * self.args.minutes / len(configurations))

    def side_by_side(self, configurations: dict[str, Configuration], stock: Configuration) -> None:
        """Runs all servers at once, assigned to the GPUs in turn; the stock server, if needed, ends last."""
        seconds, model = 60 * self.args.minutes, self.args.model
        for gpu, one in zip(itertools.cycle(gpus()), [stock, *configurations.values()]):
            one.env["CUDA_VISIBLE_DEVICES"] = gpu
        with ThreadPoolExecutor(len(configurations) + 1) as pool:
            needed = any(one.scored for one in configurations.values())
            oracle = pool.submit(stock.start, model) if needed else None
            done = [
                pool.submit(self.one, name, one, seconds, oracle if one.scored else None)
                for name, one in configurations.items()
            ]
            wait(done)
            if oracle and not oracle.exception():
                oracle.result().stop()
            for one in done:
                one.result()


def main() -> int:
    args = parse_args()
    device = args.device or ("gpu" if os.path.exists("/proc/driver/nvidia/version") else "cpu")
    if device == "gpu":
        found = {**gpu_configurations(args.swap), "stock": stock_configuration()}
    else:
        found = cpu_configurations()
    chosen = {name: one for name, one in found.items() if (args.only or "") in name}
    storms = Storms(args, device)
    if device == "gpu":
        storms.side_by_side(chosen, Configuration(GPU_SERVER, "", "flash_attn"))
    else:
        storms.in_turn(chosen)
    records = storms.result["configurations"]
    bad = [name for name, record in records.items() if not record["ok"]]
    print(f"{len(records) - len(bad)} of {len(records)} storms found nothing", *bad, sep="\n")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
