"""docs/compatibility.md says of every argument of vLLM what becomes of it, and each claim has its test."""

import dataclasses
import json
import os
import re
import time
from pathlib import Path
from typing import NamedTuple

import engines
import pytest
import torch
from common import ROOT, random_gemma, random_llama
from test_checks import ARGUMENTS, ENVIRONMENT, PARTS

from vllm_adamas.serving.histograms import MEASURES
from vllm_adamas.serving.launch import Server
from vllm_adamas.serving.metrics import NAMES
from vllm_adamas.serving.plugin import register

TESTS = ROOT / "tests"
DOCUMENT = ROOT / "docs" / "compatibility.md"
VERDICTS = ("works", "refused", "no effect", "not tested")


class Row(NamedTuple):
    names: tuple[str, ...]
    verdict: str
    reason: str


def sections() -> dict[str, list[Row]]:
    """The tables under the heading "Arguments", by the title above each."""
    text = DOCUMENT.read_text().split("\n## Arguments\n")[1].split("\n## ")[0]
    tables = {}
    for section in text.split("\n### ")[1:]:
        title, *lines = section.splitlines()
        cells = [line.strip("|").split("|") for line in lines if line.startswith("| `")]
        tables[title] = [
            Row(tuple(re.findall("`(.+?)`", names)), verdict.strip(), reason.strip())
            for names, verdict, reason in cells
        ]
    return tables


def rows() -> list[Row]:
    return [row for table in sections().values() for row in table]


def option(action) -> str:
    return next(name for name in action.option_strings if name.startswith("--"))


def options_of(config: type, prefix: str) -> list[str]:
    """What may be written behind a dot: the fields of a configuration that are arguments of it."""
    from vllm.config import PassConfig

    fields = {field.name for field in dataclasses.fields(config) if field.init}
    nested = {f"pass_config.{field.name}" for field in dataclasses.fields(PassConfig)}
    if "pass_config" in fields:
        fields = fields - {"pass_config"} | nested
    return [f"{prefix}.{name}" for name in fields]


def test_every_argument_has_one_row() -> None:
    from vllm import envs
    from vllm.config import AttentionConfig, CompilationConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    register()
    engine = {field.name for field in dataclasses.fields(EngineArgs)}
    expected = {
        group.title: [option(action) for action in group._group_actions if action.dest in engine]
        for group in EngineArgs.add_cli_args(FlexibleArgumentParser())._action_groups
    }
    for prefix, config in (
        ("--attention-config", AttentionConfig),
        ("--compilation-config", CompilationConfig),
    ):
        expected[prefix] = options_of(config, prefix)
    tables = sections()
    whole = [name for row in tables.pop("Groups") for name in row.names]
    command = [name for row in tables.pop("Command") for name in row.names]
    environment = {name for row in tables.pop("Environment") for name in row.names}
    assert sorted([*tables, *whole]) == sorted(title for title, names in expected.items() if names)
    for title, table in tables.items():
        named = [name for row in table for name in row.names]
        assert sorted(named) == sorted(expected[title]), title
    assert environment <= envs.environment_variables.keys()
    server = make_arg_parser(FlexibleArgumentParser())
    assert set(command) <= {name for action in server._actions for name in action.option_strings}


def test_verdicts() -> None:
    assert {row.verdict for row in rows()} == set(VERDICTS)


def test_what_is_refused_is_refused_in_the_tests() -> None:
    refusals = {
        name for row in rows() if "refused" in row.verdict + row.reason for name in row.names
    }
    assert refusals == ARGUMENTS.keys() | PARTS.keys() | ENVIRONMENT.keys()


@pytest.mark.parametrize("row", [row for row in rows() if row.verdict == "works"], ids=str)
def test_what_works_has_a_test(row: Row) -> None:
    tests = re.findall(r"`(test_\w+)::(test_\w+)`", row.reason)
    assert tests
    for file, name in tests:
        (path,) = TESTS.rglob(f"{file}.py")
        assert f"\ndef {name}(" in path.read_text(), f"{file}::{name}"


