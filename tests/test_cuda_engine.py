"""Real servers with a real model on a Hopper GPU: CUDA graphs, both model runners, memory.

All servers start at once and stay up; each takes 2 GiB of KV cache. They compute in float16, whose
rounding seldom decides between two tokens. Where steps are cut in another way, rounding of K moves
codes as well; there logits are compared up to the first token that rounding can decide.
"""

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from common import MODEL, is_one_sentence
from test_serve import (
    BUDGET,
    LONG_PROMPTS,
    PASS_KEY,
    QUERY_HEADS,
    SHORT_PROMPTS,
    SPARSE_LAYERS,
    answers,
    ask_pass_key,
    chat,
    complete,
    harbour_log,
    together,
    token_ids,
)

from vllm_adamas.serving.launch import Server
from vllm_adamas.serving.metrics import NAMES, SelectionStats

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs a Hopper GPU",
    ),
    pytest.mark.timeout(400),
]

COMMON = (
    "--dtype float16 --block-size 64 --max-model-len 8192 --max-num-seqs 16 "
    "--cudagraph-capture-sizes 1 2 4 8 16 --gpu-memory-utilization 0.1 --kv-cache-memory-bytes 2G "
)
SPARSE = {"token_budget": BUDGET}
V1_RUNNER = {"VLLM_USE_V2_MODEL_RUNNER": "0"}
SPECS = {  # backend, its options, further arguments, environment
    "stock": ("flash_attn", None, "", {}),
    "dense": ("adamas", {"token_budget": 1_000_000}, "", {}),
    "sparse": ("adamas", SPARSE, "", {}),  # FULL graphs for decode, PIECEWISE ones for the rest
    "piecewise": ("adamas", SPARSE, "-cc.cudagraph_mode=PIECEWISE", {}),
    "no graphs": ("adamas", SPARSE, "-cc.cudagraph_mode=NONE", {}),
    "v1 runner": ("adamas", SPARSE, "", V1_RUNNER),
    "v1 runner, no graphs": ("adamas", SPARSE, "-cc.cudagraph_mode=NONE", V1_RUNNER),
    "chunked": (
        "adamas",
        SPARSE,
        "--max-num-batched-tokens 512 --no-enable-prefix-caching --no-async-scheduling",
        {},
    ),
}
REFUSED = {"--kv-cache-dtype fp8": "--kv-cache-dtype fp8", "--dtype float32": "torch.float32"}

PROMPTS = (*SHORT_PROMPTS, *LONG_PROMPTS, harbour_log(180))  # up to 4,400 tokens
ROUNDING = 0.1  #: by how much rounding may move a log probability


def start(name: str, log) -> Server:
    backend, options, args, env = SPECS[name]
    extra = (COMMON + args).split()
    return Server(MODEL, backend, options, extra, env=env, log_path=log, timeout=300)


def refuse(args: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(MODEL)]
    command += ["--attention-backend", "adamas", *args.split()]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """Every server of SPECS, and what the refused commands printed."""
    logs = tmp_path_factory.mktemp("servers")
    with ThreadPoolExecutor(len(SPECS) + len(REFUSED)) as pool:
        starts = {name: pool.submit(start, name, logs / name) for name in SPECS}
        refused = {args: pool.submit(refuse, args) for args in REFUSED}
    failures = [future.exception() for future in starts.values() if future.exception()]
    servers = {name: f.result() for name, f in starts.items() if not f.exception()}
    try:
        if failures:
            raise failures[0]
        yield SimpleNamespace(servers=servers, refused={a: f.result() for a, f in refused.items()})
    finally:
        with ThreadPoolExecutor() as pool:
            list(pool.map(Server.stop, servers.values()))


@pytest.fixture(scope="module")
def base(host) -> list[list[str]]:
    return answers(host.servers["sparse"], PROMPTS)


def counters(server: Server) -> tuple[int, ...]:
    """The exported counters once they hold everything so far: copies are a second apart, and each
    step brings the copy that the step before it began. A prompt of several tokens with one token of
    output is prefill alone, and counts nothing."""
    for _ in range(2):
        time.sleep(1.1 * SelectionStats.COPY_INTERVAL)
        complete(server, "Good evening to all of you", 1)
    now = server.metrics()
    return tuple(int(now[f"vllm_adamas_{name}_total"]) for name, _ in NAMES)


def moved(server: Server, call) -> tuple[int, ...]:
    before = counters(server)
    call()
    return tuple(b - a for a, b in zip(before, counters(server), strict=True))


def steps_of(server: Server, prompts) -> list[dict]:
    return [complete(server, prompt, logprobs=2)["logprobs"] for prompt in prompts]


def assert_same_up_to_rounding(expected: list[dict], actual: list[dict]) -> None:
    """Log probabilities agree, and tokens do until two of them are as good as equal."""
    compared = total = 0
    for one, other in zip(expected, actual, strict=True):
        total += len(one["tokens"])
        for i, (a, b) in enumerate(zip(one["tokens"], other["tokens"], strict=True)):
            best = sorted(one["top_logprobs"][i].values())[-2:]
            if a != b:
                assert best[1] - best[0] < 2 * ROUNDING, (i, a, b, best)
                break
            assert abs(one["token_logprobs"][i] - other["token_logprobs"][i]) < ROUNDING, (i, a)
            compared += 1
    assert compared > 0.8 * total, f"only {compared} of {total} tokens were comparable"


