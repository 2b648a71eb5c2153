"""How a server is started: on a stub in vLLM's place."""

import sys

import pytest

from vllm_adamas.serving.launch import Server

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
