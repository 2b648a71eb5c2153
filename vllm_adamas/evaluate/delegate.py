"""A backend that forwards every operation to another one: the base of recorders and selectors."""

from __future__ import annotations

from vllm_adamas.backends.base import Backend
from vllm_adamas.backends.inspect import Inspectable


class DelegatingBackend(Backend, Inspectable):
    """
    Args:
        inner: the backend that does the work.
    """

    def __init__(self, inner: Backend):
        self.inner = inner
        self.name = inner.name

    @property
    def description(self) -> str:
        return self.inner.description

    def prepare(self, kv_cache):
        self.inner.prepare(kv_cache)

    def reserve(self, params, max_rows, max_seq_len):
        return self.inner.reserve(params, max_rows, max_seq_len)

    def bind(self, params, kv_cache):
        return self.inner.bind(params, kv_cache)

    def append(self, layer, key, value, slot_mapping):
        self.inner.append(layer, key, value, slot_mapping)

    def decode(self, layer, query, batch, output, stats):
        self.inner.decode(layer, query, batch, output, stats)

    def gather(self, layer, block_table, seq_lens, key, value):
        self.inner.gather(layer, block_table, seq_lens, key, value)

    def scan(self, layer, query, block_table, seq_lens, longest=None):
        return self.inner.scan(layer, query, block_table, seq_lens, longest)

    def select(self, params, scores, seq_lens, budgets, most=None):
        return self.inner.select(params, scores, seq_lens, budgets, most)
