"""Real servers with a real model on a Hopper GPU: CUDA graphs, both model runners, memory.

Servers stay up; each takes 1 GiB of KV cache. Those that the chosen tests are parametrized with start at once, the others
when a test asks for them. They compute in float16, whose rounding seldom decides between two tokens. Where steps are cut in another way, rounding
of K moves codes as well; there logits are compared up to the first token that rounding can decide.
"""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import extension
import pytest
import torch
from common import MODEL, is_one_sentence, random_llama
from hopper import ON_HOPPER
from prometheus_client.parser import text_string_to_metric_families
from test_audit import audited
from test_serve import (
    ATTENDED,
    BUDGET,
    LAYERS,
    LONG_PROMPTS,
    PASS_KEY,
    SHORT_PROMPTS,
    answers,
    ask_pass_key,
    chat,
    complete,
    counted,
    harbour_log,
    together,
    token_ids,
)
from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary
from vllm.third_party import pynvml

from vllm_adamas import profile as profiles
from vllm_adamas.serving.launch import Server
from vllm_adamas.serving.metrics import NAMES, Counters
from vllm_adamas.serving.request_budgets import ARGUMENT

pytestmark = [*ON_HOPPER, pytest.mark.timeout(400)]

two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def vllm_loads_nccl() -> bool:
    try:
        NCCLLibrary()
    except Exception:
        return False
    return True


shared_contexts = pytest.mark.skipif(
    torch.cuda.device_count() < 2 or not vllm_loads_nccl(),
    reason="needs two GPUs and an NCCL that vLLM loads",
)

COMMON = (
    "--dtype float16 --block-size 64 --max-model-len 8192 --max-num-seqs 16 "
    "--cudagraph-capture-sizes 1 2 4 8 16 --gpu-memory-utilization 0.1 --kv-cache-memory-bytes 1G "
)
SPARSE = {"token_budget": BUDGET, "audit_interval": 0}
AUDITED = {**SPARSE, "audit_interval": 3}
MOST = 8192  #: that a request may ask for
RAISED = {**AUDITED, "max_token_budget": MOST}
V1_RUNNER = {"VLLM_USE_V2_MODEL_RUNNER": "0"}
CHUNKED = "--max-num-batched-tokens 512"
NGRAMS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}
DRAFTS = f"--speculative-config {json.dumps(NGRAMS, separators=(',', ':'))} --max-num-seqs 4"
SPECS = {  # backend, its options, further arguments, environment
    "stock": ("flash_attn", None, "", {}),
    "dense": ("adamas", {"token_budget": 1_000_000}, "", {}),
    "sparse": ("adamas", SPARSE, "", {}),  # FULL graphs for decode, PIECEWISE ones for the rest
    "piecewise": ("adamas", SPARSE, "-cc.cudagraph_mode=PIECEWISE", {}),
    "no graphs": ("adamas", AUDITED, "-cc.cudagraph_mode=NONE", {}),
    "v1 runner": ("adamas", RAISED, "", V1_RUNNER),
    "raised": ("adamas", RAISED, "", {}),
    "v1 runner, no graphs": ("adamas", SPARSE, "-cc.cudagraph_mode=NONE", V1_RUNNER),
    "drafts": ("adamas", AUDITED, DRAFTS, {}),
    "shared drafts": ("adamas", AUDITED, DRAFTS, {extension.SHARED: "1"}),
    "drafts, no graphs": ("adamas", AUDITED, f"{DRAFTS} -cc.cudagraph_mode=NONE", {}),
    "dense drafts": ("adamas", {"token_budget": 1_000_000}, DRAFTS, {}),
    "stock drafts": ("flash_attn", None, DRAFTS, {}),
    "chunked": (
        "adamas",
        SPARSE,
        f"{CHUNKED} --no-enable-prefix-caching --no-async-scheduling",
        {},
    ),
    "triton": ("adamas", {**SPARSE, "kernels": "triton"}, "", {}),
    "profile": ("adamas", {**SPARSE, "profile": MODEL.name}, "", {}),
    "fp8": ("adamas", SPARSE, f"--kv-cache-dtype fp8 {CHUNKED}", {}),
    # FLASH_ATTN has no fp8 for float16.
    "stock bf16 fp8": ("flash_attn", None, "--kv-cache-dtype fp8 --dtype bfloat16", {}),
    "bf16 fp8": ("adamas", SPARSE, "--kv-cache-dtype fp8 --dtype bfloat16", {}),
}
NCCL = "-tp 2 --disable-custom-all-reduce"  # virtual machines may lack what that one needs
TWO_GPUS = {  # with a model of their own
    "stock": ("flash_attn", None, NCCL, {}),
    "sparse": ("adamas", {"token_budget": 1024, "num_dense_layers": 1}, NCCL, {}),
    "two engines": ("adamas", {"token_budget": 1024, "num_dense_layers": 1}, "-dp 2", {}),
}
DCP = f"{NCCL} --decode-context-parallel-size 2"
SHARED = {"token_budget": BUDGET, "layer_budgets": {"0": BUDGET}, "audit_interval": 3}
ONE_KV_HEAD = {  # that two GPUs share
    "stock": ("flash_attn", None, NCCL, {}),
    "dense": ("adamas", {"token_budget": 1_000_000}, f"{DCP} {CHUNKED}", {}),
    "dense, v1 runner": ("adamas", {"token_budget": 1_000_000}, DCP, V1_RUNNER),
    "sparse": ("adamas", SHARED, DCP, {}),
    "no graphs": (
        "adamas",
        SHARED,
        f"{DCP} -cc.cudagraph_mode=NONE --cp-kv-cache-interleave-size 64",
        {},
    ),
    "v1 runner": ("adamas", SHARED, DCP, V1_RUNNER),
    "triton": ("adamas", {**SHARED, "kernels": "triton"}, DCP, {}),
    "drafts": ("adamas", SHARED, f"{DCP} {DRAFTS}", {}),
    "fp8": ("adamas", {"token_budget": 1_000_000}, f"{DCP} --kv-cache-dtype fp8 {CHUNKED}", {}),
}
REFUSED = {"--dtype float32": "torch.float32"}

