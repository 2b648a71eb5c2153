"""Real `vllm serve` processes with a real model: what users see.

Where tokens are compared, the server computes in float32: another batch or another order of additions
then moves logits by 1e-6, not by more than what separates the two best tokens.
"""

import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from random import Random

import extension
import pytest
from common import MODEL, is_one_sentence, random_llama
from extension import forget, poison

from vllm_adamas import profile as profiles
from vllm_adamas.serving.launch import Server

pytestmark = [pytest.mark.serve, pytest.mark.timeout(1200)]

LAYERS, QUERY_HEADS = 30, 9
BUDGET, FIRST_BUDGET = 128, 1024  # of all layers but layer 0; of layer 0, by default
ATTENDED = (LAYERS - 1) * BUDGET + FIRST_BUDGET  # tokens of all layers, beyond these contexts


@dataclass(frozen=True)
class Spec:
    """A server: backend, options of the adamas backend as JSON, command line."""

    backend: str
    options: str
    args: str

    def arguments(self) -> tuple:
        args = (extension.ARGS + self.args).split()
        return MODEL, self.backend, json.loads(self.options), args, extension.ENV


EAGER = "--enforce-eager --max-num-seqs 16 "
# Few blocks: 3,264 tokens, so that four conversations of 820 do not fit.
FEW = EAGER + "--dtype float32 --block-size 64 --num-gpu-blocks-override 52 --max-model-len 3200"
SPARSE = json.dumps({"token_budget": BUDGET, "log_interval": 1})
STOCK = Spec("cpu_attn", "null", FEW)
DENSE = Spec("adamas", '{"token_budget": 1000000}', FEW)
BASE = Spec("adamas", SPARSE, EAGER + "--dtype float32 --block-size 128")
CHUNKED = Spec(
    "adamas",
    SPARSE,
    EAGER
    + "--dtype float32 --block-size 32 --max-num-batched-tokens 512 --no-enable-prefix-caching"
    " --num-gpu-blocks-override 72 --max-model-len 2048",
)
NGRAMS = BASE.args + " --spec-method ngram --spec-tokens 4"
SPECULATING = Spec("adamas", SPARSE, NGRAMS)
COMPILED = Spec("adamas", SPARSE, "--dtype float32 --block-size 64 --max-num-seqs 4")
MANHATTAN = Spec("adamas", f'{{"token_budget": {BUDGET}, "score": "manhattan"}}', EAGER)
SUM = Spec(
    "adamas", f'{{"token_budget": {BUDGET}, "combine": "sum", "num_dense_layers": 1}}', EAGER
)
BY_LAYER = Spec(
    "adamas",
    json.dumps(
        {"token_budget": BUDGET, "layer_budgets": {"0": 512, "7": 0.25}, "profile": MODEL.name}
    ),
    EAGER + "--block-size 128",
)
FP8 = Spec("adamas", SPARSE, EAGER + "--kv-cache-dtype fp8")


