"""The CUDA backend: kernels of ``csrc/sm90`` for Hopper GPUs (sm_90a) and of ``csrc/sm80`` for others, loaded through tvm-ffi."""

from __future__ import annotations

import torch

from vllm_adamas.backends.base import (
    HOPPER,
    MIN_CAPABILITY,
    Backend,
    DecodeBatch,
    Layer,
    Params,
)
from vllm_adamas.backends.cuda import policy
from vllm_adamas.backends.cuda.library import FOR_HOPPER, library_of, limits, load
from vllm_adamas.backends.cuda.policy import (
    THREE,
    Form,
    LaunchPlan,
    check_block,
    check_head_size,
    check_step,
)
from vllm_adamas.backends.inspect import Inspectable
from vllm_adamas.backends.launch import rounded_context
from vllm_adamas.backends.workspace import Workspace
from vllm_adamas.dtypes import MODEL_DTYPES
from vllm_adamas.errors import AdamasError

ALL_STAGES = 7  #: bits: encode, scan, attend


class CudaLayer(Layer):
    """A layer with its native counterpart.

    Args:
        native: the layer as the library bound it.
        plans: launch plans of decode steps, shared by layers of one shape.
    """

    def __init__(self, params: Params, kv_cache: torch.Tensor, native, plans: dict):
        super().__init__(params, kv_cache)
        self.native = native
        self.plans: dict[tuple, LaunchPlan] = plans


