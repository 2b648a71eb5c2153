"""Rows compared with dense attention: the measures by their definition, and hosts that do not wait for lengths."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cases import SINKS, Case, exact_weights
from targets import Target, on_cpu, over_targets, target  # noqa: F401

from vllm_adamas.backends.base import DecodeBatch
from vllm_adamas.backends.compare import compare_rows
from vllm_adamas.backends.inspect import select_tokens

MEASURED = {
    "query_head": Case((90, 65), 20, (6, 2), 64),
    "max": Case((90, 40), (70, 8), (6, 2), 64, selection="kv_head", combine="max"),
    "manhattan": Case((90,), 20, (4, 2), score="manhattan", sinks=4, recent=8, centred=True),
    "fp8": Case((70,), 20, (4, 2), 64, fp8="e4m3", selection="kv_head"),
    "softmax": Case((70,), 20, (4, 2), 64, soft_cap=1.5, learned_sinks=SINKS),
}


def expected(batch, output: torch.Tensor, scores: torch.Tensor, row: int) -> list[float]:
    """The measures of a row by their definition, head by head."""
    params, length = batch.params, batch.lengths[row]
    keys, values = (x.split(batch.lengths)[row].double() for x in batch.stored())
    lens, budgets = batch.seq_lens[row : row + 1], batch.budgets[row : row + 1]
    sets = select_tokens(params, scores[row : row + 1, :, :length], lens, budgets)[0]
    off = whole = 0.0
    shares = []
    for head in range(params.num_query_heads):
        logits = keys[:, head // params.group] @ batch.query[row, head].double()
        sink = None if params.sinks is None else params.sinks[head : head + 1]
        weights = exact_weights(logits[None] * params.softmax_scale, params.logits_soft_cap, sink)
        weights = weights[0]
        dense = weights @ values[:, head // params.group]
        off += (output[row, head].double() - dense).square().sum()
        whole += dense.square().sum()
        chosen = set(sets[head * len(sets) // params.num_query_heads].tolist())
        best = weights.argsort(descending=True)[: len(chosen)].tolist()
        shares.append(
            [weights[list(chosen)].sum(), weights[best].sum(), len(chosen & set(best)) / len(best)]
        )
    return [float((off / whole) ** 0.5), *torch.tensor(shares).mean(0).tolist()]


@pytest.mark.parametrize("name", MEASURED)
@over_targets("cpu", "triton", "cuda")
def test_measures(target: Target, name: str) -> None:
    """Over pages that hold NaN beside the contexts, with loose bounds of the lengths."""
    case = MEASURED[name]
    if target.backend.name == "cuda" and case.soft_cap:
        pytest.skip("the CUDA kernels refuse this softmax")
    batch = target.build(case)
    batch = dataclasses.replace(
        batch.surrounded(0xFF), block_table=batch.block_table
    )  # a server's tables name blocks that exist
    output, _ = batch.decode(target.backend)
    host, scores = on_cpu(batch), batch.scan(target.backend).cpu()
    held = batch.block_table.shape[1] * batch.params.layout.block_size
    for row, length in enumerate(batch.lengths):
        own = (x[row : row + 1] for x in (batch.block_table, batch.seq_lens, batch.budgets))
        step = DecodeBatch(*own, max_seq_len=min(length + 37, held))
        values = compare_rows(
            target.backend,
            batch.bound(target.backend),
            batch.query[row : row + 1],
            output[row : row + 1],
            step,
        )
        wanted = torch.tensor(expected(host, output.cpu(), scores, row))
        torch.testing.assert_close(torch.cat(values).cpu(), wanted, atol=6e-3, rtol=1e-2)


@over_targets("cpu", "triton", "cuda")
def test_bounds_change_nothing(target: Target) -> None:
    """What a host that does not wait passes to scan and select."""
    batch = target.build(Case((33, 1, 0, 70), (8, 1, 4, 69), (4, 2), 64))
    backend, layer, params = target.backend, batch.bound(target.backend), batch.params
    held = batch.block_table.shape[1] * params.layout.block_size
    rows = (batch.query[: len(batch.lengths)], batch.block_table, batch.seq_lens)
    scores, longer = backend.scan(layer, *rows), backend.scan(layer, *rows, held)
    assert longer.shape[2] == held > (longest := scores.shape[2])
    assert torch.equal(longer[..., :longest], scores)
    assert (longer[..., longest:] == -torch.inf).all()
    chosen = backend.select(params, scores, batch.seq_lens, batch.budgets)
    wider = backend.select(params, longer, batch.seq_lens, batch.budgets, held)
    assert torch.equal(wider[..., : chosen.shape[2]], chosen)
    assert (wider[..., chosen.shape[2] :] == -1).all()