def harbour_log(lines: int, seed: int = 0, fact: str = "") -> str:
    """About 20 tokens a line; the fact in the middle."""
    rng = Random(seed)
    ships = ("Aurora", "Bellona", "Cormorant", "Dorothea", "Esperance", "Fulmar", "Gannet")
    goods = ("tea", "copper wire", "oranges", "window glass", "oats", "paper", "olive oil")
    text = [
        f"On day {day} the {rng.choice(ships)} unloaded {rng.randrange(20, 900)} crates of "
        f"{rng.choice(goods)} at pier {rng.randrange(1, 9)}."
        for day in range(1, lines + 1)
    ]
    text.insert(lines // 2, fact)
    return " ".join(text)


SHORT_PROMPTS = ("The capital of France is", "Once upon a time", "def fibonacci(n):\n", "1 2 3 4 5")
LONG_PROMPTS = tuple(
    harbour_log(lines, seed=lines) for lines in (16, 45, 80)
)  # 400 to 1,900 tokens
PASS_KEY = "68412"


def complete(server: Server, prompt, tokens: int = 24, **options) -> dict:
    """A greedy completion; the choice with its tokens, and the usage."""
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    reply = server.post("/v1/completions", {**body, "logprobs": 1, **options})
    return {**reply["choices"][0], **reply["usage"]}


def tokens_of(server: Server, prompt, tokens: int = 24) -> list[str]:
    answer = complete(server, prompt, tokens)["logprobs"]["tokens"]
    assert len(answer) == tokens
    return answer


def answers(server: Server, prompts, tokens: int = 24) -> list[list[str]]:
    return [tokens_of(server, prompt, tokens) for prompt in prompts]


def together(calls) -> list:
    """The results of callables that run at the same time."""
    with ThreadPoolExecutor(max_workers=len(calls)) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


def token_ids(server: Server, text: str, count: int) -> list[int]:
    """The first `count` tokens of a text, for prompts of a known length."""
    ids = server.post("/tokenize", {"prompt": text})["tokens"]
    assert len(ids) >= count
    return ids[:count]


class Moved:
    """By how much counters moved in a `with` block."""

    def __init__(self, server: Server):
        self.server = server

    def __enter__(self):
        self.before = self.server.metrics()
        return self

    def __exit__(self, *_):
        now = self.server.metrics()
        self.by = {name: int(now[name] - self.before.get(name, 0)) for name in now}

    def ours(self) -> tuple[int, ...]:
        names = ("sparse_rows", "dense_rows", "decode_context_tokens", "decode_attended_tokens")
        return tuple(self.by[f"vllm:adamas_{name}_total"] for name in names)


def counted(contexts: range) -> tuple[int, ...]:
    """What decode steps of contexts beyond the budgets of all layers move the counters by."""
    steps = len(contexts)
    return (
        LAYERS * steps,
        0,
        LAYERS * QUERY_HEADS * sum(contexts),
        ATTENDED * QUERY_HEADS * steps,
    )


def chat(server: Server, question: str, tokens: int = 40) -> str:
    messages = [{"role": "user", "content": question}]
    body = {"messages": messages, "temperature": 0, "max_tokens": tokens}
    return server.post("/v1/chat/completions", body)["choices"][0]["message"]["content"]


def ask_pass_key(server: Server, lines: int = 180) -> str:
    """With 180 lines a prompt of 4,400 tokens, the pass key in its middle."""
    fact = f"The pass key is {PASS_KEY}. Remember it: {PASS_KEY} is the pass key."
    question = "What is the pass key mentioned in the harbour log?"
    return chat(server, f"Here is a harbour log.\n{harbour_log(lines, fact=fact)}\n{question}")


# Commands that must end before anything is started


def tiny_model(folder, **config) -> str:
    (folder / "config.json").write_text(json.dumps({"vocab_size": 49152, **config}))
    return str(folder)


LLAMA_72 = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 144}
LLAMA_72 |= {"intermediate_size": 256, "num_attention_heads": 2, "num_hidden_layers": 2}
DEEPSEEK = {"architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2"}
DEEPSEEK |= {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2}
DEEPSEEK |= {"num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 64}
DEEPSEEK |= {"q_lora_rank": None, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32}

# Each kind of refusal; test_config, test_checks and test_refused have the sentences.
REFUSED = {  # options of the backend, further arguments, config.json or None -> what is named
    "unknown key": ({"budget": 64}, "", None, ("adamas.budget", "token_budget")),
    "budget 0": ({"token_budget": 0}, "", None, ("token_budget=0",)),
    "no such layer": ({"layer_budgets": {"30": 64}}, "", None, ("layer 30", "0 to 29")),
    "block size": ({}, "--block-size 48", None, ("block_size 48", "32")),
    "mla": ({}, "", DEEPSEEK, ("MLA", "--attention-backend")),
    "head size": ({}, "", LLAMA_72, ("head_size 72", "--attention-backend")),
}


@pytest.mark.parametrize(("options", "args", "config", "named"), REFUSED.values(), ids=REFUSED)
def test_refusals_end_the_command(tmp_path, options, args: str, config, named: tuple) -> None:
    model = tiny_model(tmp_path, **config) if config else str(MODEL)
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model, *args.split()]
    command += ["--attention-backend", "adamas", "--tokenizer", str(MODEL), "--enforce-eager"]
    command += ["--load-format", "dummy", "--additional-config", json.dumps({"adamas": options})]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode not in (0, None)
    sentences = [line for line in done.stderr.splitlines() if line.startswith("vllm-adamas: ")]
    assert len(sentences) == 1, done.stderr[-3000:]
    assert is_one_sentence(sentences[0].removeprefix("vllm-adamas: ")), sentences
    assert all(part in sentences[0] for part in named), sentences
    assert "Traceback" not in done.stderr
    assert "EngineCore" not in done.stdout + done.stderr