# What works: the tokens of an engine without the arguments. In float32, as in test_serve.

EVENTS = {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": "inproc://events"}
LLAMA = {
    "plain": {},
    "priority scheduling": {
        "prefix_caching_hash_algo": "sha256_cbor",
        "kv_events_config": EVENTS,
        "max_num_active_seqs": 2,
        "scheduling_policy": "priority",
        "watermark": 0.1,
        "long_prefill_token_threshold": 200,
        "long_prefill_token_threshold_adaptive": True,
    },
    "--model-impl transformers": {
        "model_impl": "transformers",
        "enable_chunked_prefill": False,
    },
}
TWO_SIZES = {  # of pages in one pool; no prefix caching, so that both prefill whole prompts
    f"blocks of {size}": {
        "kv_cache_dtype": "fp8",
        "kv_cache_dtype_skip_layers": ["0", "2"],
        "block_size": size,
        "enable_prefix_caching": False,
    }
    for size in (64, 128)
}
GEMMA = {
    "plain": {},
    "--disable-hybrid-kv-cache-manager": {"disable_hybrid_kv_cache_manager": True},
    "another backend for sliding windows": {
        "attention_config": {"backend_per_kind": {"sliding_window": "CPU_ATTN"}}
    },
}


#: What vLLM's prefill kernel needs for fp8 pages on a CPU.
FP8 = torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported()


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Of small models with random weights; every other layer of the Gemma has a sliding window."""
    return {
        "llama": random_llama(tmp_path_factory.mktemp("llama")),
        "gemma": random_gemma(tmp_path_factory.mktemp("gemma")),
    }


@pytest.fixture(scope="module")
def said(models) -> dict[tuple[str, str], engines.Engine]:
    """By the engine of each case."""
    cases = {("llama", name): arguments for name, arguments in LLAMA.items()}
    cases |= {("gemma", name): arguments for name, arguments in GEMMA.items()}
    if FP8:
        cases |= {("llama", name): arguments for name, arguments in TWO_SIZES.items()}
    with engines.Engines() as process:
        return {
            (model, name): process.ask(models[model], arguments)
            for (model, name), arguments in cases.items()
        }


@pytest.fixture(scope="module")
def tokens(said) -> dict[tuple[str, str], list[list[int]]]:
    return {case: engine.tokens for case, engine in said.items()}


@pytest.mark.supports("{name}")
@pytest.mark.serve
@pytest.mark.slow
@pytest.mark.parametrize("name", list(LLAMA)[1:])
def test_bookkeeping_changes_no_answer(tokens, name: str) -> None:
    assert tokens["llama", name] == tokens["llama", "plain"]


@pytest.mark.supports("KV events")
@pytest.mark.serve
@pytest.mark.slow
def test_kv_events_tell_of_every_full_block(said) -> None:
    """Of prompts and answers; the last token of an answer is never computed."""
    engine, size = said["llama", "priority scheduling"], engines.COMMON["block_size"]
    texts = [
        (prompt + tokens)[:-1]
        for prompt, tokens in zip(2 * engines.prompts(), engine.tokens, strict=True)
    ]
    full = {
        tuple(text[end - size : end]) for text in texts for end in range(size, len(text) + 1, size)
    }
    assert full == set(map(tuple, engine.stored))


@pytest.mark.supports("sliding windows", "{name}")
@pytest.mark.serve
@pytest.mark.slow
@pytest.mark.parametrize("name", list(GEMMA)[1:])
def test_kinds_of_layers_change_no_answer(tokens, name: str) -> None:
    assert tokens["gemma", name] == tokens["gemma", "plain"]


@pytest.mark.supports("fp8 KV cache in some layers")
@pytest.mark.serve
@pytest.mark.slow
@pytest.mark.skipif(not FP8, reason="vLLM has no fp8 prefill on this processor")
def test_pages_of_two_sizes_share_a_pool(tokens) -> None:
    small, large = (tokens["llama", name] for name in TWO_SIZES)
    assert small == large
    assert small != tokens["llama", "plain"]


@pytest.mark.parametrize("kv_heads", [(1, 1), (16, 4)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
def test_heads_of_256_and_512_share_a_pool_without_padding(dtype, kv_heads) -> None:
    """As vLLM fits the pages of Gemma 4: the smaller ones get blocks of more tokens."""
    from vllm.v1.core.kv_cache_utils import unify_kv_cache_spec_page_size
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from vllm_adamas.serving.backend import AdamasBackend

    specs = {
        size: AdamasBackend.customize_spec(
            FullAttentionSpec(block_size=64, num_kv_heads=heads, head_size=size, dtype=dtype)
        )
        for size, heads in zip((256, 512), kv_heads, strict=True)
    }
    unified = unify_kv_cache_spec_page_size(specs).values()
    assert len({spec.page_size_bytes for spec in unified}) == 1
    assert {spec.block_size for spec in unified} == {64, 128}
    assert all(spec.page_size_padded is None for spec in unified)


def expected_counters(model: Path) -> list[int]:
    """What decoding :func:`engines.prompts`, one after another, adds to the counters of metrics.NAMES.

    The first of each answer's tokens is prefill's, and layer 0 is dense.
    """
    config = json.loads((model / "config.json").read_text())
    layers, heads = config["num_hidden_layers"] - 1, config["num_attention_heads"]
    budget = engines.COMMON["additional_config"]["adamas"]["token_budget"]
    contexts = [len(ids) + n for ids in engines.prompts() for n in range(1, engines.TOKENS)]
    sparse = sum(context > budget for context in contexts)
    attended = sum(min(context, budget) for context in contexts)
    rows = [sparse, len(contexts) - sparse]
    return [layers * n for n in (*rows, heads * sum(contexts), heads * attended, 0)]


def counters(server: Server, until: list[int]) -> list[int]:
    """The exported counters, once they are as expected or have had time enough."""
    deadline = time.monotonic() + 60
    while True:
        now = server.metrics()
        found = [int(now.get(f"vllm:adamas_{name}_total", 0)) for name, _ in NAMES]
        if found == until or time.monotonic() > deadline:
            return found
        time.sleep(0.2)


@pytest.mark.serve
@pytest.mark.slow
@pytest.mark.supports("{name}")
@pytest.mark.parametrize(
    ("name", "args"),
    [("several API servers", "--api-server-count 2"), ("data parallelism", "-dp 2")],
)
def test_more_processes_change_no_answer(models, tokens, name: str, args: str) -> None:
    cores = sorted(os.sched_getaffinity(0))[:2]
    env = {"VLLM_CPU_KVCACHE_SPACE": "1"}
    if name == "data parallelism":
        if len(cores) < 2:
            pytest.skip("needs two cores")
        env["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(map(str, cores))
    options = engines.COMMON["additional_config"]["adamas"] | {"audit_interval": 2}
    sizes = "--dtype float32 --enforce-eager --block-size 64 --max-model-len 2048 --max-num-seqs 8"
    body = {"max_tokens": engines.TOKENS, "temperature": 0, "ignore_eos": True, "logprobs": 0}
    body |= {"return_tokens_as_token_ids": True}
    with Server(models["llama"], "adamas", options, [*sizes.split(), *args.split()], env) as server:
        replies = [
            server.post("/v1/completions", {"prompt": ids, **body})["choices"][0]["logprobs"][
                "tokens"
            ]
            for ids in engines.prompts()
        ]
        counted = counters(server, until=expected_counters(models["llama"]))
        audited = server.metrics()
    found = [[int(token.removeprefix("token_id:")) for token in reply] for reply in replies]
    assert found == tokens["llama", "plain"][: len(found)]
    assert counted == expected_counters(models["llama"])
    names = [f"vllm:adamas_audit_{name}_count" for name, *_ in MEASURES]
    assert len({audited[name] for name in names}) == 1
    assert audited[names[0]] > 0