PROMPTS = (*SHORT_PROMPTS, *LONG_PROMPTS, harbour_log(180))  # up to 4,400 tokens
SPECULATED = [f"vllm:spec_decode_num_{what}_tokens_total" for what in ("draft", "accepted")]
ROUNDING = 0.1  #: by how much rounding may move a log probability
FP8_ROUNDING = 0.5  #: the same where it can move K and V by a step of fp8


def start(spec: tuple, model: Path, log: Path) -> Server:
    """Starts a server; the specification may name a model of its own behind the environment."""
    backend, options, args, env, *own = spec
    extra = (COMMON + extension.ARGS + args).split()
    env = {**extension.ENV, **env}
    model = own[0] if own else model
    return Server(model, backend, options, extra, env=env, log_path=log, timeout=300)


class Host:
    """Servers that run side by side; one that did not start fails the tests that ask for it."""

    def __init__(self, specs: dict[str, tuple], model: Path, logs: Path, at_once: set[str]):
        self._pool = ThreadPoolExecutor(max(2, (os.cpu_count() or 2) // 2))
        self._specs, self._model, self._logs = specs, model, logs
        self._starts: dict[str, Future] = {}
        for name in specs:
            if name in at_once:
                self._start(name)

    def _start(self, name: str) -> None:
        log = self._logs / name
        self._starts[name] = self._pool.submit(start, self._specs[name], self._model, log)

    def __getitem__(self, name: str) -> Server:
        if name not in self._starts:
            self._start(name)
        return self._starts[name].result()

    def stop(self) -> None:
        done = [start for start in self._starts.values() if not start.cancel()]
        servers = [start.result() for start in done if not start.exception()]
        list(self._pool.map(Server.stop, servers))
        self._pool.shutdown()


@pytest.fixture(scope="module")
def host(request, tmp_path_factory):
    """The servers of SPECS."""
    calls = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    named = {value for params in calls for value in params.values() if isinstance(value, str)}
    host = Host(SPECS, MODEL, tmp_path_factory.mktemp("servers"), named)
    yield host
    host.stop()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The servers of TWO_GPUS."""
    model = random_llama(tmp_path_factory.mktemp("llama"))
    host = Host(TWO_GPUS, model, tmp_path_factory.mktemp("pair"), set(TWO_GPUS))
    yield host
    host.stop()


@pytest.fixture(scope="module")
def base(host) -> list[list[str]]:
    return answers(host["sparse"], PROMPTS)


def counters(server: Server) -> tuple[int, ...]:
    """The exported counters once they hold everything so far: copies are a second apart, and each
    step brings the copy that the step before it began. A prompt of several tokens with one token of
    output is prefill alone, and counts nothing."""
    for _ in range(2):
        time.sleep(1.1 * Counters.COPY_INTERVAL)
        complete(server, "Good evening to all of you", 1)
    now = server.metrics()
    return tuple(int(now[f"vllm:adamas_{name}_total"]) for name, _ in NAMES)


def moved(server: Server, call) -> tuple[int, ...]:
    before = counters(server)
    call()
    return tuple(b - a for a, b in zip(before, counters(server), strict=True))


def steps_of(server: Server, prompts) -> list[dict]:
    return [complete(server, prompt, logprobs=2)["logprobs"] for prompt in prompts]


def assert_same_up_to_rounding(
    expected: list[dict], actual: list[dict], rounding: float = ROUNDING, share: float = 0.8
) -> None:
    """Log probabilities agree, and tokens do until two of them are as good as equal.

    Rounding of a key can move a code, and with it a token into or out of a set: one log probability in 50 may be
    farther off.

    Args:
        share: of the tokens, that must have been compared.
    """
    compared = total = far = 0
    for one, other in zip(expected, actual, strict=True):
        total += len(one["tokens"])
        for i, (a, b) in enumerate(zip(one["tokens"], other["tokens"], strict=True)):
            best = sorted(one["top_logprobs"][i].values())[-2:]
            if a != b:
                assert best[1] - best[0] < 2 * rounding, (i, a, b, best)
                break
            off = abs(one["token_logprobs"][i] - other["token_logprobs"][i])
            assert off < 3 * rounding, (i, a)
            far += off >= rounding
            compared += 1
    assert compared > share * total, f"only {compared} of {total} tokens were comparable"
    assert far <= compared / 50, f"{far} of {compared} log probabilities are far off"


@pytest.mark.parametrize("args", REFUSED)
def test_refusals_end_the_command(host, args: str) -> None:
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(MODEL)]
    command += ["--attention-backend", "adamas", *args.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode not in (0, None)
    sentences = [line for line in done.stderr.splitlines() if line.startswith("vllm-adamas: ")]
    assert len(sentences) == 1, done.stderr[-3000:]
    assert is_one_sentence(sentences[0].removeprefix("vllm-adamas: "))
    assert REFUSED[args] in sentences[0]
    assert "Traceback" not in done.stderr
    assert "EngineCore" not in done.stdout + done.stderr


@pytest.mark.supports("stock tokens within the token budget", "float16", "torch.compile")
def test_a_budget_beyond_the_context_gives_stock_tokens(host) -> None:
    stock, dense = host["stock"], host["dense"]
    assert "Using ADAMAS" in dense.log()
    assert "Using ADAMAS" not in stock.log()
    assert answers(dense, PROMPTS) == answers(stock, PROMPTS)
    sparse_rows, dense_rows, context, attended, _ = counters(dense)
    assert (sparse_rows, attended) == (0, context)
    assert dense_rows > 0


@pytest.mark.supports("counters at /metrics")
@pytest.mark.parametrize("name", ["sparse", "triton", "profile", "fp8"])
def test_the_counters_say_that_decode_was_sparse(host, name: str) -> None:
    server, tokens = host[name], 20
    prompt = token_ids(server, harbour_log(60, seed=5), 1200)
    steps = range(len(prompt) + 1, len(prompt) + tokens)  # the prompt gave the first token
    assert moved(server, lambda: complete(server, prompt, tokens))[:4] == counted(steps)


@pytest.mark.supports("CUDA graphs: full")
def test_padded_rows_of_a_graph_are_not_counted(host) -> None:
    """Three requests replay a graph of four rows."""
    server = host["sparse"]
    prompts = [token_ids(server, harbour_log(60, seed=seed), 1200) for seed in (6, 7, 8)]
    for prompt in prompts:
        complete(server, prompt, 1)  # what follows is decode alone, after prefix hits
    rows = moved(server, lambda: together([lambda p=p: complete(server, p, 40) for p in prompts]))[
        0
    ]
    assert rows == 3 * 39 * LAYERS


@pytest.mark.parametrize(("name", "lines"), [("sparse", 180), ("triton", 180), ("fp8", 60)])
def test_the_pass_key_is_found(host, name: str, lines: int) -> None:
    server = host[name]

    def ask() -> None:
        assert PASS_KEY in ask_pass_key(server, lines)  # 24 tokens a line

    sparse_rows, _, context, attended, _ = moved(server, ask)
    assert sparse_rows > 0
    assert attended * 24 * lines < 1.2 * ATTENDED / LAYERS * context


@pytest.mark.supports("{row}")
@pytest.mark.parametrize(
    ("row", "name"),
    [
        ("CUDA graphs: piecewise", "piecewise"),
        ("Model Runner V2", "no graphs"),
        ("Model Runner V1", "v1 runner"),
        ("Model Runner V1", "v1 runner, no graphs"),
    ],
)
def test_graphs_and_runners_change_no_answer(host, base, row: str, name: str) -> None:
    """Decode steps outside a graph are launched for their longest context: sums come in another order."""
    server = host[name]
    assert ("Using V2 Model Runner" in server.log()) == ("v1" not in name)
    assert ("Graph capturing finished" in server.log()) == ("no graphs" not in name)
    if name == "v1 runner":
        assert answers(server, PROMPTS) == base
    else:
        assert_same_up_to_rounding(steps_of(host["sparse"], PROMPTS), steps_of(server, PROMPTS))


@pytest.mark.supports("speculative decoding: n-grams")
@pytest.mark.parametrize(
    ("plain", "name"),
    [
        ("sparse", "drafts"),
        ("sparse", "shared drafts"),
        ("sparse", "drafts, no graphs"),
        ("dense", "dense drafts"),
    ],
)
def test_drafts_change_no_answer(host, plain: str, name: str) -> None:
    """Steps of one to four rows per request; requests at once draft different numbers of tokens."""
    server = host[name]
    if name == "drafts":
        assert "FULL_AND_PIECEWISE" in server.log() and "Graph capturing finished" in server.log()
    alone = steps_of(host[plain], PROMPTS)
    before = server.metrics()
    assert_same_up_to_rounding(alone, steps_of(server, PROMPTS))
    assert_same_up_to_rounding(
        alone, together([lambda p=p: steps_of(server, [p])[0] for p in PROMPTS])
    )
    now = server.metrics()
    drafted, accepted = (now[name] - before[name] for name in SPECULATED)
    assert 0 < accepted < drafted
    if plain == "sparse":
        (plans,) = server.post("/collective_rpc", {"method": "shared_plans"})["results"]
        assert (int(plans) > 0) == (name == "shared drafts")


@pytest.mark.supports("speculative decoding: n-grams")
def test_drafts_are_accepted_as_by_the_stock_backend(host) -> None:
    """With a budget above every context, up to the tokens that rounding decides."""
    rates = []
    for name in ("stock drafts", "dense drafts"):
        before = host[name].metrics()
        answers(host[name], PROMPTS)
        now = host[name].metrics()
        drafted, accepted = (now[name] - before[name] for name in SPECULATED)
        rates.append(accepted / drafted)
    assert abs(rates[0] - rates[1]) < 0.05, rates


@pytest.mark.supports("audit")
@pytest.mark.parametrize(
    "name", ["no graphs", "v1 runner", "raised", "drafts", "drafts, no graphs"]
)
def test_audited_rows_agree_with_dense_attention(host, name: str) -> None:
    """Rows of a replayed graph, and those of drafts, are compared with their own contexts."""
    server = host[name]
    for _ in range(3):  # drafts leave few steps, and the layers of every group take turns
        answers(server, LONG_PROMPTS)
    counters(server)  # what the last steps counted is exported by then
    for group in audited(server).values():
        assert group["rows"] > 0
        assert 0.0 < group["output_error"] < 0.6
        assert 0.4 < group["kept_mass"] < group["oracle_mass"] <= 1.001


@pytest.mark.supports("token budgets of requests")
@pytest.mark.parametrize("name", ["v1 runner", "raised"])
def test_a_request_raises_its_own_budget_alone(host, name: str) -> None:
    server, asked = host[name], ({}, {"vllm_xargs": {ARGUMENT: MOST}})
    found = together(
        [
            lambda p=p, o=options: complete(server, p, logprobs=2, **o)["logprobs"]
            for options in asked
            for p in LONG_PROMPTS
        ]
    )
    expected = steps_of(host["sparse"], LONG_PROMPTS) + steps_of(host["dense"], LONG_PROMPTS)
    assert_same_up_to_rounding(expected, found)


@pytest.mark.supports("prefix caching")
@pytest.mark.parametrize(("name", "rounding"), [("sparse", ROUNDING), ("fp8", FP8_ROUNDING)])
def test_prefix_hits_change_no_answer(host, name: str, rounding: float) -> None:
    server, prompts = host[name], [harbour_log(70, seed=seed) for seed in range(100, 106)]
    cold = steps_of(server, prompts)
    before = server.metrics()["vllm:prefix_cache_hits_total"]
    warm = steps_of(server, prompts)
    assert server.metrics()["vllm:prefix_cache_hits_total"] > before
    # Rounding may decide between two tokens early in an answer.
    assert_same_up_to_rounding(cold, warm, rounding, share=0.6)


@pytest.mark.supports("chunked prefill", "asynchronous scheduling")
def test_chunks_and_scheduling_change_no_answer(host) -> None:
    """Prefill in steps of 512 tokens, nothing cached, each step waited for."""
    alike = [steps_of(host[name], PROMPTS) for name in ("sparse", "chunked")]
    assert_same_up_to_rounding(*alike)


@pytest.mark.supports("continuous batching")
@pytest.mark.parametrize("name", ["sparse", "chunked", "v1 runner", "triton", "profile"])
def test_clients_at_once_get_the_answers_of_clients_alone(host, name: str) -> None:
    """Long prefills, prefix hits and running decodes share steps; graphs are padded."""
    server = host[name]
    prompts = [harbour_log(6 * n, seed=30 + n) for n in range(1, 14)]  # 130 to 1,900 tokens
    alone = steps_of(server, prompts)
    crowd = together([lambda p=p: steps_of(server, [p])[0] for p in prompts])
    assert_same_up_to_rounding(alone, crowd)


@pytest.mark.supports("prefix caching")
@pytest.mark.parametrize("left", [1, 2])
@pytest.mark.parametrize("name", ["dense", "sparse", "piecewise", "v1 runner", "triton"])
def test_warm_prompts_with_little_left_join_running_decodes(host, name: str, left: int) -> None:
    """One token left runs in the decode graph, padded from three rows to four, and is still prompt."""
    server = host[name]
    text = harbour_log(60, seed=40 + left)
    prompts = [token_ids(server, text, blocks * 64 + left) for blocks in range(5, 16)]
    running = [token_ids(server, harbour_log(60, seed=seed), 700) for seed in (50, 51)]

    def steps(prompt: list[int], tokens: int) -> dict:
        return complete(server, prompt, tokens, logprobs=2)["logprobs"]

    def warm() -> list[dict]:
        return [steps(prompt, 4) for prompt in prompts]

    # The longest first: the others find their blocks.
    quiet = [steps(prompt, 4) for prompt in reversed(prompts)][::-1]
    alone = [steps(prompt, 120) for prompt in running]
    before = server.metrics()["vllm:prefix_cache_hits_total"]
    *beside, found = together([*[lambda p=p: steps(p, 120) for p in running], warm])
    hits = server.metrics()["vllm:prefix_cache_hits_total"] - before
    assert hits >= sum(len(prompt) - left for prompt in prompts)
    assert_same_up_to_rounding(quiet, found)
    assert_same_up_to_rounding(
        alone, beside, share=0.2
    )  # of long answers, which part sooner or later


@pytest.mark.parametrize("name", ["sparse", "no graphs", "v1 runner", "triton", "fp8", "bf16 fp8"])
def test_freed_blocks_may_hold_anything(host, name: str) -> None:
    """The pages of all requests so far are filled with NaN; none of it reaches the next ones."""
    server = host[name]
    before = steps_of(server, PROMPTS)
    extension.poison(server, LAYERS)
    assert_same_up_to_rounding(before, steps_of(server, PROMPTS))


@pytest.mark.supports("Triton kernels")
def test_triton_gives_what_cuda_gives(host) -> None:
    triton = host["triton"]
    assert "kernels triton" in triton.log()
    assert "Graph capturing finished" in triton.log()
    short = [
        steps_of(host[name], SHORT_PROMPTS) for name in ("stock", "triton")
    ]  # within the budget
    assert_same_up_to_rounding(*short)
    assert_same_up_to_rounding(*(steps_of(host[name], PROMPTS) for name in ("sparse", "triton")))


@pytest.mark.supports("calibration profiles")
def test_a_profile_under_graphs(host) -> None:
    """Keys that are balanced and coded less their mean: dense attention stays what it was."""
    log = host["profile"].log()
    assert f"profile {profiles.pin(MODEL.name)}," in log
    assert "Graph capturing finished" in log
    assert_same_up_to_rounding(
        *(steps_of(host[name], SHORT_PROMPTS) for name in ("stock", "profile"))
    )


def logprobs_of(server: Server, prompt: str) -> torch.Tensor:
    """Log probability of every prompt token but the first, from prefill alone."""
    entries = complete(server, prompt, 1, prompt_logprobs=0)["prompt_logprobs"][1:]
    return torch.tensor([next(iter(entry.values()))["logprob"] for entry in entries])


@pytest.mark.supports("fp8 KV cache", "bfloat16")
def test_fp8_prefill_is_closer_to_exact_than_flash_attention_is(host) -> None:
    """Both read the same fp8 K and V; FLASH_ATTN rounds queries and the softmax as well."""
    servers, errors = ("bf16 fp8", "stock bf16 fp8"), ([], [])
    for prompt in LONG_PROMPTS:
        exact = logprobs_of(host["stock"], prompt)  # in float16
        for name, found in zip(servers, errors, strict=True):
            found.append((logprobs_of(host[name], prompt) - exact).abs())
    ours, theirs = (torch.cat(found).mean().item() for found in errors)
    print(f"mean error of a log probability: {ours:.4f}, FLASH_ATTN {theirs:.4f}")
    assert 0 < ours < theirs


@pytest.mark.supports("fp8 KV cache")
def test_fp8_decode_agrees_with_prefill(host) -> None:
    """Dense rows of the kernels, read in place, against FlashAttention over copied values."""
    server, errors = host["fp8"], []
    for prompt in SHORT_PROMPTS:
        decoded = complete(server, prompt, 60, return_token_ids=True)
        ids = decoded["prompt_token_ids"] + decoded["token_ids"]
        prefilled = logprobs_of(server, ids)[-60:]
        errors.append(torch.tensor(decoded["logprobs"]["token_logprobs"]) - prefilled)
    errors = torch.cat(errors).abs()
    print(f"log probabilities of decode and prefill differ by {errors.mean():.4f} on average")
    assert errors.mean() < ROUNDING


@pytest.mark.supports("tensor parallelism")
@two_gpus
def test_heads_may_be_split_over_two_gpus(pair) -> None:
    """The tokens of the stock backend within the budget, and every row counted once beyond it."""
    assert "world_size=2" in pair["sparse"].log()
    short = (*SHORT_PROMPTS, harbour_log(16), harbour_log(30))  # 750 tokens
    assert_same_up_to_rounding(*(steps_of(pair[name], short) for name in ("stock", "sparse")))
    server, tokens, layers, heads = pair["sparse"], 20, 3, 8
    prompt = token_ids(server, harbour_log(100, seed=5), 2000)
    steps = range(len(prompt) + 1, len(prompt) + tokens)
    assert moved(server, lambda: complete(server, prompt, tokens))[:4] == (
        layers * len(steps),
        0,
        layers * heads * sum(steps),
        layers * heads * 1024 * len(steps),
    )


@pytest.mark.supports("data parallelism")
@two_gpus
def test_requests_may_be_split_over_two_gpus(pair) -> None:
    """Each GPU has an engine with counters of its own."""
    server, tokens, layers, requests = pair["two engines"], 20, 3, 4
    short = (*SHORT_PROMPTS, harbour_log(16), harbour_log(30))  # 750 tokens
    found = together([lambda p=p: steps_of(server, [p])[0] for p in short])
    assert_same_up_to_rounding(steps_of(pair["stock"], short), found)
    logs = [token_ids(server, harbour_log(100, seed=seed), 2000) for seed in range(requests)]
    together([lambda p=p: complete(server, p, tokens) for p in logs])
    for _ in range(2):  # as in counters(), in either engine
        time.sleep(1.1 * Counters.COPY_INTERVAL)
        together([lambda: complete(server, "Good evening to all of you", 4)] * 2 * requests)
    expected, deadline = requests * layers * (tokens - 1), time.monotonic() + 10
    while True:  # a server with two engines has two API servers, which read a copy of the counters
        rows = {
            sample.labels["engine"]: sample.value
            for family in text_string_to_metric_families(server.get("/metrics"))
            for sample in family.samples
            if sample.name == "vllm:adamas_sparse_rows_total"
        }
        if sum(rows.values()) == expected or time.monotonic() > deadline:
            break
        time.sleep(0.5)
    assert rows.keys() == {"0", "1"} and min(rows.values()) > 0
    assert sum(rows.values()) == expected


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """The servers of ONE_KV_HEAD."""
    model = random_llama(tmp_path_factory.mktemp("one"), kv_heads=1)
    host = Host(ONE_KV_HEAD, model, tmp_path_factory.mktemp("shared"), set(ONE_KV_HEAD))
    yield host
    host.stop()


@pytest.mark.supports("decode context parallelism")
@shared_contexts
@pytest.mark.parametrize("name", ["dense", "dense, v1 runner"])
def test_ranks_that_share_contexts_attend_to_all_of_them(shared, name: str) -> None:
    """Prefill in chunks and decode within the budget, against two ranks that have every token.

    FLASH_ATTN is asked without DCP: with it and Model Runner V2, vLLM 0.32 answers with other tokens.
    """
    pair = (steps_of(shared[each], PROMPTS) for each in ("stock", name))
    assert_same_up_to_rounding(*pair, share=0.5)


@pytest.mark.supports("decode context parallelism")
@shared_contexts
@pytest.mark.parametrize("name", ["no graphs", "v1 runner", "triton"])
def test_ranks_select_alike_in_every_kind_of_server(shared, name: str) -> None:
    """Graphs, both runners and both kinds of kernels. Where tokens are shared out in another way, others are
    selected: there only prompts within the budget are compared."""
    prompts = SHORT_PROMPTS if name == "no graphs" else PROMPTS
    pair = (steps_of(shared[each], prompts) for each in ("sparse", name))
    assert_same_up_to_rounding(*pair, share=0.5)


@pytest.mark.supports("decode context parallelism")
@shared_contexts
@pytest.mark.parametrize("name", ["sparse", "no graphs"])
def test_every_rank_attends_to_its_budget(shared, name: str) -> None:
    """Counted over the shares of both ranks, which are longer than the budget."""
    server, tokens, layers, heads = shared[name], 20, 4, 8
    prompt = token_ids(server, harbour_log(100, seed=5), 2000)
    steps = range(len(prompt) + 1, len(prompt) + tokens)
    assert moved(server, lambda: complete(server, prompt, tokens))[:4] == (
        layers * len(steps),
        0,
        layers * heads * sum(steps),
        layers * heads * 2 * BUDGET * len(steps),
    )


@pytest.mark.supports("decode context parallelism")
@shared_contexts
def test_ranks_that_share_contexts_verify_drafts(shared) -> None:
    """Every draft is a row with a share of its own context."""
    pair = (steps_of(shared[each], SHORT_PROMPTS) for each in ("sparse", "drafts"))
    assert_same_up_to_rounding(*pair, share=0.5)


@pytest.mark.supports("decode context parallelism")
@shared_contexts
def test_fp8_pages_may_be_shared_out(shared) -> None:
    pair = (steps_of(shared[each], SHORT_PROMPTS) for each in ("stock", "fp8"))
    assert_same_up_to_rounding(*pair, rounding=FP8_ROUNDING, share=0.3)


SLEEP = """
import sys
from vllm import LLM, SamplingParams

adamas = {"attention_backend": "adamas", "additional_config": {"adamas": {"token_budget": 64}}}
size = {"block_size": 64, "max_model_len": 8192, "kv_cache_memory_bytes": 1 << 30}
fp8 = {"kv_cache_dtype": "fp8", "dtype": "bfloat16", "enable_prefix_caching": False}
llm = LLM(
    sys.argv[1], enable_sleep_mode=True, gpu_memory_utilization=0.1, **adamas, **size, **fp8
)
how = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
answer = lambda: llm.generate([sys.argv[2]], how)[0].outputs[0].token_ids
before = answer()
llm.sleep(level=2)
llm.wake_up(tags=["weights"])
llm.collective_rpc("reload_weights")
llm.wake_up(tags=["kv_cache"])
assert answer() == before, (answer(), before)
"""


@pytest.mark.supports("sleep mode")
def test_sleep_level_2_keeps_what_the_backend_allocates(host) -> None:
    """Weights are discarded and loaded again; the scratch of fp8 prefill still begins as zeros."""
    env = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    command = [sys.executable, "-c", SLEEP, str(MODEL), harbour_log(60)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def memory_of(server: Server) -> dict[int, int]:
    """Bytes of the GPU that each process of a server holds."""
    pynvml.nvmlInit()
    uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
    found = pynvml.nvmlDeviceGetComputeRunningProcesses(pynvml.nvmlDeviceGetHandleByUUID(uuid))
    own = os.getsid(server._process.pid)  # a session of its own
    here = {int(x.name) for x in Path("/proc").iterdir() if x.name.isdigit()}
    return {p.pid: p.usedGpuMemory for p in found if p.pid in here and os.getsid(p.pid) == own}


@pytest.mark.supports("memory that stays as measured")
def test_a_thousand_steps_take_no_memory(host) -> None:
    server = host["sparse"]
    prompt = token_ids(server, harbour_log(60, seed=10), 1000)
    complete(server, prompt, 50)
    before = memory_of(server)
    assert before, "the driver names no process of the server"
    assert complete(server, prompt, 1000)["completion_tokens"] == 1000
    assert memory_of(server) == before


@pytest.mark.supports("streaming")
def test_chat_over_http(host) -> None:
    server = host["sparse"]
    assert "Paris" in chat(server, "What is the capital of France?")
    body = {"prompt": harbour_log(20), "max_tokens": 16, "temperature": 0, "ignore_eos": True}
    events = list(server.stream("/v1/completions", body))
    assert len(events) > 8
    text = "".join(choice["text"] for event in events for choice in event["choices"])
    assert text == complete(server, body["prompt"], 16)["text"]


def test_the_log_says_what_runs(host) -> None:
    line = next(x for x in host["sparse"].log().splitlines() if "Using ADAMAS" in x)
    assert "kernels cuda (sm_90a" in line
    assert f"token budget {BUDGET}" in line
