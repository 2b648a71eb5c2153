"""What tests do inside a server's workers, through vLLM's ``--worker-extension-cls``."""

import os
import time
from pathlib import Path

from vllm_adamas.backends.cuda import policy
from vllm_adamas.serving.launch import Server


def with_path(folder: Path) -> str:
    """A PYTHONPATH that has the folder first."""
    return os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))


#: Arguments and environment of a server whose workers have :class:`Extension`.
ARGS = "--worker-extension-cls extension.Extension "
ENV = {"VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": with_path(Path(__file__).parent)}


#: In the environment: rows of one request are scanned together in steps of any size. The policy would do so in large steps alone.
SHARED = "TEST_SHARED_SCANS"
if os.environ.get(SHARED):
    policy.prefers_shared = lambda form, max_seq_len, rows_each: rows_each > 1


class Extension:
    """Mixed into vLLM's worker."""

    def shared_plans(self) -> int:
        """Plans of decode steps whose rows were scanned together."""
        layers = self.vllm_config.compilation_config.static_forward_context.values()
        (backend,) = {layer.impl.backend for layer in layers if hasattr(layer, "kv_cache")}
        plans = [plan for of_layer in backend._plans.values() for plan in of_layer.values()]
        return sum(plan.shared for plan in plans)

    def poison(self) -> int:
        """Writes NaN into every byte of every page: keys, values, signatures and scales."""
        layers = self.vllm_config.compilation_config.static_forward_context.values()
        caches = [layer.kv_cache for layer in layers if hasattr(layer, "kv_cache")]
        memory = {cache.untyped_storage().data_ptr(): cache.untyped_storage() for cache in caches}
        for storage in memory.values():  # layers may share one
            storage.fill_(0xFF)  # NaN in each of the types that a page holds
        return len(caches)


def forget(server: Server) -> None:
    """Forgets all cached prefixes. Requests that have ended give their blocks back a moment after the answer."""
    while not server.post("/reset_prefix_cache", {})["success"]:
        time.sleep(0.1)


def poison(server: Server, layers: int) -> None:
    """Forgets all cached prefixes and poisons the pages that held them."""
    forget(server)
    assert server.post("/collective_rpc", {"method": "poison"}) == {"results": [str(layers)]}
