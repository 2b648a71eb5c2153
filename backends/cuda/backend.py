"""The CUDA backend: kernels of ``csrc/sm90`` for Hopper GPUs (sm_90a), loaded through tvm-ffi."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import torch

from vllm_adamas.backends.arguments import together, typed
from vllm_adamas.backends.base import MAX_GROUP, Backend, Params
from vllm_adamas.backends.workspace import Workspace
from vllm_adamas.errors import AdamasError

LIBRARY = Path(__file__).with_name("libadamas_cuda.so")
DTYPES = (torch.bfloat16, torch.float16)

#: Of csrc/sm90/params.h: tokens of a context (a bitmap of it has to fit into shared memory) and of a block,
#: rows of a step, and rows * KV heads * tokens of the longest context
MAX_CONTEXT, MAX_BLOCK, MAX_ROWS, MAX_STEP = 1 << 20, 1 << 16, 8192, 1 << 37
MAX_CANDIDATES = 32768  #: per token set
#: Tokens that encode samples, by the longest context (sample_bits of select.cuh)
SAMPLES = ((1 << 16, 1 << 10), (1 << 18, 1 << 11), (MAX_CONTEXT, 1 << 12))
ALL_STAGES = 7
MAX_CLUSTER = 16  #: blocks that share memory on Hopper
#: Policy of the fused kernel. One block for a (row, KV head) loses to the three kernels.
MIN_CLUSTER = 2
#: A block looks through its scores several times, so it has at most
SCORES_PER_BLOCK = 12288
#: The least of the best scores of groups of tokens bounds the k-th best if there are k groups; over the
#: token sets of a KV head a block has
GROUPS_PER_BLOCK = 128


def prefers_fused(cluster: int, seq_len: int, sets: int, budget: int) -> bool:
    """Whether the fused kernel in ``cluster`` blocks per (row, KV head) beats the three kernels.

    Args:
        seq_len: the longest of the batch.
        sets: token sets of a KV head.
        budget: tokens of a set.
    """
    return (
        cluster >= MIN_CLUSTER
        and seq_len * sets <= SCORES_PER_BLOCK * cluster
        and budget * sets <= GROUPS_PER_BLOCK * cluster
    )


def candidate_capacity(max_seq_len: int, budget: int) -> int:
    """Candidates that a token set may keep before its scores are computed again.

    A pivot ranks `rank` to half as many more in a sample (sample_rank and find_pivot of csrc/sm90), so
    that many times the stride are expected to reach it; six standard deviations more fit, and mostly
    the twice as many that tied scores may bring. Never less than for a shorter context.
    """
    wanted = 4096
    for limit, sample in SAMPLES:
        stride = min(max_seq_len, limit) / sample
        expected = budget / stride
        most = 1.5 * (expected + 6 * math.sqrt(1.5 * expected) + 3)
        wanted = max(wanted, int(stride * (most + 6 * math.sqrt(1.5 * most))))
        if max_seq_len <= limit:
            break
    return min(MAX_CANDIDATES, -(-wanted // 1024) * 1024)


@cache
def _library():
    if not LIBRARY.exists():
        raise AdamasError(
            f"the CUDA kernels are not built ({LIBRARY.name} is missing): reinstall the package with "
            "ADAMAS_BUILD_CUDA=1 on a host with nvcc 12.4 or newer."
        )
    import tvm_ffi

    return tvm_ffi.load_module(str(LIBRARY))


def _aligned(name: str, x: torch.Tensor, size: int = 16) -> None:
    """The kernels move ``size`` bytes at a time."""
    element = x.element_size()
    if x.data_ptr() % size or any(step * element % size for step in x.stride()[:-1]):
        raise ValueError(
            f"{name}: rows must start at multiples of {size} bytes, strides are {x.stride()}"
        )


def check_context(tokens: int) -> None:
    """
    Raises:
        AdamasError: contexts of so many tokens do not fit the kernels.
    """
    if tokens > MAX_CONTEXT:
        raise AdamasError(
            f"contexts of {tokens} tokens are longer than the {MAX_CONTEXT} that the CUDA kernels hold: "
            f"pass --max-model-len {MAX_CONTEXT}, or choose kernels=triton."
        )


def check_block(tokens: int) -> None:
    """
    Raises:
        AdamasError: the kernels do not find a token in blocks of so many.
    """
    if tokens > MAX_BLOCK:
        raise AdamasError(
            f"blocks of {tokens} tokens are larger than the {MAX_BLOCK} that the CUDA kernels divide by: "
            f"pass a --block-size of at most {MAX_BLOCK}, or choose kernels=triton."
        )


def check_step(rows: int, kv_heads: int, max_seq_len: int) -> None:
    """
    Raises:
        AdamasError: a decode step of so many rows, or of as many of such contexts, does not fit the kernels.
    """
    if rows > MAX_ROWS:
        raise AdamasError(
            f"decode steps of {rows} rows are larger than the {MAX_ROWS} that the CUDA kernels hold: pass "
            f"--max-num-seqs {MAX_ROWS}, or choose kernels=triton."
        )
    check_context(max_seq_len)
    if rows * kv_heads * max_seq_len > MAX_STEP:
        raise AdamasError(
            f"{rows} rows of {max_seq_len} tokens and {kv_heads} KV heads are more than the {MAX_STEP} "
            "tokens that the CUDA kernels count in a decode step: pass a smaller --max-num-seqs or "
            "--max-model-len, or choose kernels=triton."
        )


class CudaBackend(Backend):
    """A decode step is one kernel, or encode, scan and attend; no host synchronisation.

    It can be captured in a CUDA graph: launch shapes depend on the number of rows, ``max_seq_len``
    and the configured budget alone, lengths and budgets are read on the device. A step has up to ``MAX_ROWS``
    rows of up to ``MAX_CONTEXT`` tokens.
    """

    name = "cuda"

    def __init__(self):
        self._lib = _library()
        if not torch.cuda.is_available():
            raise AdamasError("the CUDA kernels need a visible NVIDIA GPU.")
        major, minor = torch.cuda.get_device_capability()
        if (major, minor) != (9, 0):
            raise AdamasError(
                f"the CUDA kernels are built for Hopper (sm_90a), this GPU is sm_{major}{minor}: serve "
                "with another attention backend."
            )
        self._workspace = Workspace()
        self._bytes: dict[tuple, int] = {}
        self._clusters: dict[tuple, int] = {}

    @property
    def description(self) -> str:
        return f"cuda (sm_90a, {torch.cuda.get_device_name()})"

    def reserve(self, params: Params, max_rows: int, max_seq_len: int) -> int:
        """Allocates the workspace for the largest decode step; returns its size in bytes.

        Call it before CUDA graphs are captured. Decode steps on one device share the workspace, so
        they must run on one stream.
        """
        device = torch.empty(0, device="cuda").device
        size = self.workspace_bytes(params, max_rows, max_seq_len)
        return self._workspace.at_least(device, size).numel()

    def workspace_bytes(self, params: Params, max_rows: int, max_seq_len: int) -> int:
        """Bytes of device memory that decode needs beside its arguments."""
        check_step(max_rows, params.num_kv_heads, max_seq_len)
        capacity = candidate_capacity(max_seq_len, params.budget.most(max_seq_len))
        return self._workspace_bytes(params, max_rows, capacity)

    def append(self, params, key, value, page, slot_mapping):
        heads, size = params.num_kv_heads, params.layout.head_size
        typed("slot_mapping", slot_mapping, torch.int64, None)
        tokens = slot_mapping.shape[0]
        key, value = key[:tokens], value[:tokens]  # vLLM pads keys, not slots
        typed("key", key, self._dtype(params, key), tokens, heads, size)
        typed("value", value, key.dtype, tokens, heads, size)
        together(key=key, value=value, page=page, slot_mapping=slot_mapping)
        if params.key_mean is not None:
            typed("key_mean", params.key_mean, torch.float32, heads, size)
            together(key=key, key_mean=params.key_mean)
            if not params.key_mean.is_contiguous():
                raise ValueError("key_mean: expected contiguous float32 [Hkv, D]")
        self._lib.append(
            key,
            value,
            slot_mapping,
            params.key_mean,
            params.coding.threshold,
            params.coding.relative,
            page,
            *self._numbers(params),
        )

    def decode(
        self,
        params,
        query,
        page,
        block_table,
        seq_lens,
        budgets,
        output,
        stats,
        *,
        max_seq_len: int | None = None,
        overlap: bool = False,
        stages: int = ALL_STAGES,
        cluster: int | None = None,
    ):
        """As :meth:`Backend.decode`; budgets far above the configured one cost a second look at the
        signatures.

        Args:
            max_seq_len: an upper bound of ``seq_lens``; default: what the block table and the
                kernels hold. Longer rows count as that long.
            overlap: as in :meth:`Backend.decode`.
            stages: which of the three kernels run (bits: encode, scan, attend), for measurements.
            cluster: blocks per (row, KV head) of the fused kernel, 0 for the three kernels; default:
                what :meth:`cluster_size` says.
        """
        rows, query = self._rows(params, query, block_table, seq_lens)
        output = output[:rows]
        heads, size = params.num_query_heads, params.layout.head_size
        typed("output", output, query.dtype, rows, heads, size)
        _aligned("output", output)
        typed("budgets", budgets, torch.int32, rows)
        typed("stats", stats, torch.int64, 4)
        together(query=query, page=page, output=output, budgets=budgets, stats=stats)
        longest = block_table.shape[1] * params.layout.block_size
        longest = min(longest, MAX_CONTEXT if max_seq_len is None else max_seq_len)
        check_step(rows, params.num_kv_heads, longest)
        if cluster is None:
            cluster = self.cluster_size(params, rows, query.dtype, page, longest)
        elif cluster and not self.fused_clusters(params, query.dtype, page, longest, cluster):
            raise ValueError(
                f"cluster: the fused kernel does not take this step in {cluster} blocks"
            )
        capacity = candidate_capacity(longest, params.budget.most(longest))
        work = self._work(query.device, params, rows, capacity)
        self._lib.decode(
            query,
            output,
            block_table,
            seq_lens,
            budgets,
            stats,
            work,
            longest,
            capacity,
            params.softmax_scale,
            params.score == "dot",
            params.selection == "query_head",
            params.num_sink_tokens,
            params.recent_window,
            params.sliding_window,
            params.coding.threshold,
            params.coding.relative,
            stages,
            cluster,
            overlap,
            page,
            *self._numbers(params),
        )

    def scan(self, params, query, page, block_table, seq_lens):
        rows, query = self._rows(params, query, block_table, seq_lens)
        held = block_table.shape[1] * params.layout.block_size
        longest = max(0, min(int(seq_lens.max()), held)) if rows else 0
        check_step(rows, params.num_kv_heads, longest)
        scores = torch.full(
            (rows, params.num_score_heads, longest),
            float("-inf"),
            device=query.device,
            dtype=torch.float32,
        )
        work = self._work(query.device, params, rows, 1)
        self._lib.scan(
            query,
            block_table,
            seq_lens,
            scores,
            work,
            params.score == "dot",
            params.selection == "query_head",
            params.coding.threshold,
            params.coding.relative,
            page,
            *self._numbers(params),
        )
        return scores

    def select(self, params, scores, seq_lens, budgets):
        rows, heads, longest = scores.shape
        typed("scores", scores, torch.float32, rows, heads, None)
        typed("seq_lens", seq_lens, torch.int32, rows)
        typed("budgets", budgets, torch.int32, rows)
        together(scores=scores, seq_lens=seq_lens, budgets=budgets)
        check_context(longest)
        if rows and int(seq_lens.max()) > longest:
            raise ValueError(f"seq_lens: a row is longer than the {longest} scores of a row")
        most = int(params.attended(seq_lens, budgets).max()) if rows else 0
        tokens = torch.full((rows, heads, most), -1, dtype=torch.int32, device=scores.device)
        self._lib.select(
            scores, seq_lens, budgets, tokens, params.num_sink_tokens, params.recent_window
        )
        return tokens

    def gather(self, params, page, block_table, seq_lens, key, value):
        dtype = self._dtype(params, key)
        typed("key", key, dtype, None, params.num_kv_heads, params.layout.head_size)
        typed("value", value, dtype, *key.shape)
        typed("seq_lens", seq_lens, torch.int32, None)
        typed("block_table", block_table, torch.int32, *seq_lens.shape, None)
        together(key=key, value=value, page=page, block_table=block_table, seq_lens=seq_lens)
        for name, rows in (("key", key), ("value", value)):
            _aligned(name, rows, 4)
        self._lib.gather(key, value, block_table, seq_lens, page, *self._numbers(params))

    def _rows(self, params, query, block_table, seq_lens) -> tuple[int, torch.Tensor]:
        """The number of rows, and their queries: vLLM pads queries, not contexts."""
        rows = seq_lens.shape[0]
        typed("seq_lens", seq_lens, torch.int32, rows)
        typed("block_table", block_table, torch.int32, rows, None)
        query = query[:rows]
        heads, size = params.num_query_heads, params.layout.head_size
        typed("query", query, self._dtype(params, query), rows, heads, size)
        _aligned("query", query)
        together(query=query, block_table=block_table, seq_lens=seq_lens)
        return rows, query

    @staticmethod
    def _dtype(params: Params, x: torch.Tensor) -> torch.dtype:
        """The dtype of queries, keys and values: the page's, or either one beside fp8 pages."""
        if not params.fp8:
            return params.layout.dtype
        return x.dtype if x.dtype in DTYPES else torch.bfloat16

    def fused_clusters(
        self, params: Params, dtype: torch.dtype, page: torch.Tensor, longest: int, cluster: int
    ) -> int:
        """Clusters of ``cluster`` blocks of the fused kernel that run at once; 0: it cannot be used."""
        return self._lib.fused_clusters(
            params.num_query_heads,
            longest,
            params.score == "dot",
            params.selection == "query_head",
            dtype == torch.float16,
            cluster,
            page,
            *self._numbers(params),
        )

    def largest_cluster(
        self, params: Params, rows: int, dtype: torch.dtype, page: torch.Tensor, longest: int
    ) -> int:
        """Blocks per (row, KV head) of the fused kernel that run at once; 0: it cannot be used."""
        groups = rows * params.num_kv_heads
        sizes = range(MAX_CLUSTER, 0, -1)
        fits = (n for n in sizes if self.fused_clusters(params, dtype, page, longest, n) >= groups)
        return next(fits, 0)

    def cluster_size(
        self, params: Params, rows: int, dtype: torch.dtype, page: torch.Tensor, longest: int
    ) -> int:
        """Blocks of the fused kernel for a step of ``rows``, 0 for the three kernels."""
        key = (params, rows, dtype, longest)
        found = self._clusters.get(key)
        if found is None:
            found = self.largest_cluster(params, rows, dtype, page, longest)
            sets = params.num_score_heads // params.num_kv_heads
            if not prefers_fused(found, longest, sets, params.budget.most(longest)):
                found = 0
            self._clusters[key] = found
        return found

    def _workspace_bytes(self, params: Params, rows: int, capacity: int) -> int:
        key = (params, rows, capacity)
        size = self._bytes.get(key)
        if size is None:
            size = self._lib.workspace_bytes(
                rows,
                params.num_query_heads,
                params.num_kv_heads,
                params.layout.head_size,
                params.score == "dot",
                params.selection == "query_head",
                capacity,
            )
            self._bytes[key] = size
        return size

    def _work(self, device: torch.device, params: Params, rows: int, capacity: int) -> torch.Tensor:
        return self._workspace.at_least(device, self._workspace_bytes(params, rows, capacity))

    @staticmethod
    def _numbers(params: Params) -> tuple:
        """:attr:`Params.numbers` of pages that the kernels can read."""
        check_block(params.layout.block_size)
        if not params.fp8 and params.layout.dtype not in DTYPES:
            raise AdamasError(
                f"the CUDA kernels read bf16, fp16 and fp8 pages, not {params.layout.dtype}."
            )
        if params.group > MAX_GROUP:
            raise AdamasError(
                f"{params.group} query heads per KV head are more than the {MAX_GROUP} that the CUDA "
                "kernels handle: serve this model with another backend."
            )
        return params.numbers
