"""Nothing outlives its engine: caches, workspaces, counters. Nothing is remembered by an address."""

import dataclasses
import gc
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cases import CASES, Batch, Case, as_bytes
from common import refused

from vllm_adamas.backends import workspace
from vllm_adamas.backends.cpu.backend import CpuBackend
from vllm_adamas.backends.reference import ReferenceBackend
from vllm_adamas.backends.triton import TritonBackend
from vllm_adamas.backends.triton import backend as ops
from vllm_adamas.backends.workspace import Workspace
from vllm_adamas.errors import AdamasError
from vllm_adamas.serving import impl as impl_module
from vllm_adamas.serving import metadata, shared
from vllm_adamas.serving.metrics import FOLDER, read_counters

BACKENDS = {"cpu": CpuBackend, "reference": ReferenceBackend}
if ops.INTERPRETED:  # else the kernels are of the GPU, and so are their pages
    BACKENDS["triton"] = TritonBackend
over_backends = pytest.mark.parametrize("kernels", BACKENDS)
CASE = Case((70, 20), 8, (4, 2), 64, selection="kv_head", combine="max", padding=0)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def interpreter(monkeypatch) -> None:
    if ops.INTERPRETED:
        monkeypatch.setenv("TRITON_INTERPRET", "1")


def watched(memory: torch.Tensor) -> tuple[torch.Tensor, weakref.ref]:
    """A copy, and a reference that is dead as soon as the copy's memory is free."""
    array = np.zeros(memory.nbytes, np.uint8)
    copy = torch.from_numpy(array).view(memory.dtype).view(memory.shape)
    return copy.copy_(memory), weakref.ref(array)


def is_free(memory: weakref.ref, kernels: str) -> bool:
    if kernels == "triton":
        gc.collect()  # Triton's interpreter leaves cycles
    return memory() is None


@over_backends
@pytest.mark.parametrize("fp8", [None, "e4m3"])
def test_neither_backend_nor_layer_holds_pages(kernels: str, fp8: str | None) -> None:
    backend = BACKENDS[kernels]()
    batch = dataclasses.replace(CASE, fp8=fp8).build(backend)
    batch.memory, memory = watched(batch.memory)
    backend.prepare(batch.kv_cache)
    layer = batch.bound(backend)
    backend.append(layer, batch.key, batch.value, batch.slots)
    batch.scan(backend)
    batch.decode(backend)
    batch.gathered(backend)
    assert memory() is not None
    assert layer.is_bound_to(batch.kv_cache)
    batch.memory = None
    assert is_free(memory, kernels)
    with pytest.raises(RuntimeError, match="bind it again"):
        layer.kv_cache  # noqa: B018


@over_backends
def test_a_page_may_be_an_allocation_of_its_own(kernels: str) -> None:
    """A view that held the tensor would keep it, and itself with it."""
    backend = BACKENDS[kernels]()
    batch = dataclasses.replace(CASE, fp8="e4m3").build(ReferenceBackend())
    array = batch.kv_cache.contiguous().numpy()
    kv_cache, memory = torch.from_numpy(array), weakref.ref(array)
    del array
    seen = (batch.block_table, batch.seq_lens)
    layer = backend.bind(batch.params, kv_cache)
    backend.gather(layer, *seen, batch.key.clone(), batch.value.clone())
    del kv_cache
    assert is_free(memory, kernels)


@over_backends
def test_an_address_says_nothing_of_the_page(kernels: str) -> None:
    """The same parameters over the same memory, whose blocks lie further apart the second time."""
    backend = BACKENDS[kernels]()
    batch = CASE.build(ReferenceBackend())
    expected, _ = batch.decode(backend)
    memory, scattered = batch.memory, torch.zeros(2 * len(batch.memory), *batch.memory.shape[1:])
    raw = scattered.to(memory.dtype)
    raw[: len(memory)] = memory
    batch.memory = raw[: len(memory)]
    assert torch.equal(as_bytes(batch.decode(backend)[0]), as_bytes(expected))
    raw[::2] = memory
    batch.memory = raw[::2]
    assert torch.equal(as_bytes(batch.decode(backend)[0]), as_bytes(expected))


