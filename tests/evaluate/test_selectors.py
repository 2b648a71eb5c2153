"""The selectors of studies, against their definitions over the same pages."""

import dataclasses

import pytest
import torch
from cases import CASES, Case, exact_weights, relative_error

from vllm_adamas.backends.reference import ReferenceBackend
from vllm_adamas.evaluate.selectors import QUEST_PAGE, STREAMING_SINKS, SelectorBackend

REFERENCE = ReferenceBackend()
SOME = ["plain", "mixed", "group3", "d96", "e4m3", "sliding", "empty", "single-tokens"]
SOME += ["soft-cap-sinks"]
SOFTMAX = {"plain": {}, "soft cap and sinks": {"soft_cap": 1.5, "learned_sinks": (0.0, 6.0)}}
SELECTORS = ("oracle", "quest", "streaming_llm")


def context_keys(batch, row: int) -> torch.Tensor:
    """Keys of one context per query head, float32 ``[Hq, L, D]``, from what was appended."""
    key = batch.stored()[0].split(batch.lengths)[row].transpose(0, 1)
    return key.repeat_interleave(batch.params.group, 0)


def exact_scores(selector: str, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """[Hq, L], token by token"""
    heads, length, _ = key.shape
    scores = torch.empty(heads, length)
    for head in range(heads):
        for token in range(length):
            if selector == "oracle":
                value = key[head, token] @ query[head]
            elif selector == "quest":
                first = token // QUEST_PAGE * QUEST_PAGE
                page = key[head, first : first + QUEST_PAGE]
                bounds = torch.stack((page.amin(0) * query[head], page.amax(0) * query[head]))
                value = bounds.amax(0).sum()
            else:
                value = torch.inf if token < STREAMING_SINKS else token
            scores[head, token] = value
    return scores


def attention(params, query, key, value, first: int = 0) -> torch.Tensor:
    """Exact, float32 ``[Hq, D]``.

    Args:
        query: ``[Hq, D]``, of the heads from ``first`` on.
        key, value: ``[Hq, L, D]``.
    """
    logits = (key.double() @ query.double().unsqueeze(-1)).squeeze(-1) * params.softmax_scale
    sinks = None if params.sinks is None else params.sinks[first : first + len(query)]
    weights = exact_weights(logits, params.logits_soft_cap, sinks)  # [Hq, L]
    return (weights.unsqueeze(1) @ value.double()).squeeze(1).float()


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("name", SOME)
def test_scan(selector: str, name: str) -> None:
    batch = CASES[name].build(REFERENCE)
    scores = batch.scan(SelectorBackend(REFERENCE, selector))
    for row, length in enumerate(batch.lengths):
        assert (scores[row, :, length:] == -torch.inf).all()
        exact = exact_scores(selector, batch.query[row].float(), context_keys(batch, row))
        torch.testing.assert_close(scores[row, :, :length], exact, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("name", SOME)
def test_decode_attends_to_what_it_selects(selector: str, name: str) -> None:
    batch = CASES[name].build(REFERENCE)
    backend = SelectorBackend(REFERENCE, selector)
    output, stats = batch.decode(backend)
    assert stats[0] == 0  # counters are of the backend's own decode
    dense, _ = dataclasses.replace(batch, budgets=batch.seq_lens).decode(REFERENCE)
    value = batch.stored()[1].split(batch.lengths)
    for row, (length, budget) in enumerate(zip(batch.lengths, batch.budgets.tolist(), strict=True)):
        if budget >= length or batch.params.sliding_window:
            assert torch.equal(output[row], dense[row])
            continue
        key = context_keys(batch, row)
        scores = exact_scores(selector, batch.query[row].float(), key)
        for head in range(len(key)):
            best = scores[head].flip(0).sort(descending=True, stable=True).indices[:budget]
            tokens = length - 1 - best
            exact = attention(
                batch.params,
                batch.query[row, head : head + 1],
                key[head : head + 1, tokens],
                value[row][None, tokens, head // batch.params.group],
                first=head,
            )
            assert relative_error(output[row, head], exact[0]) < 8e-3


def test_the_oracle_keeps_the_most_attention() -> None:
    """Its own scores are the dense logits, so its mass bounds that of every other selector."""
    from vllm_adamas.evaluate.recorders import MassRecord, Shadow

    batch = Case((700, 300), 40, heads=(6, 2), selection="query_head").build(REFERENCE)
    kept = {}
    for name in (*SELECTORS, "dot"):
        inner = REFERENCE if name == "dot" else SelectorBackend(REFERENCE, name)
        record = MassRecord()
        batch.decode(Shadow(inner, 3, record, stride=1))
        assert record.layers() == [3]
        assert record.rows[3, 40] == 2
        kept[name] = record.mean("mass", 40)
        torch.testing.assert_close(record.mean("oracle", 40), kept["oracle"], atol=1e-5, rtol=1e-5)
        assert (kept[name] <= kept["oracle"] + 1e-6).all()
    assert kept["oracle"].mean() > kept["dot"].mean() > kept["streaming_llm"].mean()


@pytest.mark.parametrize("softmax", SOFTMAX.values(), ids=SOFTMAX)
@pytest.mark.parametrize("selection", ["query_head", "kv_head"])
def test_shadow_sees_the_error_of_the_output(selection: str, softmax: dict) -> None:
    """Against attention over the appended keys and values; of dense rows, that of other budgets."""
    from vllm_adamas.evaluate.recorders import MassRecord, Shadow

    case = Case((400,), 30, (2, 1), dtype=torch.float32, selection=selection, padding=0, **softmax)
    batch, record, others = case.build(REFERENCE), MassRecord(), MassRecord((8, 30, 300))
    output, _ = batch.decode(Shadow(REFERENCE, 0, record, stride=1))
    dataclasses.replace(batch, budgets=batch.seq_lens).decode(
        Shadow(REFERENCE, 0, others, stride=1)
    )
    key, value = (x.transpose(0, 1).expand(2, -1, -1) for x in batch.stored())
    dense = attention(batch.params, batch.query[0], key, value)
    expected = (output[0] - dense).norm(dim=-1) / dense.norm(dim=-1)
    for found in (record, others):
        error = found.mean("error", 30)[0].float()
        torch.testing.assert_close(error, expected, atol=1e-4, rtol=1e-4)
        off, whole = (output[0] - dense).norm(), dense.norm()
        together = found.mean("together", 30)[0].float()
        torch.testing.assert_close(together, off / whole, atol=1e-4, rtol=1e-4)
    few, many = (others.mean("error", size).mean() for size in (8, 300))
    assert few > expected.mean() > many > 0
