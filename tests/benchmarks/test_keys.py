"""The distributions of keys that decode is timed over are what their names say."""

from pathlib import Path

import keys
import pytest
import torch
from keys import DISTRIBUTIONS, Contexts, Heads, Recording

from vllm_adamas.errors import AdamasError

HEADS = Heads(6, 2, 64)
TOKENS = 20000  # several chunks, and no multiple of one


def contexts(name: str, tokens: int = TOKENS, rows: int = 2, seed: int = 7, heads=HEADS):
    return Contexts(name, heads, tokens, rows, torch.Generator().manual_seed(seed))


def keys_of(made: Contexts, row: int = 0) -> torch.Tensor:
    return torch.cat(list(made.keys(row)))


def scores(made: Contexts, row: int = 0) -> torch.Tensor:
    """Of every query head and token, ``[Hq, T]``, in standard deviations of Gaussian keys' scores."""
    heads = made.heads
    query = made.query[row].view(heads.kv, heads.group, heads.size)
    found = torch.einsum("hgd,thd->hgt", query, keys_of(made, row)) / query.norm(dim=-1)[..., None]
    return found.flatten(0, 1)


SYNTHETIC = [name for name in DISTRIBUTIONS if name != "real"]


@pytest.mark.parametrize("name", SYNTHETIC)
def test_a_seed_gives_the_same_keys_and_queries(name: str) -> None:
    first, again, other = contexts(name), contexts(name), contexts(name, seed=8)
    for row in range(2):
        made = keys_of(first, row)
        assert made.shape == (TOKENS, HEADS.kv, HEADS.size)
        assert torch.equal(made, keys_of(again, row))
        assert not torch.equal(made, keys_of(other, row))
    assert first.query.shape == (2, HEADS.query, HEADS.size)
    assert torch.equal(first.query, again.query)


@pytest.mark.parametrize("name", SYNTHETIC)
def test_rows_have_contexts_of_their_own(name: str) -> None:
    made = contexts(name, tokens=100)
    assert not torch.equal(keys_of(made, 0), keys_of(made, 1))


def test_gaussian_keys_are_independent() -> None:
    made = keys_of(contexts("gaussian"))
    assert made.mean().abs() < 0.01
    assert (made.std() - 1).abs() < 0.01
    assert (made[1:] * made[:-1]).mean().abs() < 0.01


def test_drift_is_a_stationary_process_with_its_correlation_length() -> None:
    made = keys_of(contexts("drift", 40 * keys.CORRELATION))  # 128 independent dimensions
    assert (made.square().mean() - 1).abs() < 0.1
    lag = keys.CORRELATION
    assert ((made[lag:] * made[:-lag]).mean() - torch.e**-1).abs() < 0.1
    # A step has the same size inside a chunk and where the next one begins.
    steps = (made[1:] - made[:-1]).square().mean((1, 2))
    border = torch.arange(1, len(made)) % keys.DRIFT_CHUNK == 0
    assert (steps[border].mean() / steps[~border].mean() - 1).abs() < 0.2