# With a budget beyond every context: the same as vLLM's own backend, token for token


@dataclass
class Observed:
    """What a server with few blocks did; the same requests in the same order."""

    cached: tuple[int, int]
    answers: list[list[str]]
    alone: list[list[str]]
    crowded: list[list[str]]
    preemptions: int
    sparse: tuple[int, ...] | None
    log: str

    @classmethod
    def of(cls, server: Server) -> "Observed":
        start = harbour_log(30)  # eleven blocks
        with Moved(server) as prefix:
            for tail in ("", " On day", " In the end the harbour", "", " On day 31"):
                complete(server, start + tail, 2)
        replies = answers(server, (*SHORT_PROMPTS, harbour_log(125)))
        conversations = [token_ids(server, harbour_log(40, seed=seed), 760) for seed in range(1, 5)]
        alone = answers(server, conversations, 60)
        with Moved(server) as crowd:
            crowded = together([lambda c=c: tokens_of(server, c, 60) for c in conversations])
        names = ("vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total")
        ours = "vllm:adamas_sparse_rows_total" in crowd.by
        return cls(
            cached=tuple(prefix.by[name] for name in names),
            answers=replies,
            alone=alone,
            crowded=crowded,
            preemptions=crowd.by["vllm:num_preemptions_total"],
            sparse=crowd.ours() if ours else None,
            log=server.log(),
        )


@pytest.fixture(scope="session")
def stock(serve) -> Observed:
    return Observed.of(serve(STOCK))


@pytest.fixture(scope="session")
def dense(serve, stock) -> Observed:
    return Observed.of(serve(DENSE))


@pytest.mark.supports("stock tokens within the token budget", "float32")
def test_a_budget_beyond_the_context_gives_stock_tokens(stock, dense) -> None:
    """Short prompts, one of 3,000 tokens and conversations of 760."""
    assert dense.answers == stock.answers
    assert dense.alone == stock.alone


def test_a_budget_beyond_the_context_is_never_sparse(stock, dense) -> None:
    assert "Using ADAMAS" in dense.log
    assert "Using ADAMAS" not in stock.log
    assert stock.sparse is None
    sparse_rows, dense_rows, context, attended = dense.sparse
    assert sparse_rows == 0
    assert dense_rows > 0
    assert attended == context > 0


@pytest.mark.supports("prefix caching")
def test_prefix_cache_hits_are_those_of_stock(stock, dense) -> None:
    hits, queries = dense.cached
    assert 0 < hits < queries
    assert dense.cached == stock.cached


@pytest.mark.supports("preemption")
def test_preempted_requests_resume_where_they_were(dense) -> None:
    assert dense.preemptions > 0
    assert dense.crowded == dense.alone


# Sparse decode


@pytest.fixture(scope="session")
def base(serve) -> list[list[str]]:
    """Sparse answers to the long prompts: what every other way to serve them is compared with."""
    return answers(serve(BASE), LONG_PROMPTS)


@pytest.mark.supports("counters at /metrics")
def test_the_counters_say_that_decode_was_sparse(serve) -> None:
    """If sparse decode silently did not run, or attended to more or less than the budget."""
    server, tokens = serve(BASE), 20
    assert "Using ADAMAS" in server.log()
    prompt = token_ids(server, harbour_log(60, seed=5), 1200)
    with Moved(server) as moved:
        complete(server, prompt, tokens)
    # Contexts; the prompt gave the first token.
    assert moved.ours() == counted(range(len(prompt) + 1, len(prompt) + tokens))


def test_decode_turns_sparse_at_the_budget(serve) -> None:
    server = serve(BASE)
    prompt = token_ids(server, harbour_log(20, seed=6), BUDGET - 5)
    with Moved(server) as moved:
        complete(server, prompt, 11)
    # Contexts of 124 to 133 tokens: up to 128 every token is attended, and in layer 0 up to 1024.
    assert moved.ours()[:2] == (5 * (LAYERS - 1), 5 * (LAYERS - 1) + 10)