@pytest.mark.parametrize("args", REFUSED)
def test_refusals_end_the_command(host, args: str) -> None:
    done = host.refused[args]
    assert done.returncode not in (0, None)
    sentences = [line for line in done.stderr.splitlines() if line.startswith("vllm-adamas: ")]
    assert len(sentences) == 1, done.stderr[-3000:]
    assert is_one_sentence(sentences[0].removeprefix("vllm-adamas: "))
    assert REFUSED[args] in sentences[0]
    assert "Traceback" not in done.stderr
    assert "EngineCore" not in done.stdout + done.stderr


def test_a_budget_beyond_the_context_gives_stock_tokens(host) -> None:
    stock, dense = host.servers["stock"], host.servers["dense"]
    assert "Using ADAMAS" in dense.log()
    assert "Using ADAMAS" not in stock.log()
    assert answers(dense, PROMPTS) == answers(stock, PROMPTS)
    sparse_rows, dense_rows, context, attended = counters(dense)
    assert (sparse_rows, attended) == (0, context)
    assert dense_rows > 0


def test_the_counters_say_that_decode_was_sparse(host) -> None:
    server, tokens = host.servers["sparse"], 20
    prompt = token_ids(server, harbour_log(60, seed=5), 1000)
    steps = range(len(prompt) + 1, len(prompt) + tokens)  # the prompt gave the first token
    heads = SPARSE_LAYERS * QUERY_HEADS
    assert moved(server, lambda: complete(server, prompt, tokens)) == (
        SPARSE_LAYERS * len(steps),
        0,
        heads * sum(steps),
        heads * BUDGET * len(steps),
    )


def test_padded_rows_of_a_graph_are_not_counted(host) -> None:
    """Three requests replay a graph of four rows."""
    server = host.servers["sparse"]
    prompts = [token_ids(server, harbour_log(60, seed=seed), 1000) for seed in (6, 7, 8)]
    for prompt in prompts:
        complete(server, prompt, 1)  # what follows is decode alone, after prefix hits
    rows = moved(server, lambda: together([lambda p=p: complete(server, p, 40) for p in prompts]))[
        0
    ]
    assert rows == 3 * 39 * SPARSE_LAYERS


def test_the_pass_key_is_found(host) -> None:
    server = host.servers["sparse"]

    def ask() -> None:
        assert PASS_KEY in ask_pass_key(server)  # 4,400 tokens

    sparse_rows, _, context, attended = moved(server, ask)
    assert sparse_rows > 0
    assert attended < 0.05 * context


@pytest.mark.parametrize("name", ["piecewise", "no graphs", "v1 runner", "v1 runner, no graphs"])
def test_graphs_and_runners_change_no_answer(host, base, name: str) -> None:
    server = host.servers[name]
    assert ("Using V2 Model Runner" in server.log()) == ("v1" not in name)
    assert ("Graph capturing finished" in server.log()) == ("no graphs" not in name)
    assert answers(server, PROMPTS) == base


def test_prefix_hits_change_no_answer(host) -> None:
    server, prompt = host.servers["sparse"], harbour_log(70, seed=9)
    cold = steps_of(server, [prompt])
    before = server.metrics()["vllm:prefix_cache_hits_total"]
    warm = steps_of(server, [prompt])
    assert server.metrics()["vllm:prefix_cache_hits_total"] > before
    assert_same_up_to_rounding(cold, warm)


def test_chunks_and_scheduling_change_no_answer(host) -> None:
    """Prefill in steps of 512 tokens, nothing cached, each step waited for."""
    alike = [steps_of(host.servers[name], PROMPTS) for name in ("sparse", "chunked")]
    assert_same_up_to_rounding(*alike)


@pytest.mark.parametrize("name", ["sparse", "chunked", "v1 runner"])
def test_clients_at_once_get_the_answers_of_clients_alone(host, name: str) -> None:
    """Long prefills, prefix hits and running decodes share steps; graphs are padded."""
    server = host.servers[name]
    prompts = [harbour_log(6 * n, seed=30 + n) for n in range(1, 14)]  # 130 to 1,900 tokens
    alone = steps_of(server, prompts)
    crowd = together([lambda p=p: steps_of(server, [p])[0] for p in prompts])
    assert_same_up_to_rounding(alone, crowd)


def test_a_thousand_steps_take_no_memory(host) -> None:
    server = host.servers["sparse"]
    prompt = token_ids(server, harbour_log(60, seed=10), 1000)
    complete(server, prompt, 50)
    free = torch.cuda.mem_get_info()[0]
    assert complete(server, prompt, 1000)["completion_tokens"] == 1000
    assert torch.cuda.mem_get_info()[0] == free


def test_chat_over_http(host) -> None:
    server = host.servers["sparse"]
    assert "Paris" in chat(server, "What is the capital of France?")
    body = {"prompt": harbour_log(20), "max_tokens": 16, "temperature": 0, "ignore_eos": True}
    events = list(server.stream("/v1/completions", body))
    assert len(events) > 8
    text = "".join(choice["text"] for event in events for choice in event["choices"])
    assert text == complete(server, body["prompt"], 16)["text"]


def test_the_log_says_what_runs(host) -> None:
    line = next(x for x in host.servers["sparse"].log().splitlines() if "Using ADAMAS" in x)
    assert "kernels cuda (sm_90a" in line
    assert f"token budget {BUDGET}" in line