@pytest.mark.parametrize("heads", [HEADS, Heads(8, 1, 64), Heads(2, 2, 128)], ids=str)
def test_the_best_scores_of_region_lie_in_it(heads: Heads) -> None:
    found = scores(contexts("region", heads=heads))
    best = found.topk(keys.REGION // 2).indices  # [Hq, K]
    assert best.amax() - best.amin() < keys.REGION
    inside = found[:, best.amin() : best.amax()]
    assert torch.allclose(inside.mean(1), torch.tensor(keys.PROMINENCE), rtol=0.05)


def test_sinks_have_a_mean_and_larger_first_tokens() -> None:
    made = keys_of(contexts("sinks"))
    first, rest = made[: keys.SINKS], made[keys.SINKS :]
    mean = rest.mean(0)  # [Hkv, D]
    spread = (rest - mean).std()
    assert torch.allclose(mean.square().mean(-1).sqrt() / spread, torch.tensor(4.0), rtol=0.02)
    assert torch.allclose(first.mean(0), 3 * mean, atol=5.0)
    assert (first.norm(dim=-1).mean() / rest.norm(dim=-1).mean() - 3).abs() < 0.3


@pytest.mark.parametrize("distinct", [1, 2, 16])
def test_keys_repeat_in_a_pattern(distinct: int) -> None:
    made = keys_of(contexts(f"repeat{distinct}"))
    assert len(made.unique(dim=0)) == distinct
    assert torch.equal(made[distinct:], made[:-distinct])


# recordings


@pytest.fixture
def recording() -> Recording:
    """Keys that tell window, token and head; queries that tell window, position, head and member."""
    windows, tokens, streams, positions, group = 2, 50, 3, 8, 2
    key = torch.zeros(windows, tokens, streams, 4)
    query = torch.zeros(windows, positions, streams, group, 4)
    for axis, size in enumerate(key.shape[:3]):
        shape = [-1 if i == axis else 1 for i in range(3)]
        key[..., axis] = torch.arange(size).view(shape)
    for axis, size in enumerate(query.shape[:4]):
        shape = [-1 if i == axis else 1 for i in range(4)]
        query[..., axis] = torch.arange(size).view(shape)
    return Recording(key, query)


def places(recording: Recording, row: int, tokens: int) -> list[tuple[int, int]]:
    """(window, token) of every position of a context."""
    made = recording.keys(1, row, torch.arange(tokens), tokens)[:, 0, :2]
    return [tuple(place) for place in made.int().tolist()]


def test_a_recorded_context_goes_back_through_the_windows(recording: Recording) -> None:
    first, last = keys.FIRST, recording.tokens
    assert places(recording, 0, last) == [(0, t) for t in range(last)]
    # Row 3 ends in window 1, one token before its end.
    made = places(recording, 3, 70)
    assert made[-(last - 1 - first) :] == [(1, t) for t in range(first, last - 1)]
    assert made[:first] == [(0, t) for t in range(first)]
    middle = made[first : -(last - 1 - first)]
    assert middle == [(0, t) for t in range(last - len(middle), last)]


def test_recorded_windows_repeat_in_longer_contexts(recording: Recording) -> None:
    body = recording.tokens - keys.FIRST
    made = places(recording, 0, 10 * body)
    period = recording.windows * body
    assert made[keys.FIRST + period :] == made[keys.FIRST : -period]
    assert len(set(made[-period:])) == period


def test_recorded_queries_are_of_the_position_where_the_context_ends(recording) -> None:
    query = recording.query(Heads(16, 4, 4), 3).view(4, 4, 4)  # [Hkv, G, (window, position, ...)]
    assert query[0, 0].tolist() == [1, 6, 0, 0]
    assert query[2, 1].tolist() == [1, 6, 2, 1]
    assert query[0, 2].tolist() == [1, 5, 0, 0]  # a third member of a group of two
    assert query[3, 0].tolist() == [1, 4, 0, 0]  # a fourth head of three
    assert len(query.flatten(0, 1).unique(dim=0)) == 16


def test_scores_of_paired_heads_add(recording: Recording) -> None:
    paired = recording.paired()
    heads = Heads(3 * 2, 3, 4)
    positions = torch.arange(30)

    def found(one: Recording) -> torch.Tensor:  # [T, Hkv, G]
        query = one.query(heads, 0).view(3, 2, -1)
        return torch.einsum("hgd,thd->thg", query, one.keys(3, 0, positions, 30))

    single = found(recording)
    pairs = [(0, 1), (0, 2), (1, 2)]
    expected = torch.stack([single[:, i] + single[:, j] for i, j in pairs], 1)
    assert torch.equal(found(paired), expected)


def test_a_recording_is_read_as_it_was_written(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(2, 40, 3, 64, generator=generator) + 100 * torch.arange(3)[:, None]
    query = torch.randn(2, 8, 3, 2, 64, generator=generator)
    keys.save(tmp_path / "keys.npz", key, query, {"model": "none"})
    read = Recording.load(tmp_path / "keys.npz", torch.device("cpu"))
    assert ((read.key - key).abs() < 0.03).all()  # whatever the mean of a head is
    assert torch.allclose(read.query_of_position, query, atol=2e-3)


def test_head_sizes_without_a_recording_are_refused() -> None:
    with pytest.raises(AdamasError, match=r"^no keys of head size 96 .* 64, 128, 256"):
        contexts("real", heads=Heads(8, 2, 96))


@pytest.mark.parametrize("text", ["32x8", "32x8x128x1", "32xax128", "0x8x128", "30x8x128"])
def test_shapes_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="32x8x128"):
        Heads.parse(text)


def test_shapes_are_read_as_they_are_written() -> None:
    heads = Heads.parse("9x3x64")
    assert (heads, str(heads), heads.group) == (Heads(9, 3, 64), "9x3x64", 3)