def test_selection_is_logged(serve) -> None:
    """By the first step after a second, so the number of requests that it takes is not known."""
    server, lines = serve(BASE), []
    while not lines:
        complete(server, harbour_log(45), 8)
        lines = re.findall(r"Selection: attended ([\d.]+)% of context tokens", server.log())
    assert min(map(float, lines)) < 50


def test_the_pass_key_is_found_by_dot(serve) -> None:
    assert PASS_KEY in ask_pass_key(serve(BASE))


@pytest.mark.supports("prefix caching")
def test_one_token_behind_a_prefix_hit_is_still_prompt(serve) -> None:
    """Then the prefill's last step looks like a decode step; prompts are dense whatever their steps."""
    server = serve(BASE)
    prompt = token_ids(server, harbour_log(60, seed=7), 5 * 128 + 1)
    cold = complete(server, prompt, 1)["logprobs"]
    with Moved(server) as moved:
        warm = complete(server, prompt, 1)["logprobs"]
    assert moved.by["vllm:prefix_cache_hits_total"] == 5 * 128
    assert moved.ours()[:2] == (0, LAYERS)
    assert warm["tokens"] == cold["tokens"]
    assert warm["token_logprobs"] == pytest.approx(cold["token_logprobs"], abs=1e-4)


@pytest.mark.supports("continuous batching")
def test_mixed_batches_change_no_answer(serve, base) -> None:
    """A fresh long prefill, prefix hits and running decodes share steps."""
    server = serve(BASE)
    fresh, running = harbour_log(100, seed=8), harbour_log(20, seed=9)
    started = threading.Event()

    def run_first() -> list[str]:
        body = {"prompt": running, "max_tokens": 60, "temperature": 0, "ignore_eos": True}
        parts = []
        for event in server.stream("/v1/completions", body):
            started.set()
            parts += [choice["text"] for choice in event["choices"]]
        return parts

    def after_start(call):
        def run():
            assert started.wait(120)
            return call()

        return run

    calls = [lambda p=p: tokens_of(server, p) for p in (fresh, *LONG_PROMPTS, *SHORT_PROMPTS)]
    first, *mixed = together([run_first, *map(after_start, calls)])
    assert mixed[1:4] == base
    assert mixed[0] == tokens_of(server, fresh)
    assert mixed[4:] == answers(server, SHORT_PROMPTS)
    assert "".join(first) == complete(server, running, 60)["text"]


def test_what_is_configured_is_logged(serve) -> None:
    logged = f"{FIRST_BUDGET} tokens in layer 0, 0 dense layers, profile none,"
    assert f"token budget {BUDGET} tokens per kv head (maximum), {logged}" in serve(BASE).log()


@pytest.mark.parametrize("spec", [BASE, FP8], ids=["float32", "fp8"])
def test_freed_blocks_may_hold_anything(serve, spec: Spec) -> None:
    """The pages of all requests so far are filled with NaN; none of it reaches the next ones.

    The first answers come without cached prefixes, too, because hits change the last bits of sums.
    """
    server = serve(spec)
    prompts = (*SHORT_PROMPTS, *LONG_PROMPTS)
    forget(server)
    before = [complete(server, prompt)["logprobs"] for prompt in prompts]
    poison(server, LAYERS)
    assert [complete(server, prompt)["logprobs"] for prompt in prompts] == before


@pytest.mark.supports("fp8 KV cache")
def test_an_fp8_cache_serves_sensible_text(serve) -> None:
    server = serve(FP8)
    assert "Paris" in complete(server, "The capital of France is", 8)["text"]
    with Moved(server) as moved:
        assert PASS_KEY in ask_pass_key(server)
    assert moved.ours()[0] > 0


@pytest.mark.supports("chunked prefill", "block sizes")
def test_chunks_and_block_sizes_change_no_answer(serve, base) -> None:
    """Prefill in steps of 512 tokens over blocks of 32, against one step over blocks of 128."""
    assert answers(serve(CHUNKED), LONG_PROMPTS) == base


def test_reused_blocks_carry_nothing_over(serve, base) -> None:
    """Without prefix caching, and with so few blocks that others' tokens are written over them all."""
    server = serve(CHUNKED)
    for seed in range(20, 23):  # 1,600 of 2,304 tokens each
        complete(server, token_ids(server, harbour_log(80, seed=seed), 1600), 2)
    assert answers(server, LONG_PROMPTS) == base


