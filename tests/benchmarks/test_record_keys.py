"""What is recorded of an engine's layers, and the recordings of the benchmarks."""

import json

import keys
import numpy as np
import pytest
import torch
from cases import Case
from keys import MODELS, Heads, Recording
from record_keys import QUERIES, KeyRecorder, heads_of, kept

from vllm_adamas.backends.reference.backend import ReferenceBackend
from vllm_adamas.errors import AdamasError


def test_a_recorder_keeps_keys_and_decode_queries_in_order() -> None:
    record: dict = {}
    recorder = KeyRecorder(ReferenceBackend(), 5, record)
    batch = Case((70,), 1 << 30, heads=(4, 2), dtype=torch.float32, padding=0).build(recorder)
    recorder.append(batch.bound(recorder), batch.key[:3], batch.value[:3], torch.tensor([0, -1, 2]))
    for _ in range(2):
        batch.decode(recorder)
    found, queries = record[5]
    assert torch.equal(torch.cat(found), torch.cat((batch.key[:70], batch.key[[0, 2]])))
    assert torch.equal(torch.cat(queries), batch.query.repeat(2, 1, 1))


def test_the_heads_that_were_asked_for_are_taken() -> None:
    key, query = torch.randn(9, 2, 8), torch.randn(3, 4, 8)
    record = {1: ([key[:4], key[4:]], [query[:1], query[1:]]), 0: ([-key], [-query])}
    taken, asked = heads_of(record, [(1, 1), (0, 0)])
    assert torch.equal(taken, torch.stack((key[:, 1], -key[:, 0]), 1))
    assert torch.equal(asked, torch.stack((query[:, 2:], -query[:, :2]), 1))


@pytest.mark.parametrize("head", [(2, 0), (1, 2), (3, 0)])
def test_heads_that_a_model_does_not_have_are_refused(head: tuple[int, int]) -> None:
    record = {n: ([torch.zeros(9, 2, 8)], [torch.zeros(3, 4, 8)]) for n in range(2)}
    record[3] = ([], [])  # it has a sliding window
    with pytest.raises(
        AdamasError, match=f"^the model has no KV head {head[1]} in layer {head[0]}"
    ):
        heads_of(record, [head])


def test_the_start_and_the_end_of_a_window_are_kept() -> None:
    window = torch.arange(100)[:, None, None]
    few = kept(window, 40)[:, 0, 0].tolist()
    assert few == [*range(keys.FIRST), *range(100 - 40 + keys.FIRST, 100)]
    assert torch.equal(kept(window, None), window)
    assert torch.equal(kept(window, 200), window)


@pytest.mark.parametrize("model", sorted({model for model, _ in MODELS.values()}))
def test_a_recording_says_what_it_holds(model: str) -> None:
    path = keys.RECORDINGS / f"keys_{model}.npz"
    assert path.stat().st_size < 3.3e6
    with np.load(path) as file:
        about, codes, query = json.loads(str(file["about"])), file["codes"], file["query"]
    windows, tokens, heads, size = codes.shape
    assert (len(about["texts"]), len(about["heads"])) == (windows, heads)
    assert tokens <= about["context"]
    assert query.shape[:3] == (windows, QUERIES, heads)
    assert MODELS[size][0] == about["model"] == model


@pytest.mark.parametrize(("size", "group"), [(64, 3), (128, 3), (256, 4)])
def test_recorded_queries_attend_to_few_tokens_and_to_recent_ones(size: int, group: int) -> None:
    """Which holds only if keys and queries fit, and lie in the order of their positions."""
    recording = Recording.of(size, torch.device("cpu"))
    heads, tokens = Heads(group * recording.heads, recording.heads, size), 8192
    for row in range(recording.windows):
        query = recording.query(heads, row).view(heads.kv, group, size)
        key = recording.keys(heads.kv, row, torch.arange(tokens), tokens)
        shares = (torch.einsum("hgd,thd->hgt", query, key) * size**-0.5).softmax(-1)
        assert shares.topk(tokens // 32).values.sum(-1).min() > 0.4
        recent = shares.unflatten(-1, (128, 64)).sum(-1)  # of blocks of 64 tokens
        assert (recent[..., -1] > 2 * recent.median(-1).values).all()
