"""The reference operations from first principles; every kernel is then tested against them."""

import math

import pytest
import torch
from cases import exact_weights
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_adamas.backends.reference import signature as sig
from vllm_adamas.backends.reference.backend import select_tokens
from vllm_adamas.backends.softmax import soft_cap, softmax
from vllm_adamas.config import PAPER_THRESHOLD, AdamasConfig, Coding
from vllm_adamas.layout import HEAD_SIZES, TILE, WORD, coded_size

UNHURRIED = settings(deadline=None)  # a busy machine fails no test
every_head_size = pytest.mark.parametrize("size", HEAD_SIZES)
seeds = st.integers(0, 2**32 - 1)
sizes = st.sampled_from(HEAD_SIZES)
coded_sizes = st.sampled_from(sorted({coded_size(size) for size in HEAD_SIZES}))
FIXED = Coding(0.75, relative=False)
RMS = Coding(0.75, relative=True)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_codes(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 4, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def matrix(size: int) -> torch.Tensor:
    """The transform as a matrix ``[D, S]``, one basis vector at a time."""
    return sig.hadamard(torch.eye(size))


@pytest.mark.parametrize("cap", [0.0, 1.5])
@pytest.mark.parametrize("sinks", [None, torch.tensor([-torch.inf, -2.0, 3.0, 90.0])])
def test_softmax_is_what_its_definition_says(cap: float, sinks: torch.Tensor | None) -> None:
    logits = 5 * randn(4, 3, 50)
    shares = None if sinks is None else sinks[:, None]
    weights = softmax(soft_cap(logits, cap), shares)
    expected = exact_weights(logits, cap, sinks).float()
    torch.testing.assert_close(weights, expected, atol=1e-6, rtol=1e-5)


def test_a_soft_cap_keeps_the_order_and_small_logits() -> None:
    logits = torch.linspace(-300, 300, 1001)
    capped = soft_cap(logits, 50.0)
    assert (capped.diff() >= 0).all()
    assert capped.abs().max() <= 50
    torch.testing.assert_close(capped[500], logits[500])
    torch.testing.assert_close(soft_cap(logits / 1e4, 50.0), logits / 1e4)


@every_head_size
def test_hadamard_is_orthonormal(size: int) -> None:
    """Its own transpose, and so its own inverse, where no zeros are added."""
    h = matrix(size)
    torch.testing.assert_close(h @ h.T, torch.eye(size))
    if size % WORD == 0:
        torch.testing.assert_close(h, h.T)


#: Dimensions of the head in each block of the transform, and the size of the blocks.
BLOCKS = {
    32: ([32], 32),
    64: ([64], 64),
    80: ([80], 128),
    96: ([32] * 3, 32),
    112: ([112], 128),
    128: ([128], 128),
    160: ([32] * 5, 32),
    192: ([64] * 3, 64),
    224: ([32] * 7, 32),
    256: ([256], 256),
    512: ([512], 512),
}


@every_head_size
def test_hadamard_is_block_diagonal_with_equal_magnitudes(size: int) -> None:
    parts, block = BLOCKS[size]
    inside = torch.block_diag(*[torch.ones(part, block) for part in parts]).bool()
    magnitude = matrix(size).abs()
    assert (magnitude[~inside] == 0).all()
    torch.testing.assert_close(magnitude[inside], torch.full((block * size,), block**-0.5))


def test_hadamard_is_sylvesters() -> None:
    h = torch.ones(1, 1)
    while len(h) < 64:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    torch.testing.assert_close(matrix(64), h / 8)


@UNHURRIED
@given(seeds, sizes)
def test_hadamard_preserves_dot_products(seed: int, size: int) -> None:
    a, b = randn(2, 5, size, seed=seed)
    moved = sig.hadamard(a) @ sig.hadamard(b).T
    torch.testing.assert_close(moved, a @ b.T, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("coding", [FIXED, RMS], ids=str)
def test_bucketize_counts_the_thresholds_at_or_below(coding: Coding) -> None:
    x = randn(7, 96)
    t = coding.threshold * (x.pow(2).mean(-1).sqrt() if coding.relative else torch.ones(7))
    for row in range(7):
        bounds = torch.stack((-t[row], torch.tensor(0.0), t[row]))
        expected = torch.bucketize(x[row], bounds, right=True)
        assert torch.equal(sig.bucketize(x, coding)[row].long(), expected)


def test_bucketize_at_the_thresholds_and_beyond() -> None:
    x = torch.tensor([-torch.inf, -0.76, -0.75, -1e-9, -0.0, 0.0, 0.74, 0.75, torch.inf, torch.nan])
    assert sig.bucketize(x, FIXED).tolist() == [0, 0, 1, 1, 2, 2, 2, 3, 3, 0]


def test_paper_threshold_is_ten_of_an_unnormalised_transform() -> None:
    """With a matrix of ones the paper's evaluation code compares with -10, 0 and 10."""
    x = 3 * randn(5, 128)
    plain = sig.hadamard(x) * 128**0.5
    expected = torch.bucketize(plain, torch.tensor([-10.0, 0.0, 10.0]), right=True)
    coding = AdamasConfig(score="manhattan").coding(128)
    assert coding == Coding(PAPER_THRESHOLD / 128**0.5, relative=False)
    assert torch.equal(sig.bucketize(sig.hadamard(x), coding).long(), expected)


@UNHURRIED
@given(seeds, coded_sizes)
def test_pack_and_unpack(seed: int, size: int) -> None:
    bits = random_codes(3, size, seed=seed) & 1
    words = sig.pack(bits)
    assert words.dtype == torch.int32
    assert torch.equal(sig.unpack(words), bits)
    for word in range(size // WORD):  # bit i of word w is dimension 32 * w + i
        value = sum(int(b) << i for i, b in enumerate(bits[0, word * WORD :][:WORD]))
        assert words[0, word].item() & 0xFFFFFFFF == value


def test_untile_puts_tokens_in_order() -> None:
    tokens, words = 3 * TILE, 4
    plain = torch.arange(tokens * words).view(tokens, words)
    tiled = torch.empty(tokens // TILE, words, TILE, dtype=torch.int64)
    for token in range(tokens):
        tiled[token // TILE, :, token % TILE] = plain[token]
    assert torch.equal(sig.untile(tiled), plain)


@UNHURRIED
@given(seeds, sizes)
def test_manhattan_distance_by_thermometer_planes(seed: int, size: int) -> None:
    """Kernels count bits of [c >= 1], [c >= 2] and [c >= 3]; the planes of a code are hi and lo."""
    a, b = random_codes(2, size, seed=seed)
    hi, lo = (torch.stack((a, b)) >> 1) & 1, torch.stack((a, b)) & 1
    planes = torch.stack((hi | lo, hi, hi & lo))  # [3, 2, D]
    by_bits = (planes[:, 0] ^ planes[:, 1]).sum().item()
    plain = sum(abs(int(x) - int(y)) for x, y in zip(a, b, strict=True))
    assert by_bits == plain
    assert sig.manhattan_score(a, b.unsqueeze(0)).item() == -plain


@UNHURRIED
@given(seeds, sizes)
def test_dot_score_is_the_sum_over_levels(seed: int, size: int) -> None:
    q, codes = randn(size, seed=seed), random_codes(4, size, seed=seed)
    scale = randn(4, seed=seed).to(torch.float16)
    step = q.abs().max().item() / 7
    for token, score in enumerate(sig.dot_score(q, codes, scale).tolist()):
        whole = sum(
            round(float(x) / step) * (-3, -1, 1, 3)[c]
            for x, c in zip(q, codes[token].tolist(), strict=True)
        )
        assert score == pytest.approx(whole * scale[token].item(), rel=1e-6, abs=1e-9)


@UNHURRIED
@given(seeds)
def test_quantized_query_is_within_half_a_step(seed: int) -> None:
    q = randn(128, seed=seed)
    whole, step = sig.quantize_query(q)
    assert whole.abs().max() == sig.QUERY_MAX == 7
    assert ((whole * step - q).abs() <= 0.5001 * step).all()


@pytest.mark.parametrize("value", [0.0, 1e-45, torch.inf, torch.nan])
def test_quantized_query_is_always_finite(value: float) -> None:
    whole, _ = sig.quantize_query(torch.full((64,), value))
    assert whole.isfinite().all()
    assert (whole.abs() <= sig.QUERY_MAX).all()


@UNHURRIED
@given(seeds, sizes)
def test_scale_is_the_best_factor(seed: int, size: int) -> None:
    """No other factor brings the levels closer to the key."""
    x = randn(size, seed=seed)
    codes = sig.bucketize(x, RMS)
    levels = 2.0 * codes.float() - 3.0
    scale = sig.code_scale(x, codes).float()
    best = (x - scale * levels).pow(2).sum()
    for other in (0.99, 1.01):
        assert (x - other * scale * levels).pow(2).sum() > best


@pytest.mark.parametrize("value", [0.0, 1e-6, 1e30, torch.inf, torch.nan])
def test_scale_is_always_finite(value: float) -> None:
    x = torch.full((64,), value)
    assert sig.code_scale(x, sig.bucketize(x, RMS)).isfinite()


def test_dot_score_estimates_the_dot_product() -> None:
    """The point of it all: with a signature per key the order of the keys is mostly right."""
    q, keys = randn(128, seed=1), randn(2000, 128, seed=2)
    x = sig.hadamard(keys)
    codes = sig.bucketize(x, AdamasConfig().coding(128))
    scores = sig.dot_score(sig.hadamard(q), codes, sig.code_scale(x, codes))
    correlation = torch.corrcoef(torch.stack((scores, keys @ q)))[0, 1]
    assert correlation > 0.9


def test_logits_estimate_those_of_the_softmax() -> None:
    """In base 2, with the step of the query and the scale of the key in them."""
    q, keys = randn(128, seed=1), randn(2000, 128, seed=2)
    x = sig.hadamard(keys)
    codes = sig.bucketize(x, AdamasConfig().coding(128))
    scale, logit_scale = sig.code_scale(x, codes), 128**-0.5 / math.log(2)
    logits = sig.logits(sig.hadamard(q), codes, scale, logit_scale)
    exact = keys @ q * logit_scale
    assert (logits - exact).std() < 0.4 * exact.std()
    slope = (logits * exact).sum() / exact.square().sum()
    assert slope == pytest.approx(0.88, abs=0.05)  # of a least-squares fit with 2-bit codes


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e38, torch.inf, torch.nan])
def test_logits_are_always_finite(value: float) -> None:
    codes, scale = random_codes(4, 64), torch.full((4,), sig.FP16_MAX, dtype=torch.float16)
    logits = sig.logits(torch.full((64,), value), codes, scale, 1e30)
    assert logits.isfinite().all()
    assert (logits - sig.log_sum(logits)).isfinite().all()


@UNHURRIED
@given(seeds, st.integers(1, 1024), st.sampled_from([0.0, 0.3, 3.0, 30.0, 1e30]))
def test_log_sum_is_close_and_has_no_order(seed: int, count: int, spread: float) -> None:
    x = spread * randn(count, seed=seed)
    found = sig.log_sum(x)
    exact = (x.double() * math.log(2)).logsumexp(0) / math.log(2) - sig.SAMPLE_BITS
    assert found.item() == pytest.approx(exact.item(), abs=0.09, rel=1e-6)
    assert torch.equal(found, sig.log_sum(x.flip(0)))
    assert torch.equal(found, sig.log_sum(x[torch.randperm(count)]))


def test_small_logits_stay_apart() -> None:
    """Heads whose attention is nearly uniform rank their tokens like others."""
    logits = 1e-5 * randn(4096)
    scores = logits - sig.log_sum(logits[:512])
    assert len(scores.unique()) > 0.98 * len(logits.unique())


@pytest.mark.parametrize("length", [1, 15, 16, 17, 500, 511, 512])
def test_the_sample_of_a_short_context_is_the_context(length: int) -> None:
    assert torch.equal(sig.sampled_tokens(length), torch.arange(length))


@pytest.mark.parametrize("length", [513, 528, 5000, 2**17 + 3, 2**30])
def test_the_sample_of_a_long_context_is_spread_over_it(length: int) -> None:
    tiles = sig.sampled_tokens(length).view(sig.SAMPLE_TILES, TILE)
    assert torch.equal(tiles - tiles[:, :1], torch.arange(TILE).expand_as(tiles))
    total = -(-length // TILE)
    assert tiles[:, 0].tolist() == [i * total // 32 * TILE for i in range(32)]
    assert tiles.max() < length


@st.composite
def selections(draw):
    """Scores from three values, so that most of them tie, and a selection that fits."""
    scores = draw(st.lists(st.sampled_from([-1.0, 0.0, 2.5]), min_size=1, max_size=60))
    budget = draw(st.integers(1, len(scores) + 2))
    sinks = draw(st.integers(0, budget - 1))
    recent = draw(st.integers(0, budget - 1 - sinks))
    return scores, budget, sinks, recent


@UNHURRIED
@given(selections())
def test_select_tokens_is_an_exact_top_k(selection) -> None:
    scores, budget, sinks, recent = selection
    length = len(scores)
    forced = [t for t in range(length) if t < sinks or t >= length - recent]
    rest = [t for t in range(length) if t not in forced]
    rest.sort(key=lambda t: (scores[t], t), reverse=True)  # of equal scores the most recent
    expected = sorted([*forced, *rest[: max(0, budget - len(forced))]])
    chosen = select_tokens(torch.tensor(scores), budget, sinks, recent)
    assert chosen.tolist() == expected
    assert len(chosen) == min(budget, length)