@over_backends
def test_an_address_says_nothing_of_the_parameters(kernels: str) -> None:
    """Pages of two kinds take turns in one allocation."""
    backend = BACKENDS[kernels]()
    memory = torch.zeros(1 << 20, dtype=torch.uint8)
    for block_size in (64, 32, 64):
        batch = dataclasses.replace(CASE, block_size=block_size).build(ReferenceBackend())
        size = batch.memory.nbytes
        pages = memory[:size].view(batch.memory.dtype).view(batch.memory.shape)
        batch.memory = pages.copy_(batch.memory)
        key, value = batch.gathered(backend)
        assert torch.equal(key, batch.key) and torch.equal(value, batch.value)


@pytest.mark.parametrize("name", ["plain", "d96", "e4m3"])
def test_a_page_of_another_layout_is_named(name: str) -> None:
    batch = CASES[name].build(ReferenceBackend())
    for wrong in (
        batch.kv_cache[..., :-1],
        batch.kv_cache[:, :, :16],
        batch.kv_cache.transpose(1, 2),
        batch.kv_cache[:, :1],
    ):
        with pytest.raises((AdamasError, ValueError), match=r"KV cache|kv_cache: "):
            CpuBackend().bind(batch.params, wrong)


# workspaces


@pytest.fixture
def recording(monkeypatch) -> list[bool]:
    """Non-empty while a CUDA graph is captured, says a stand-in."""
    now = []
    monkeypatch.setattr(workspace, "capturing", lambda device: bool(now))
    return now


@pytest.mark.parametrize("captured", [False, True])
def test_what_a_graph_addresses_outlives_a_growing_workspace(recording, captured: bool) -> None:
    work = Workspace()
    work.at_least(CPU, 8)
    recording += [True] * captured
    first = weakref.ref(work.at_least(CPU, 8))
    recording.clear()
    second = weakref.ref(work.at_least(CPU, 16))
    assert (first() is not None) == captured
    assert work.at_least(CPU, 9) is second()
    work.at_least(CPU, 32)  # no graph has seen the second
    assert second() is None
    del work
    assert first() is None


def test_a_workspace_does_not_grow_under_capture(recording) -> None:
    work = Workspace()
    work.at_least(CPU, 8)
    recording.append(True)
    assert work.at_least(CPU, 8).numel() == 8
    refused(lambda: work.at_least(CPU, 9), "9 bytes", "reserve()")


@pytest.mark.skipif(not ops.INTERPRETED, reason="the kernels are those of the GPU")
def test_plans_let_go_of_a_workspace_that_grows() -> None:
    backend = TritonBackend()
    batch = CASE.build(backend)
    backend._workspace.buffers[CPU], first = watched(torch.zeros(1 << 20, dtype=torch.uint8))
    expected, _ = batch.decode(backend)
    assert first() is not None
    assert backend.reserve(batch.params, 64, 10_000) > 1 << 20
    gc.collect()  # Triton's interpreter leaves cycles
    assert first() is None
    assert torch.equal(as_bytes(batch.decode(backend)[0]), as_bytes(expected))


# engines


