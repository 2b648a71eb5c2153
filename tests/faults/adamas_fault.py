"""A vLLM plugin that makes the adamas backend wrong, for a test to find: ADAMAS_FAULT names how.

It is seen by servers that have this folder on their PYTHONPATH. Steps are counted, so that a fault
comes at the same steps whatever the machine.
"""

import functools
import itertools
import os

EVERY = 5  #: steps; a fault that is there now and then


def plant() -> None:
    fault = os.environ.get("ADAMAS_FAULT")
    if fault is not None:
        FAULTS[fault]()


def stale_signature() -> None:
    """A slot that is written again keeps the signature of what it held before."""
    from vllm_adamas.layout import TILE, PageLayout
    from vllm_adamas.serving.impl import AdamasImpl

    original = AdamasImpl.forward

    @functools.wraps(original)
    def forward(self, layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs):
        rest = (layer, query, key, value, kv_cache, attn_metadata, output, *args)
        if attn_metadata is None:
            return original(self, *rest, **kwargs)
        layout = PageLayout(self.head_size, kv_cache.shape[2], kv_cache.dtype)
        written = self.__dict__.setdefault("_written", set())
        slots = [slot for slot in attn_metadata.slot_mapping.tolist() if slot >= 0]
        again = [divmod(slot, layout.block_size) for slot in slots if slot in written]
        written.update(slots)
        planes = [layout.hi(kv_cache), layout.lo(kv_cache)]
        at = [
            (block, slice(None), token // TILE, slice(None), token % TILE) for block, token in again
        ]
        kept = [[plane[where].clone() for where in at] for plane in planes]
        result = original(self, *rest, **kwargs)
        for plane, values in zip(planes, kept, strict=True):
            for where, old in zip(at, values, strict=True):
                plane[where] = old
        return result

    AdamasImpl.forward = forward


def neighbours_block() -> None:
    """Now and then the first row of a decode step reads the first block of the second."""

    def spoil(metadata):
        if metadata.num_decode_rows > 1:
            for batch in metadata.decode.values():
                table = batch.block_table = batch.block_table.clone()
                table[0, 0] = table[1, 0]

    _spoil_some_steps(spoil)


def missed_slot() -> None:
    """Now and then the K, V and signature of a step's last token are not written."""

    def spoil(metadata):
        metadata.slot_mapping = metadata.slot_mapping.clone()
        metadata.slot_mapping[-1] = -1

    _spoil_some_steps(spoil)


def _spoil_some_steps(spoil) -> None:
    from vllm_adamas.serving.metadata import AdamasMetadataBuilder

    original, steps = AdamasMetadataBuilder.build, itertools.count(1)

    @functools.wraps(original)
    def build(self, *args, **kwargs):
        metadata = original(self, *args, **kwargs)
        if next(steps) % EVERY == 0:
            spoil(metadata)
        return metadata

    AdamasMetadataBuilder.build = build


FAULTS = {fault.__name__: fault for fault in (stale_signature, neighbours_block, missed_slot)}
