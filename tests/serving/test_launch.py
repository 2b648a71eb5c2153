"""How a server is started: on a stub in vLLM's place."""

import sys

import pytest

from vllm_adamas.serving.launch import Server, parse_metrics

#: Takes the port as vLLM does, after another process has tried to.
STUB = """
import http.server, socket, sys

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

address = ("127.0.0.1", int(sys.argv[1]))
try:
    socket.socket().bind(address)
except OSError:
    http.server.HTTPServer(address, Handler).serve_forever()  # with SO_REUSEADDR
"""


class Stub(Server):
    program = STUB

    def _command(self, port, backend, adamas_config):
        return [sys.executable, "-c", self.program, str(port)]


class Broken(Stub):
    program = "raise SystemExit('no such model')"


def test_no_other_process_gets_the_port_before_the_server() -> None:
    with Stub("model", "adamas", timeout=60) as server:
        assert server.get("/health") == ""


def test_a_server_that_ends_is_reported_with_its_log(tmp_path) -> None:
    with pytest.raises(RuntimeError, match=r"ended with status 1[^\0]*no such model"):
        Broken("model", "adamas", log_path=tmp_path / "log", timeout=60)


class BrokenEngine(Stub):
    """Its engine's error is followed by more lines than a report shows."""

    program = "\n".join(
        [
            "print('(EngineCore pid=7) ERROR 11-29 [core.py:1] RuntimeError: one before')",
            "print('(EngineCore pid=7) ValueError: Free memory is less than desired')",
            "print('frame\\n' * 99 + 'RuntimeError: Engine core initialization failed. See root cause above.')",
            "raise SystemExit(1)",
        ]
    )


def test_the_error_of_the_engine_process_is_named_first(tmp_path) -> None:
    with pytest.raises(RuntimeError) as raised:
        BrokenEngine("model", "adamas", log_path=tmp_path / "log", timeout=60)
    first = str(raised.value).splitlines()[0]
    cause = "ended with status 1: ValueError: Free memory is less than desired"
    assert first == f"The server {cause}. The end of {tmp_path / 'log'}:"


METRICS = """\
# HELP vllm:prefix_cache_hits_total Cached tokens.
# TYPE vllm:prefix_cache_hits_total counter
vllm:prefix_cache_hits_total{engine="0",model_name="a} b"} 3.0
vllm:prefix_cache_hits_total{engine="1",model_name="a} b"} 4.0
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0"} 2
# TYPE vllm:time_to_first_token_seconds histogram
vllm:time_to_first_token_seconds_bucket{le="0.5"} 1
vllm:time_to_first_token_seconds_bucket{le="+Inf"} 2
vllm:time_to_first_token_seconds_count 2
vllm:time_to_first_token_seconds_sum 1.5
"""


def test_samples_of_metrics_are_summed_over_their_labels() -> None:
    assert parse_metrics(METRICS) == {
        "vllm:prefix_cache_hits_total": 7,
        "vllm:num_requests_running": 2,
        "vllm:time_to_first_token_seconds_bucket": 3,
        "vllm:time_to_first_token_seconds_count": 2,
        "vllm:time_to_first_token_seconds_sum": 1.5,
    }


def test_what_is_no_metrics_is_refused() -> None:
    with pytest.raises(ValueError):
        parse_metrics("<html>not found</html>")