class Engine:
    """Layers as vLLM builds them, without vLLM's engine; calls take the place of its steps."""

    def __init__(self, monkeypatch, kernels: str = "cpu", layers: int = 2, **options):
        self.context = {}
        options = {
            "kernels": kernels,
            "token_budget": 8,
            "num_dense_layers": 0,
            "audit_interval": 0,
            **options,
        }
        self.config = SimpleNamespace(
            additional_config={"adamas": options},
            compilation_config=SimpleNamespace(
                static_forward_context=self.context, max_cudagraph_capture_size=4
            ),
            scheduler_config=SimpleNamespace(max_num_seqs=2, max_num_batched_tokens=64),
            model_config=SimpleNamespace(
                max_model_len=256, dtype=CASE.dtype, attention_chunk_size=None
            ),
            parallel_config=SimpleNamespace(data_parallel_index=0, decode_context_parallel_size=1),
        )
        with monkeypatch.context() as patch:
            patch.setattr(impl_module, "get_current_vllm_config", lambda: self.config)
            patch.setattr(impl_module, "current_platform", SimpleNamespace(device_type="cpu"))
            patch.setattr(shared, "get_backend", lambda name, device: BACKENDS[name]())
            for number in range(layers):
                self.context[f"layers.{number}"] = SimpleNamespace(
                    layer_name=f"layers.{number}",
                    impl=impl_module.AdamasImpl(4, 64, 64**-0.5, 2),
                    kv_cache=torch.tensor([]),
                    _k_scale_float=1.0,
                    _v_scale_float=1.0,
                )
        monkeypatch.setattr(shared, "get_tensor_model_parallel_rank", lambda: 0)

    @property
    def impls(self) -> list[impl_module.AdamasImpl]:
        return [layer.impl for layer in self.context.values()]

    def profile(self) -> None:
        """As vLLM does it before there is a cache."""
        for layer in self.context.values():
            layer.impl.forward(layer, *[torch.zeros(1)] * 3, layer.kv_cache, None, torch.zeros(1))

    def step(self, batch: Batch, number: int = 0) -> torch.Tensor:
        """A decode step of a layer, whose pages hold the batch already."""
        layer = self.context[f"layers.{number}"]
        output = torch.zeros_like(batch.query)
        nowhere = torch.full((len(batch.lengths),), -1)
        made = metadata.AdamasMetadata(
            num_decode_rows=len(batch.lengths),
            decode={
                budget: dataclasses.replace(
                    batch.step(), budgets=batch.seq_lens.clamp(max=budget.tokens)
                )
                for budget in layer.impl.config.budgets
            },
            query_start_loc=torch.arange(len(batch.lengths) + 1).int(),
            prefill=None,
            slot_mapping=nowhere,
        )
        new = (batch.key[: len(nowhere)], batch.value[: len(nowhere)])
        layer.impl.forward(layer, batch.query, *new, layer.kv_cache, made, output)
        return output


@over_backends
def test_a_dropped_cache_is_freed(monkeypatch, kernels: str) -> None:
    """At once, as vLLM expects of the cache that it profiles CUDA graphs with; the next one is read."""
    engine, batch = Engine(monkeypatch, kernels), CASE.build(ReferenceBackend())
    (layer, *_) = engine.context.values()
    expected, _ = batch.decode(BACKENDS[kernels]())
    for _ in range(2):
        copy, memory = watched(batch.memory)
        layer.kv_cache = copy[:, : CASE.heads[1]]
        del copy
        assert torch.equal(as_bytes(engine.step(batch)), as_bytes(expected))
        assert memory() is not None
        layer.kv_cache = torch.tensor([])
        assert is_free(memory, kernels)


def test_layers_and_builders_of_an_engine_share(monkeypatch) -> None:
    engine = Engine(monkeypatch)
    monkeypatch.setattr(metadata, "warnings", lambda *args: [])
    monkeypatch.setattr(
        metadata.AdamasMetadataBuilder,
        "_init_reorder_batch_threshold",
        lambda *args, **options: None,
    )
    builder = metadata.AdamasMetadataBuilder(None, ["layers.1"], engine.config, CPU)
    one, two = engine.impls
    assert one.shared is two.shared
    assert one.backend is two.backend
    assert one.dense is two.dense
    assert builder.stats is one.shared.stats


