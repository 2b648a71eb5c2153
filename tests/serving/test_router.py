"""Two replicas on one host behind vllm-router, which sends a prompt to the replica that has its prefix cached."""

from __future__ import annotations

import sys
import time
import urllib.error
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import pytest
from common import MODEL
from test_serve import harbour_log

from vllm_adamas.serving.launch import Server

pytest.importorskip("vllm_router", reason="vllm-router is not installed")

pytestmark = [pytest.mark.serve, pytest.mark.slow]
ARGS = "--dtype float32 --enforce-eager --block-size 64 --max-model-len 4096 --max-num-seqs 4"
TOKENS = 16
#: Two conversations: every turn begins with the ones before it.
TURNS = {
    name: [harbour_log(72, seed)[: 2000 + 800 * turn] for turn in range(4)]
    for name, seed in (("a", 1), ("b", 2))
}


class Router(Server):
    """vllm-router in front of servers, by the longest cached prefix."""

    def __init__(self, replicas: Sequence[Server]):
        self.replicas = replicas
        super().__init__(replicas[0].model, "router", timeout=120)

    def _command(self, port, backend, adamas_config):
        urls = [replica.url for replica in self.replicas]
        return [
            *(sys.executable, "-m", "vllm_router.launch_router", "--host", "127.0.0.1"),
            *("--port", str(port), "--policy", "cache_aware", "--worker-urls", *urls),
            *("--health-check-interval-secs", "2", "--health-failure-threshold", "1"),
        ]


class Site(NamedTuple):
    router: Router
    replicas: list[Server]


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    args, options = ARGS.split(), {"token_budget": 128}
    env = {"VLLM_CPU_KVCACHE_SPACE": "1"}
    with (
        Server(MODEL, "adamas", options, args, env) as first,
        Server(MODEL, "adamas", options, args, env) as second,
        Router([first, second]) as router,
    ):
        yield Site(router, [first, second])


def answer(server: Server, prompt: str) -> str:
    body = {
        "model": server.model,
        "prompt": prompt,
        "max_tokens": TOKENS,
        "temperature": 0,
        "ignore_eos": True,
    }
    return server.post("/v1/completions", body)["choices"][0]["text"]


def total(site: Site, name: str) -> float:
    return sum(replica.metrics()[name] for replica in site.replicas)


def test_conversations_stay_where_their_prefix_is_cached(site: Site) -> None:
    """The replicas together count what was asked, and find as much cached as one server would."""
    requests = [(name, turn) for turn in range(4) for name in TURNS]
    texts = {(name, turn): answer(site.router, TURNS[name][turn]) for name, turn in requests}
    assert total(site, "vllm:request_success_total") == len(requests)
    steps = len(requests) * (TOKENS - 1)
    rows = total(site, "vllm:adamas_sparse_rows_total") + total(
        site, "vllm:adamas_dense_rows_total"
    )
    assert rows and rows % steps == 0
    hits = total(site, "vllm:prefix_cache_hits_total")
    with Server(
        MODEL, "adamas", {"token_budget": 128}, ARGS.split(), {"VLLM_CPU_KVCACHE_SPACE": "1"}
    ) as alone:
        assert {key: answer(alone, TURNS[key[0]][key[1]]) for key in requests} == texts
        assert alone.metrics()["vllm:prefix_cache_hits_total"] == hits > 0


def test_a_replica_that_ended_gets_no_requests(site: Site) -> None:
    """Requests fail until the router's health check notices, and then the other replica answers them."""
    expected = answer(site.router, TURNS["a"][0])
    busy = max(site.replicas, key=lambda one: one.metrics()["vllm:request_success_total"])
    busy.stop()
    deadline = time.monotonic() + 120
    while True:
        try:
            assert answer(site.router, TURNS["a"][0]) == expected
            break
        except urllib.error.HTTPError:
            assert time.monotonic() < deadline, site.router.log_tail()
            time.sleep(0.5)
    for name in TURNS:
        answer(site.router, TURNS[name][1])
