"""One generator of batches, for every kernel of every device: corners, odd sizes, ties, garbage."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property

import torch

from vllm_adamas.backends.base import COUNTERS, Backend, DecodeBatch, Layer, Params
from vllm_adamas.backends.inspect import Inspectable
from vllm_adamas.backends.reference import signature as sig
from vllm_adamas.backends.reference.backend import select_tokens
from vllm_adamas.config import AdamasConfig
from vllm_adamas.dtypes import ELEMENTS
from vllm_adamas.layout import TILE, PageLayout

#: Largest ||output - exact|| / ||exact|| of one query head, by the element type of the output. The
#: sums are taken in float32, so bf16 and fp16 are left with the rounding of inputs to the product.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}

#: A transformed value this close to a threshold (in units of the vector's RMS), or a query value
#: this close to the middle of two steps, may fall on either side: the order of additions differs.
NEAR = 1e-5

SPARE_BLOCKS = 3  #: never written; the unused part of the block table points at one of them
NO_BLOCK = 1 << 30


@dataclass(frozen=True)
class Case:
    """One batch of R rows, and how its layer is configured.

    Args:
        lengths: tokens in the context of each row; 0 is a padded row.
        budgets: one for all rows, or one per row; of any size.
        heads: query heads and KV heads.
        dtype: of queries, keys and values; of the page too unless ``fp8``.
        data: ``normal``; ``equal`` (all keys of a head are one vector), ``few`` (three vectors) and
            ``zero`` make massive ties; ``huge`` (1e4) and ``tiny`` (1e-6) scale keys and values.
        padding: trailing query rows and tokens (slot -1) that belong to no request.
        centred: keys have a large mean, which is subtracted before they are coded.
        soft_cap: of the logits, 0 for none.
        learned_sinks: those of the first and the last query head; the others lie between. All are
            bfloat16 values.
    """

    lengths: tuple[int, ...] = (1, 63, 64, 65, 0, 200)
    budgets: int | tuple[int, ...] = 16
    heads: tuple[int, int] = (8, 2)
    head_size: int = 128
    block_size: int = 64
    dtype: torch.dtype = torch.bfloat16
    fp8: str | None = None
    score: str = "dot"
    selection: str = "query_head"
    combine: str = "sum"
    sinks: int = 0
    recent: int = 0
    window: int = 0
    data: str = "normal"
    padding: int = 2
    centred: bool = False
    soft_cap: float = 0.0
    learned_sinks: tuple[float, float] | None = None
    seed: int = 0

    @property
    def params(self) -> Params:
        options = {"num_sink_tokens": self.sinks, "recent_window": self.recent}
        options["token_budget"] = max(256, self.sinks + self.recent + 1)
        config = AdamasConfig(
            score=self.score, selection=self.selection, combine=self.combine, **options
        )
        scales = {"k_scale": 0.37, "v_scale": 1.3} if self.fp8 else {}
        return Params.of(
            config,
            PageLayout(self.head_size, self.block_size, torch.uint8 if self.fp8 else self.dtype),
            num_query_heads=self.heads[0],
            num_kv_heads=self.heads[1],
            softmax_scale=self.head_size**-0.5,
            sliding_window=self.window,
            fp8=self.fp8,
            logits_soft_cap=self.soft_cap,
            **scales,
        )

    def build(self, backend: Backend, device: torch.device | str = "cpu") -> Batch:
        """The batch, its tokens appended through ``backend``; the same for every device."""
        g = torch.Generator().manual_seed(self.seed)
        params, rows, tokens = self.params, len(self.lengths), sum(self.lengths)
        mean = torch.zeros(self.heads[1], self.head_size)
        if self.centred:
            mean = 4 * torch.randn(mean.shape, generator=g)
            params = dataclasses.replace(params, key_mean=sig.hadamard(mean).to(device))
        if self.learned_sinks:
            sinks = torch.linspace(*self.learned_sinks, self.heads[0]).bfloat16()
            params = dataclasses.replace(params, sinks=sinks.float().to(device))
        used = [-(-n // self.block_size) for n in self.lengths]
        order = torch.randperm(sum(used) + SPARE_BLOCKS, generator=g).to(torch.int32)
        block_table = order[-1].repeat(rows, max(used) + 1)  # [R, blocks]
        slots, first = [torch.full((self.padding,), -1)], sum(used)
        for row in reversed(range(rows)):
            first -= used[row]
            block_table[row, : used[row]] = order[first : first + used[row]]
            token = torch.arange(self.lengths[row])
            block = block_table[row, token // self.block_size].long()
            slots.insert(0, block * self.block_size + token % self.block_size)
        # Keys and values are slices of one tensor, as a fused projection leaves them.
        kv = self._keys_and_values(tokens, mean, g)  # [T + padding, 2 * Hkv, D]
        query = torch.randn(rows + self.padding, self.heads[0], self.head_size, generator=g)
        budgets = (self.budgets,) * rows if isinstance(self.budgets, int) else self.budgets
        batch = Batch(
            params=params,
            kv=kv.to(device),
            slots=torch.cat(slots).to(device),
            memory=_garbage(params, len(order), g).to(device),
            query=query.to(self.dtype).to(device),
            block_table=block_table.to(device),
            seq_lens=torch.tensor(self.lengths, dtype=torch.int32, device=device),
            budgets=torch.tensor(budgets, dtype=torch.int32, device=device),
        )
        backend.append(batch.bound(backend), batch.key, batch.value, batch.slots)
        return batch

    def _keys_and_values(self, tokens: int, mean: torch.Tensor, g) -> torch.Tensor:
        kv_heads = self.heads[1]
        key = torch.randn(tokens + self.padding, kv_heads, self.head_size, generator=g)
        value = torch.randn(tokens + self.padding, kv_heads, self.head_size, generator=g)
        if self.data == "equal":
            key = key[:1].expand_as(key)
        elif self.data == "few":
            key = key[torch.randint(0, 3, (len(key),), generator=g)]
        elif self.data == "zero":
            key = torch.zeros_like(key)
        factor = {"huge": 1e4, "tiny": 1e-6}.get(self.data, 1.0)
        return torch.cat((key * factor + mean, value * factor), 1).to(self.dtype)


def _garbage(params: Params, blocks: int, g: torch.Generator) -> torch.Tensor:
    """What a used page may hold: NaN and infinity in K and V, any bits in the signatures.

    One head more than the layer has, so that blocks are not back to back.
    """
    layout = params.layout
    shape = (blocks, params.num_kv_heads + 1, layout.block_size, layout.token_bytes)
    memory = torch.randint(0, 256, shape, dtype=torch.uint8, generator=g).view(layout.dtype)
    layout.k(memory).view(torch.uint8).fill_(0xFF)  # NaN in every format
    layout.v(memory)[::2].view(torch.uint8).fill_(0xFF)
    if not params.fp8:
        layout.v(memory)[1::2] = torch.inf
    return memory


@dataclass
class Batch:
    """A built case. R rows, T tokens back to back in the order of the rows; both with padding."""

    params: Params
    kv: torch.Tensor  # [T, 2 * Hkv, D]
    slots: torch.Tensor  # [T]
    memory: torch.Tensor  # [blocks, Hkv + 1, N, C]
    query: torch.Tensor  # [R, Hq, D]
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    budgets: torch.Tensor

    @property
    def key(self) -> torch.Tensor:
        return self.kv[:, : self.params.num_kv_heads]

    @property
    def value(self) -> torch.Tensor:
        return self.kv[:, self.params.num_kv_heads :]

    def __setattr__(self, name: str, value) -> None:
        if name == "memory":
            vars(self).pop("kv_cache", None)
        super().__setattr__(name, value)

    @cached_property
    def kv_cache(self) -> torch.Tensor:
        return self.memory[:, : self.params.num_kv_heads]

    def bound(self, backend: Backend) -> Layer:
        return backend.bind(self.params, self.kv_cache)

    @property
    def lengths(self) -> list[int]:
        return self.seq_lens.tolist()

    def step(self, **changes) -> DecodeBatch:
        """What a decode step is given of the rows."""
        return DecodeBatch(self.block_table, self.seq_lens, self.budgets, **changes)

    def surrounded(self, byte: int) -> Batch:
        """The same rows where all else holds nothing but ``byte``: other blocks, the slots behind a
        context in its last block, a neighbour's head; and the columns behind it name no block."""
        layout, size = self.params.layout, self.params.layout.block_size
        memory = torch.full_like(self.memory.view(torch.uint8), byte).view(self.memory.dtype)
        slots = self.slots[self.slots >= 0]
        block, offset = slots // size, slots % size
        new, heads = dataclasses.replace(self, memory=memory), self.params.num_kv_heads
        for plane in (layout.k, layout.v, layout.scale):
            plane(memory)[block, :heads, offset] = plane(self.memory)[block, :heads, offset]
        at = (block, slice(heads), offset // TILE, slice(None), offset % TILE)
        for plane in (layout.hi, layout.lo):
            plane(memory)[at] = plane(self.memory)[at]
        column = torch.arange(self.block_table.shape[1], device=memory.device)
        behind = column >= -(-self.seq_lens[:, None] // size)
        return dataclasses.replace(new, block_table=self.block_table.masked_fill(behind, NO_BLOCK))

    def gathered(self, backend: Backend, dtype: torch.dtype | None = None) -> torch.Tensor:
        """K and V, ``[2, T, Hkv, D]`` of the queries' type unless told another."""
        shape = (2, sum(self.lengths), self.params.num_kv_heads, self.params.layout.head_size)
        out = torch.zeros(shape, dtype=dtype or self.query.dtype, device=self.query.device)
        backend.gather(self.bound(backend), self.block_table, self.seq_lens, *out)
        return out

    def stored(self) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V as the page can represent them, float32 ``[T, Hkv, D]``, without padding."""
        tokens = sum(self.lengths)
        scales = (self.params.k_scale, self.params.v_scale)
        planes = (self.key[:tokens].float(), self.value[:tokens].float())
        if not self.params.fp8:
            return planes
        kind = ELEMENTS[self.params.fp8].values
        top = torch.finfo(kind).max
        return tuple(
            (x / scale).clamp(-top, top).to(kind).float() * scale
            for x, scale in zip(planes, scales, strict=True)
        )

    def coded_keys(self) -> torch.Tensor:
        """What becomes codes: transformed keys less their mean, float32 ``[T, Hkv, S]``."""
        x = sig.hadamard(self.key[: sum(self.lengths)])
        return x if self.params.key_mean is None else x - self.params.key_mean

    def scan(self, backend: Inspectable) -> torch.Tensor:
        query = self.query[: len(self.lengths)]
        return backend.scan(self.bound(backend), query, self.block_table, self.seq_lens)

    def decode(self, backend: Backend, dtype: torch.dtype | None = None, **kwargs):
        """Output ``[R, Hq, D]`` with padding, NaN where nothing was written, and the counters.

        Args:
            kwargs: of the step (:class:`DecodeBatch`), or of this backend's decode.
        """
        about_step = {
            name: kwargs.pop(name)
            for name in ("max_seq_len", "positions", "num_requests", "overlap")
            if name in kwargs
        }
        output = torch.full_like(self.query, torch.nan, dtype=dtype)
        stats = torch.zeros(COUNTERS, dtype=torch.int64, device=output.device)
        step = self.step(**about_step)
        backend.decode(self.bound(backend), self.query, step, output, stats, **kwargs)
        return output, stats.tolist()

    def ambiguous(self) -> torch.Tensor:
        """Token sets whose query code depends on the order of additions: bool ``[R, sets]``."""
        params = self.params
        q = sig.hadamard(self.query[: len(self.lengths)]).unflatten(
            1, (params.num_kv_heads, params.group)
        )  # [R, Hkv, G, S]
        if params.score == "dot":
            if params.selection == "kv_head" and params.combine == "sum":
                q = q.sum(2, keepdim=True)
            steps = q / sig.quantize_query(q)[1]
            near = ((steps - steps.floor() - 0.5).abs() < sig.QUERY_MAX * NEAR).any(-1)
        else:
            near = near_threshold(q, params).any(-1)
        if params.selection == "kv_head":
            near = near.any(2, keepdim=True)
        return near.flatten(1)


def near_threshold(x: torch.Tensor, params: Params) -> torch.Tensor:
    """Transformed values whose code depends on the order of additions: bool, the shape of ``x``."""
    rms = x.square().mean(-1, keepdim=True).sqrt()
    t = sig.thresholds(x, params.coding)
    return torch.minimum(x.abs(), (x.abs() - t).abs()) < NEAR * rms


def exact_weights(
    logits: torch.Tensor,
    soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
    hidden: torch.Tensor | None = None,
) -> torch.Tensor:
    """Weights of attention by their definition: float64 ``[Hq, ..., L]``.

    Args:
        logits: scaled q.k, ``[Hq, ..., L]``.
        hidden: bool ``[..., L]``, tokens that are not seen.
    """
    x = logits.double()
    if soft_cap:
        x = soft_cap * (x / soft_cap).tanh()
    if hidden is not None:
        x = x.masked_fill(hidden, -torch.inf)
    top = x.amax(-1, keepdim=True)
    powers = (x - top).exp()
    total = powers.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + (sinks.double().view(-1, *[1] * (x.dim() - 1)) - top).exp()
    return powers / total


def relative_error(output: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """||output - exact|| / ||exact|| of each vector, less what subnormal outputs must lose."""
    kind, size = torch.finfo(output.dtype), output.shape[-1]
    error = (output.float() - exact.float()).norm(dim=-1) - size**0.5 * kind.tiny * kind.eps
    return error.clamp_min(0) / exact.float().norm(dim=-1).clamp_min(1e-30)


def _boundaries(block: int) -> tuple[int, ...]:
    return (1, 15, 16, 17, block - 1, block, block + 1, 0, 2 * block + 7, 3 * block)


MIXED = (200, 1, 65, 0, 300, 129)  #: contexts of the mixed cases
MIXED_BUDGETS = (1, 1, 64, 5, 299, 1000)  #: 1, context - 1, at and beyond the context

SINKS = (-3.0, 8.0)  #: learned sinks from next to none of the weight to most of it

#: How token sets are chosen: options of a case.
SETS = {
    "query_head": {"selection": "query_head"},
    "kv_head": {"selection": "kv_head"},
    "max": {"selection": "kv_head", "combine": "max"},
}

CASES = {
    "plain": Case(_boundaries(64)),
    "block32": Case(_boundaries(32), block_size=32),
    "block128": Case(_boundaries(128), block_size=128),
    "block48": Case(_boundaries(48), block_size=48),  # not a power of two
    "block544": Case((1, 543, 545, 0, 700), 500, (16, 2), 256, 544),  # beside recurrent layers
    "mixed": Case(MIXED, MIXED_BUDGETS),
    "mixed-kv_head": Case(MIXED, MIXED_BUDGETS, selection="kv_head"),
    "mixed-manhattan": Case(MIXED, MIXED_BUDGETS, score="manhattan"),
    "mixed-manhattan-kv_head": Case(MIXED, MIXED_BUDGETS, score="manhattan", selection="kv_head"),
    "mixed-max": Case(MIXED, MIXED_BUDGETS, selection="kv_head", combine="max"),
    "single-tokens": Case((1, 1, 1), (1, 2, 1)),
    "empty": Case((0, 0), 4),
    "group1": Case(heads=(2, 2)),
    "group3": Case(heads=(9, 3), selection="kv_head"),
    "group4": Case(heads=(4, 1), score="manhattan"),
    "group5": Case(heads=(5, 1), score="manhattan", selection="kv_head"),
    "group8": Case(heads=(8, 1), selection="kv_head"),
    "group1-max": Case(heads=(2, 2), selection="kv_head", combine="max"),
    "group8-max": Case(heads=(8, 1), selection="kv_head", combine="max"),
    "group16-max": Case(heads=(16, 1), selection="kv_head", combine="max"),
    "d64": Case(head_size=64, heads=(9, 3)),
    "d64-max": Case(head_size=64, heads=(9, 3), selection="kv_head", combine="max"),
    "d96": Case(head_size=96, block_size=32),
    "d96-manhattan": Case(head_size=96, score="manhattan"),
    "d96-max": Case(head_size=96, block_size=32, selection="kv_head", combine="max"),
    "d32": Case(head_size=32, heads=(4, 1)),
    "d80": Case(head_size=80, heads=(4, 4)),  # 128 coded dimensions
    "d80-max": Case(
        MIXED, MIXED_BUDGETS, (8, 2), 80, 32, selection="kv_head", combine="max", centred=True
    ),
    "d112": Case(head_size=112, heads=(7, 1), dtype=torch.float16),
    "d112-manhattan": Case(head_size=112, score="manhattan", selection="kv_head"),
    "d160": Case(head_size=160, heads=(2, 1)),
    "d192": Case(head_size=192, heads=(4, 1)),
    "d192-manhattan": Case(head_size=192, score="manhattan", selection="kv_head"),
    "d224": Case(head_size=224, heads=(4, 1), selection="kv_head"),
    "d256": Case(head_size=256, heads=(8, 1)),
    "d512-manhattan": Case(head_size=512, heads=(4, 1), score="manhattan"),
    "d512-max": Case(head_size=512, heads=(4, 2), selection="kv_head", combine="max", seed=2),
    "fp16": Case(dtype=torch.float16, heads=(9, 3)),
    "fp16-d64": Case(dtype=torch.float16, head_size=64, score="manhattan"),
    "fp32": Case(dtype=torch.float32),
    "fp32-d80": Case(dtype=torch.float32, head_size=80, heads=(3, 1)),
    "fp32-d256": Case(dtype=torch.float32, head_size=256, heads=(3, 1)),
    "e4m3": Case(fp8="e4m3"),
    "e4m3-fp16-d96": Case(fp8="e4m3", dtype=torch.float16, head_size=96),
    "e4m3-d112": Case(fp8="e4m3", head_size=112, heads=(4, 1)),
    "e5m2": Case(fp8="e5m2", heads=(9, 3), head_size=64),
    "e5m2-fp32": Case(fp8="e5m2", dtype=torch.float32, score="manhattan"),
    "equal": Case(MIXED, MIXED_BUDGETS, data="equal"),
    "equal-manhattan": Case(MIXED, MIXED_BUDGETS, data="equal", score="manhattan"),
    "few": Case(MIXED, 40, data="few"),
    "few-kv_head": Case(MIXED, 40, data="few", selection="kv_head"),
    "few-max": Case(MIXED, 40, data="few", selection="kv_head", combine="max"),
    "zero": Case(MIXED, 7, data="zero"),
    "zero-max": Case(MIXED, 7, data="zero", selection="kv_head", combine="max"),
    "huge": Case(data="huge"),
    "huge-max": Case(data="huge", selection="kv_head", combine="max"),
    "huge-fp16": Case(data="huge", dtype=torch.float16),
    "huge-e4m3": Case(data="huge", fp8="e4m3"),  # saturates
    "huge-e5m2": Case(data="huge", fp8="e5m2", score="manhattan"),
    "tiny": Case(data="tiny"),
    "tiny-fp16": Case(data="tiny", dtype=torch.float16, score="manhattan"),
    "tiny-e4m3": Case(data="tiny", fp8="e4m3"),
    "sinks": Case((300, 65, 40, 0), 40, sinks=4, recent=8),
    "sinks-max": Case((300, 65, 40, 0), 13, sinks=4, recent=8, selection="kv_head", combine="max"),
    "sinks-all-but-one": Case((300, 65, 40, 0), 13, sinks=4, recent=8, selection="kv_head"),
    "window-only": Case((300, 65, 40, 0), 40, recent=39, score="manhattan"),
    "sliding": Case((300, 1, 99, 100, 101, 0), 16, window=100),
    "little-budget": Case(MIXED, (0, -1, -(2**31), 0, 1, 2**31 - 1)),
    "little-budget-kv_head": Case(MIXED, (0, -1, 1, 0, -9, 2), heads=(9, 3), selection="kv_head"),
    "forced": Case((300, 65, 12, 13, 5, 0), (0, -5, 5, 12, 3, 1), sinks=4, recent=8),
    "forced-manhattan": Case((300, 41, 40, 99), 8, sinks=40, score="manhattan"),
    "centred": Case(MIXED, MIXED_BUDGETS, centred=True),
    "centred-d256": Case(head_size=256, heads=(4, 1), centred=True, selection="kv_head"),
    "centred-max": Case(
        head_size=256, heads=(4, 1), centred=True, selection="kv_head", combine="max"
    ),
    "centred-d96-manhattan": Case(head_size=96, score="manhattan", centred=True),
    "learned-sinks": Case(MIXED, MIXED_BUDGETS, (9, 3), 64, learned_sinks=SINKS),
    "learned-sinks-group8-d256": Case(
        MIXED,
        MIXED_BUDGETS,
        (8, 1),
        256,
        dtype=torch.float16,
        selection="kv_head",
        learned_sinks=SINKS,
    ),
    "learned-sinks-sliding": Case((300, 1, 99, 101, 0), window=100, learned_sinks=SINKS),
    "learned-sinks-extreme": Case(MIXED, 40, learned_sinks=(-1e4, 1e4)),  # all and nothing
    "soft-cap": Case(MIXED, MIXED_BUDGETS, (9, 3), 64, dtype=torch.float32, soft_cap=1.5),
    "soft-cap-group8-d256": Case(
        MIXED, MIXED_BUDGETS, (8, 1), 256, selection="kv_head", combine="max", soft_cap=1.5
    ),
    "soft-cap-huge": Case(MIXED, 40, data="huge", soft_cap=50.0),  # all logits are at the cap
    "soft-cap-sinks": Case(
        MIXED, MIXED_BUDGETS, (8, 1), 64, selection="kv_head", soft_cap=1.5, learned_sinks=SINKS
    ),
    "soft-cap-sinks-e4m3": Case(
        MIXED, MIXED_BUDGETS, (9, 3), 256, fp8="e4m3", soft_cap=1.5, learned_sinks=SINKS
    ),
    "soft-cap-sinks-sliding": Case(
        (300, 1, 99, 101, 0), heads=(8, 1), window=100, soft_cap=1.5, learned_sinks=SINKS
    ),
    "soft-cap-sinks-long": Case(
        (5000, 2049, 2048, 700), (128, 2048, 64, 1), (4, 1), 64, soft_cap=1.5, learned_sinks=SINKS
    ),
    "long": Case((5000, 2049, 2048, 700), (128, 2048, 64, 1), heads=(4, 1), head_size=64),
    "long-max": Case(
        (5000, 1025, 1024, 1023), (128, 30, 64, 1), (4, 1), 64, selection="kv_head", combine="max"
    ),
    "long-ties": Case((5000, 2048), (1000, 30), heads=(2, 1), head_size=64, data="few"),
}

#: Of every kind of page and row some, for what does not depend on the values.
KINDS = ("plain", "block48", "mixed-kv_head", "mixed-manhattan", "d96", "d192-manhattan", "fp16")
KINDS += ("d80", "fp32-d80", "e4m3-d112", "fp32", "e4m3", "e5m2", "forced", "sliding", "long")


def many(rows: int, heads: tuple[int, int] = (2, 1)) -> Case:
    """So many short contexts, empty ones among them."""
    g = torch.Generator().manual_seed(5)
    lengths, budgets = (torch.randint(0, n, (rows,), generator=g).tolist() for n in (40, 30))
    return Case(tuple(lengths), tuple(budgets), heads, 64, 16)


def as_bytes(x: torch.Tensor) -> torch.Tensor:
    """Comparable where a NaN is."""
    return x.contiguous().view(torch.uint8)


def written(batch: Batch, plane: torch.Tensor) -> torch.Tensor:
    """The tokens of the batch in a plane ``[blocks, Hkv, N, ...]``: ``[T, Hkv, ...]``."""
    slots = batch.slots[batch.slots >= 0]
    size = batch.params.layout.block_size
    return plane[slots // size, :, slots % size]


def codes(batch: Batch) -> torch.Tensor:
    """[T, Hkv, S]"""
    layout = batch.params.layout
    hi, lo = (
        sig.unpack(
            written(batch, sig.untile(plane(batch.kv_cache)).transpose(1, 2).transpose(1, 2))
        )
        for plane in (layout.hi, layout.lo)
    )
    return 2 * hi + lo


def check_append(ours: Batch, theirs: Batch) -> None:
    """K and V bit by bit; codes and scales but for what another order of additions can change.

    Args:
        theirs: the same case through the reference, on the CPU.
    """
    layout = theirs.params.layout
    for plane in (layout.k, layout.v):
        got, expected = (
            as_bytes(written(batch, plane(batch.kv_cache))) for batch in (ours, theirs)
        )
        assert torch.equal(got.cpu(), expected)
    near = near_threshold(theirs.coded_keys(), theirs.params)
    different = codes(ours).cpu() != codes(theirs)
    assert not (different & ~near).any()
    assert different.sum() <= 1e-4 * different.numel()
    # The fit of equal codes differs in the last bit of fp16 at most.
    got, expected = (
        written(batch, layout.scale(batch.kv_cache)).float().cpu() for batch in (ours, theirs)
    )
    within = (got - expected).abs() <= 2**-10 * expected.abs() + 2**-24
    assert (within | different.any(-1)).all()


def misleading(shape: tuple[int, ...], g: torch.Generator) -> torch.Tensor:
    """The largest scores lie where a sample of 256 looks: a pivot from it leaves too few tokens."""
    scores = torch.rand(shape, generator=g)
    scores[..., torch.arange(256) * shape[-1] // 256] += 10
    return scores


SCORES = {
    "normal": lambda shape, g: torch.randn(shape, generator=g),
    "three values": lambda shape, g: torch.randint(-1, 2, shape, generator=g).float(),
    "equal": lambda shape, g: torch.full(shape, -2.0),
    "ascending": lambda shape, g: torch.arange(shape[-1]).float().expand(shape).contiguous(),
    "descending": lambda shape, g: -torch.arange(shape[-1]).float().expand(shape).contiguous(),
    "extreme": lambda shape, g: torch.randn(shape, generator=g) * 3e38 / 6,
    "misleading": misleading,
}


def check_select(backend, scores, lens, budgets, sinks: int, recent: int) -> None:
    """Token by token against the reference.

    Args:
        scores: ``[R, sets, L]``; lens: int32 ``[R]`` on the same device; budgets: R integers.
    """
    params = Case(sinks=sinks, recent=recent).params
    limits = torch.tensor(budgets, dtype=torch.int32, device=scores.device)
    chosen = backend.select(params, scores, lens, limits)
    for row, length in enumerate(lens.tolist()):
        for head in range(scores.shape[1]):
            best = scores[row, head, :length].cpu()
            expected = select_tokens(best, budgets[row], sinks, recent).tolist()
            got = chosen[row, head].tolist()
            assert got == expected + [-1] * (len(got) - len(expected))


def check_surroundings(backend: Backend, batch: Batch, dtype=None, **kwargs) -> None:
    """What belongs to no token of the batch changes no bit of a result."""
    found = []
    for some in (
        batch,
        batch.surrounded(0x00),
        batch.surrounded(0xFF),
    ):  # 0xFF: NaN in every format
        output, stats = some.decode(backend, dtype, **kwargs)
        results = (some.scan(backend), output, some.gathered(backend))
        found.append([*(as_bytes(x) for x in results), torch.tensor(stats)])
    for others in found[1:]:
        assert all(map(torch.equal, found[0], others))


def check_lengths_are_cut(backend: Backend, batch: Batch, dtype=None, **kwargs) -> None:
    """Rows longer than the launch or the block table count as the longest that fit, and below 0 as 0."""
    held = batch.block_table.shape[1] * batch.params.layout.block_size
    wild = torch.tensor([2**31 - 1, -1, -(2**31), held + 1], device=batch.seq_lens.device)
    wrong = batch.seq_lens.clone()
    wrong[-len(wild) :] = wild[-len(wrong) :].to(torch.int32)

    def of(lengths: torch.Tensor) -> Batch:
        return dataclasses.replace(batch, seq_lens=lengths)

    for longest in (max(batch.lengths) // 2 + 1, held):
        (ours, counted), (theirs, expected) = (
            of(lengths).decode(backend, dtype, max_seq_len=longest, **kwargs)
            for lengths in (wrong, wrong.clamp(0, longest))
        )
        assert counted == expected
        assert torch.equal(as_bytes(ours), as_bytes(theirs))
    cut = wrong.clamp(0, held)
    assert torch.equal(as_bytes(of(wrong).scan(backend)), as_bytes(of(cut).scan(backend)))
    all_tokens = of(cut).gathered(backend)
    for room in (all_tokens.shape[1], all_tokens.shape[1] // 2):
        out = torch.zeros_like(all_tokens)
        some = of(wrong)
        layer = some.bound(backend)
        backend.gather(layer, some.block_table, some.seq_lens, out[0, :room], out[1, :room])
        assert torch.equal(as_bytes(out[:, :room]), as_bytes(all_tokens[:, :room]))
        assert not out[:, room:].any(), "written beyond the end"


def check_slots_are_skipped(backend: Backend, batch: Batch) -> None:
    """Slots behind the last block; here more memory follows, which shows what is written there."""
    pages, size = batch.kv_cache[:-1], batch.params.layout.block_size
    before = batch.memory.clone()
    slots = torch.full_like(batch.slots, len(pages) * size)
    slots[:4] = torch.tensor([slots[0] + size - 1, 2**62, 2**63 - 1, -(2**63)])
    backend.append(backend.bind(batch.params, pages), batch.key, batch.value, slots)
    assert torch.equal(as_bytes(before), as_bytes(batch.memory))