@over_backends
def test_engines_share_nothing(monkeypatch, tmp_path, kernels: str) -> None:
    """And the first one's share goes with it, while its counts stay in the server's total."""
    monkeypatch.setenv(FOLDER, str(tmp_path))
    first, second = (Engine(monkeypatch, kernels) for _ in range(2))
    batch = CASE.build(ReferenceBackend())
    for engine in (first, second):
        engine.profile()
        engine.context["layers.0"].kv_cache = batch.kv_cache
        engine.step(batch)
    parts = [
        [x.impls[0].backend, x.impls[0].dense, x.impls[0].shared.stats] for x in (first, second)
    ]
    assert all(one is not two for one, two in zip(*parts, strict=True))
    assert read_counters(tmp_path)[0][0] == 2 * len(batch.lengths)
    gone = [weakref.ref(part) for part in parts[0]]
    del first, engine, parts
    assert [part() for part in gone] == [None] * len(gone)
    second.step(batch)
    assert read_counters(tmp_path)[0][0] == 3 * len(batch.lengths)


@over_backends
def test_layers_take_the_rows_of_their_budgets(monkeypatch, kernels: str) -> None:
    """Of three dense layers one is named, and so is a layer behind them."""
    options = {"num_dense_layers": 3, "layer_budgets": {"1": 30, "4": 50}}
    engine = Engine(monkeypatch, kernels, 5, **options)
    batch, backend = CASE.build(ReferenceBackend()), BACKENDS[kernels]()
    for number, budget in enumerate((1 << 30, 30, 1 << 30, 8, 50)):
        engine.context[f"layers.{number}"].kv_cache = batch.kv_cache
        counters = engine.impls[0].shared.stats.counters(dense_layer=False)
        before = counters.clone()
        output = engine.step(batch, number)
        same = dataclasses.replace(batch, budgets=torch.full((2,), budget).int())
        expected, counted = same.decode(backend)
        assert torch.equal(as_bytes(output), as_bytes(expected))
        dense_layer = number in (0, 2)
        assert (counters - before).tolist() == ([0] * len(counted) if dense_layer else counted)


class Reserving(ReferenceBackend):
    """Says when memory is asked for."""

    def __init__(self):
        self.asked, self.budgets = [], []

    def reserve(self, params, max_rows, max_seq_len):
        self.budgets.append(params.budget.tokens)
        self.asked.append((params.layout.dtype, max_rows, max_seq_len))
        return 1 << 20


@pytest.mark.parametrize("profiled", [True, False])
def test_memory_is_reserved_when_vllm_measures_it(monkeypatch, profiled: bool) -> None:
    """Not when layers are built: sleep mode discards what is allocated then. Without a profiling run,
    the first step reserves."""
    monkeypatch.setitem(BACKENDS, "reference", Reserving)
    engine, batch = Engine(monkeypatch, "reference"), CASE.build(ReferenceBackend())
    backend = engine.impls[0].backend
    assert backend.asked == []
    assert "stats" not in vars(engine.impls[0].shared)  # the counters are the builder's to make
    largest = (CASE.dtype, 4, 256)
    if profiled:
        engine.profile()
        assert backend.asked == [largest] * 2
        engine.profile()
    engine.context["layers.0"].kv_cache = batch.kv_cache
    for _ in range(2):
        engine.step(batch)
    assert backend.asked == [largest] * (2 if profiled else 1)


def test_memory_is_reserved_for_every_budget(monkeypatch) -> None:
    """By each layer, whichever comes first, so that the largest is reserved before a graph is captured."""
    monkeypatch.setitem(BACKENDS, "reference", Reserving)
    engine = Engine(monkeypatch, "reference", layer_budgets={"1": 200, "3": 0.5})
    engine.profile()
    assert engine.impls[0].backend.budgets == [8, 200, 0.5] * 2


def test_only_what_is_zeros_becomes_huge_pages() -> None:
    """Layers of every kind may have written to the allocation before a layer of ours runs."""
    memory = torch.zeros(12 << 20, dtype=torch.uint8)
    memory[:: 5 << 20] = 7
    before = memory.clone()
    CpuBackend().prepare(memory[:16])  # a view: the whole allocation is meant
    assert torch.equal(memory, before)