class CudaBackend(Backend, Inspectable):
    """Compiled kernels: a decode step is encode, scan and attend, or on Hopper GPUs one fused kernel.

    Decode does not synchronise and can be captured in a CUDA graph: launch shapes depend on the number
    of rows, ``max_seq_len`` and the configured budget alone, and kernels read lengths and budgets on
    the device.

    Args:
        library: name of the compiled library; default: that of the current GPU. The one for other GPUs runs
            on Hopper too, for tests.
    """

    name = "cuda"

    def __init__(self, library: str | None = None):
        found = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
        if found is not None and found < MIN_CAPABILITY:
            raise AdamasError(
                f"the CUDA kernels need compute capability {'.'.join(map(str, MIN_CAPABILITY))}, this GPU "
                f"has {'.'.join(map(str, found))}: serve with another attention backend."
            )
        self.library = library or library_of(found or HOPPER)
        self._library = load(self.library)
        if found is None:
            raise AdamasError("the CUDA kernels need a visible NVIDIA GPU.")
        self._workspace = Workspace()
        self._plans: dict[tuple, dict[tuple, LaunchPlan]] = {}
        self._max_context = limits(self.library).max_context

    @classmethod
    def check_server(
        cls, head_sizes, block_size, num_kv_heads, max_rows, max_seq_len, capability=None
    ):
        library = library_of(capability or HOPPER)
        limits(library)  # refuses a missing library
        for size in head_sizes:
            check_head_size(size)
        if block_size is not None:
            check_block(block_size, library)
        check_step(max_rows, num_kv_heads, max_seq_len, library)

    @property
    def description(self) -> str:
        major, minor = torch.cuda.get_device_capability()
        code = "sm_90a" if self.library == FOR_HOPPER else f"sm_{major}{minor}"
        return f"cuda ({code}, {torch.cuda.get_device_name()})"

    def reserve(self, params: Params, max_rows: int, max_seq_len: int) -> int:
        """Allocates the workspace for the largest decode step; returns its size in bytes.

        Call it before CUDA graphs are captured. Decode steps of one device share the workspace, so
        they must run on one stream.
        """
        device = torch.device("cuda", torch.cuda.current_device())
        size = self.workspace_bytes(params, max_rows, max_seq_len)
        return self._workspace.at_least(device, size).numel()

    def workspace_bytes(self, params: Params, max_rows: int, max_seq_len: int) -> int:
        """Size in bytes of the workspace that decode needs up to so many rows and tokens.

        Raises:
            AdamasError: the step exceeds the limits of the kernels.
        """
        check_step(max_rows, params.num_kv_heads, max_seq_len, self.library)
        _, capacity = self._sampling(params, max_seq_len)
        return self._library.workspace_bytes(*_shape(params), max_rows, capacity)

    def bind(self, params: Params, kv_cache: torch.Tensor) -> CudaLayer:
        """As :meth:`Backend.bind`.

        Raises:
            AdamasError: the kernels do not support the pages or the heads.
            ValueError: the KV cache is not aligned, or ``key_mean`` or ``sinks`` do not fit.
        """
        layout = params.layout
        check_head_size(layout.head_size)
        check_block(layout.block_size, self.library)
        if not params.fp8 and layout.dtype not in MODEL_DTYPES["cuda"]:
            raise AdamasError(
                f"the CUDA kernels read bf16, fp16 and fp8 pages, not {layout.dtype}: serve in another "
                "dtype, or choose kernels=triton."
            )
        most = limits(self.library).max_group
        if params.group > most:
            raise AdamasError(
                f"{params.group} query heads per KV head are more than the {most} that the CUDA "
                "kernels handle: serve this model with another backend."
            )
        layout.check(kv_cache)
        native = self._library.bind(kv_cache, params.native, params.key_mean, params.sinks)
        kind = (layout, params.fp8, *_shape(params), params.budget)
        return CudaLayer(params, kv_cache, native, self._plans.setdefault(kind, {}))

    def append(self, layer, key, value, slot_mapping):
        self._library.append(layer.native, key, value, slot_mapping)

    def decode(
        self,
        layer: CudaLayer,
        query: torch.Tensor,
        batch: DecodeBatch,
        output: torch.Tensor,
        stats: torch.Tensor,
        lse: torch.Tensor | None = None,
        *,
        stages: int = ALL_STAGES,
        form: Form | None = None,
        shared: bool | None = None,
    ) -> None:
        """As :meth:`Backend.decode`; budgets far above the configured one cost a second pass over the
        signatures.

        Args:
            stages: which of the three kernels run (bits: encode, scan, attend), for measurements.
            form: one kernel or three; default: the choice of :meth:`plan`.
            shared: whether scan takes the rows of a request together, likewise.

        Raises:
            AdamasError: the step exceeds the limits of the kernels.
            ValueError: an argument does not fit, or the fused kernel cannot run the step in ``form``.
        """
        longest = batch.block_table.shape[-1] * layer.params.layout.block_size
        bound = batch.max_seq_len
        longest = min(longest, self._max_context if bound is None else bound)
        rows = batch.seq_lens.numel()
        plan = self.plan(layer, rows, query.dtype, longest, batch.rows_each)
        if form is None:
            form = plan.form
        if shared is None:
            shared = plan.shared and form == THREE
        self._library.decode(
            layer.native,
            query,
            output,
            batch.block_table,
            batch.seq_lens,
            batch.budgets,
            batch.positions if shared else None,
            stats,
            lse,
            self._workspace.at_least(query.device, plan.workspace_bytes),
            longest,
            *form,
            plan.sample_bits,
            plan.capacity,
            batch.overlap,
            stages,
        )

    def scan(self, layer, query, block_table, seq_lens, longest=None):
        params, rows = layer.params, seq_lens.numel()
        held = block_table.shape[-1] * params.layout.block_size
        if longest is None:
            longest = max(0, min(int(seq_lens.max()), held)) if rows else 0
        check_step(rows, params.num_kv_heads, longest, self.library)
        shape = (rows, params.num_score_heads, longest)
        scores = torch.full(shape, float("-inf"), device=query.device, dtype=torch.float32)
        size = self._library.workspace_bytes(*_shape(params), rows, 0)
        work = self._workspace.at_least(query.device, size)
        self._library.scan(layer.native, query, block_table, seq_lens, scores, work)
        return scores

    def gather(self, layer, block_table, seq_lens, key, value):
        self._library.gather(layer.native, block_table, seq_lens, key, value)

    def plan(
        self,
        layer: CudaLayer,
        rows: int,
        dtype: torch.dtype,
        max_seq_len: int,
        rows_each: int = 1,
    ) -> LaunchPlan:
        """The launch of a step of ``rows`` rows with queries of ``dtype``; plans are cached.

        Args:
            rows_each: as in :class:`DecodeBatch`.

        Raises:
            AdamasError: the step exceeds the limits of the kernels.
        """
        longest = rounded_context(max_seq_len)
        key = (rows, rows_each, dtype, longest)
        found = layer.plans.get(key)
        if found is None:
            params = layer.params
            check_step(rows, params.num_kv_heads, max_seq_len, self.library)
            form = self.fused_form(layer, rows, dtype, longest)
            if not policy.prefers_fused(
                form,
                longest,
                params.budget.most(longest),
                maximum=params.combine == "max",
            ):
                form = THREE
            shared = policy.prefers_shared(form, longest, rows_each)
            shared = shared and self._library.scan_shares(*_shape(params))
            if shared:
                form = THREE
            bits, capacity = self._sampling(params, longest)
            size = self._library.workspace_bytes(*_shape(params), rows, capacity)
            found = layer.plans[key] = LaunchPlan(form, shared, bits, capacity, size)
        return found

    def fused_form(self, layer: CudaLayer, rows: int, dtype: torch.dtype, max_seq_len: int) -> Form:
        """The form of the fused kernel that runs in one wave; ``THREE`` if none does."""
        return policy.fused_form(
            rows * layer.params.num_kv_heads,
            lambda form: self.fused_clusters(layer, dtype, max_seq_len, form),
        )

    def fused_clusters(
        self, layer: CudaLayer, dtype: torch.dtype, max_seq_len: int, form: Form
    ) -> int:
        """Clusters of the fused kernel in ``form`` that the GPU runs at once; 0 if none."""
        return self._library.fused_clusters(
            layer.native, dtype == torch.float16, max_seq_len, *form
        )

    def _sampling(self, params: Params, max_seq_len: int) -> tuple[int, int]:
        """Sample bits and candidate capacity of a step."""
        longest = rounded_context(max_seq_len)
        most = self._library.max_sample_bits(*_shape(params))
        capacity = policy.candidate_capacity(
            longest, params.budget.most(longest), most, self.library
        )
        return self._library.sample_bits(longest, most), capacity


def _shape(params: Params) -> tuple[int | bool, ...]:
    """The parameters that native code sizes workspaces by."""
    return (
        params.num_query_heads,
        params.num_kv_heads,
        params.layout.head_size,
        params.score == "dot",
        params.selection == "query_head",
        params.combine == "max",
    )