def drafts(moved: Moved) -> tuple[int, int]:
    """Drafted and accepted tokens of speculative decoding."""
    names = (f"vllm:spec_decode_num_{what}_tokens_total" for what in ("draft", "accepted"))
    drafted, accepted = (moved.by[name] for name in names)
    return drafted, accepted


@pytest.mark.supports("speculative decoding: n-grams")
@pytest.mark.slow
def test_drafts_of_ngrams_change_no_answer(serve, base) -> None:
    """The lines of the harbour log resemble each other."""
    server = serve(SPECULATING)
    with Moved(server) as moved:
        assert answers(server, LONG_PROMPTS) == base
    drafted, accepted = drafts(moved)
    assert 0 < accepted < drafted
    sparse_rows, dense_rows = moved.ours()[:2]
    rows, rest = divmod(sparse_rows + dense_rows, LAYERS)
    assert rest == 0
    # A step has one row more than it has drafts, and gives one token more than it accepts.
    assert 23 * len(LONG_PROMPTS) - accepted <= rows - drafted < 23 * len(LONG_PROMPTS)


@pytest.mark.supports("speculative decoding: n-grams")
@pytest.mark.slow
def test_ngrams_are_accepted_as_by_the_stock_backend(serve) -> None:
    """With a budget above every context."""
    found = []
    for backend, options in ((STOCK.backend, STOCK.options), (DENSE.backend, DENSE.options)):
        server = serve(Spec(backend, options, NGRAMS))
        with Moved(server) as moved:
            tokens = answers(server, LONG_PROMPTS)
        found.append((tokens, *drafts(moved)))
    stock, ours = found
    assert ours == stock
    assert ours[2] > 0


@pytest.mark.supports("torch.compile")
def test_a_compiled_server_gives_the_same_answers(serve, base) -> None:
    """torch.compile, as without --enforce-eager; blocks of 64."""
    server = serve(COMPILED)
    with Moved(server) as moved:
        assert answers(server, LONG_PROMPTS) == base
    sparse_rows, dense_rows = moved.ours()[:2]
    assert sparse_rows + dense_rows == len(LONG_PROMPTS) * 23 * LAYERS
    assert 23 <= dense_rows <= 46  # of layer 0, after the prompts of 400 and 1,100 tokens


# A server as people start it: bf16


@pytest.mark.supports("bfloat16")
@pytest.mark.parametrize(
    ("spec", "logged"),
    [
        (SUM, "per kv head, 1 dense layers, profile none,"),
        (MANHATTAN, "per kv head, 2 dense layers, profile none,"),
    ],
    ids=["sum", "manhattan"],
)
def test_the_pass_key_is_found_in_bf16(serve, spec: Spec, logged: str) -> None:
    server = serve(spec)
    assert f"token budget {BUDGET} tokens {logged}" in server.log()
    with Moved(server) as moved:
        assert PASS_KEY in ask_pass_key(server)
    _, _, context, attended = moved.ours()
    assert 0 < attended < 0.05 * context


def test_chat_and_completions(serve) -> None:
    server = serve(MANHATTAN)
    assert PASS_KEY in ask_pass_key(server, lines=3)
    reply = complete(server, "The capital of France is", 8)
    assert "Paris" in reply["text"]
    assert (reply["finish_reason"], reply["completion_tokens"]) == ("length", 8)


@pytest.mark.supports("streaming")
def test_streaming_brings_the_same_text_in_parts(serve) -> None:
    server, prompt = serve(MANHATTAN), harbour_log(20)
    body = {"prompt": prompt, "max_tokens": 16, "temperature": 0, "ignore_eos": True}
    events = list(server.stream("/v1/completions", body))
    assert len(events) > 8
    text = "".join(choice["text"] for event in events for choice in event["choices"])
    assert text == complete(server, prompt, 16)["text"]


def test_sixteen_clients_at_once(serve) -> None:
    server = serve(MANHATTAN)
    prompts = [f"{harbour_log(i + 1, seed=i)} Client {i} says:" for i in range(16)]
    replies = together([lambda p=p: complete(server, p, 16) for p in prompts])
    assert [reply["completion_tokens"] for reply in replies] == [16] * 16
    assert all(reply["text"].strip() for reply in replies)
    assert len({reply["text"] for reply in replies}) > 8  # no one got another's answer


def test_a_client_that_leaves_frees_its_place(serve) -> None:
    server = serve(MANHATTAN)
    body = {"prompt": harbour_log(10), "max_tokens": 4000, "ignore_eos": True}
    events = server.stream("/v1/completions", body)
    next(events)
    events.close()
    deadline = time.monotonic() + 60
    while server.metrics()["vllm:num_requests_running"] and time.monotonic() < deadline:
        time.sleep(0.5)
    assert server.metrics()["vllm:num_requests_running"] == 0


BAD = {
    "too long": {"prompt": [7] * 9000},
    "unknown model": {"prompt": "a", "model": "no-such-model"},
    "negative max_tokens": {"prompt": "a", "max_tokens": -5},
    "wrong type": {"prompt": "a", "temperature": "warm"},
    "no prompt": {"prompt": {"text": "a"}},
    "token out of range": {"prompt": [10**9]},
}


@pytest.mark.parametrize("body", BAD.values(), ids=BAD)
def test_bad_requests_are_refused_and_the_engine_lives_on(serve, body: dict) -> None:
    server = serve(MANHATTAN)
    with pytest.raises(urllib.error.HTTPError) as error:
        server.post("/v1/completions", body)
    assert 400 <= error.value.code < 500
    assert complete(server, "1 2 3", 2)["completion_tokens"] == 2


def test_bad_json_is_refused(serve) -> None:
    server = serve(MANHATTAN)
    request = urllib.request.Request(server.url + "/v1/completions", b'{"prompt": "a",')
    request.add_header("Content-Type", "application/json")
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request, timeout=60)
    assert 400 <= error.value.code < 500
    assert complete(server, "1 2 3", 2)["completion_tokens"] == 2


@pytest.mark.supports("calibration profiles")
def test_a_profile_is_served(serve) -> None:
    server = serve(BY_LAYER)
    line = next(x for x in server.log().splitlines() if "Using ADAMAS" in x)
    assert f"profile {profiles.pin(MODEL.name)}," in line
    assert "Paris" in complete(server, "The capital of France is", 8)["text"]


@pytest.mark.supports("token budgets of layers")
def test_layers_have_budgets_of_their_own(serve) -> None:
    """Layer 0 has 512 tokens in place of its default, and layer 7 a quarter of the context."""
    server, tokens = serve(BY_LAYER), 20
    line = next(x for x in server.log().splitlines() if "Using ADAMAS" in x)
    assert "512 tokens in layer 0" in line and "0 dense layers" in line
    prompt = token_ids(server, harbour_log(60, seed=5), 1000)
    with Moved(server) as moved:
        complete(server, prompt, tokens)
    contexts = range(1001, 1000 + tokens)
    attended = [(LAYERS - 2) * BUDGET + 512 + -(-context // 4) for context in contexts]
    assert moved.ours() == (
        LAYERS * len(contexts),
        0,
        LAYERS * QUERY_HEADS * sum(contexts),
        QUERY_HEADS * sum(attended),
    )
    with Moved(server) as moved:
        complete(server, prompt[:300], tokens)
    assert moved.ours()[:2] == ((LAYERS - 1) * len(contexts), len(contexts))  # layer 0 is dense
    assert "Paris" in complete(server, "The capital of France is", 8)["text"]


@pytest.mark.supports("tensor parallelism")
def test_heads_may_be_split_over_two_processes(tmp_path) -> None:
    """Tensor parallelism: the tokens of the stock backend, and every row counted once."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        pytest.skip("needs two cores")
    env = {"VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, cores))}
    model = random_llama(tmp_path)
    args = (EAGER + "--dtype float32 --block-size 64 --max-model-len 4096 -tp 2").split()
    with Server(model, "cpu_attn", None, args, env=env) as stock:
        expected = answers(stock, SHORT_PROMPTS)
    options = {"token_budget": BUDGET, "num_dense_layers": 1}
    with Server(model, "adamas", options, args, env=env) as server:
        assert answers(server, SHORT_PROMPTS) == expected
        prompt = token_ids(server, harbour_log(60, seed=5), 1000)
        with Moved(server) as moved:
            complete(server, prompt, 20)
    layers, heads, steps = 3, 8, range(1001, 1020)
    assert moved.ours() == (
        layers * len(steps),
        0,
        layers * heads * sum(steps),
        layers * heads * BUDGET * len(steps),
    )
