"""AdamasMetadata from batches as vLLM itself describes them, through the code of both model runners."""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from common import refused
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_adamas.backends.base import DecodeBatch
from vllm_adamas.config import AdamasConfig
from vllm_adamas.serving.backend import AdamasBackend
from vllm_adamas.serving.metadata import AdamasMetadata, AdamasMetadataBuilder
from vllm_adamas.serving.metrics import SelectionStats
from vllm_adamas.serving.plugin import register

register()

from vllm.config import CUDAGraphMode  # noqa: E402
from vllm.model_executor.layers.attention.chunked_local_attention import (  # noqa: E402
    ChunkedLocalAttention,
    create_chunked_local_attention_backend,
)
from vllm.v1.attention.backend import CommonAttentionMetadata  # noqa: E402
from vllm.v1.kv_cache_interface import FullAttentionSpec  # noqa: E402
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers  # noqa: E402
from vllm.v1.worker.gpu.model_runner import sort_batch_req_ids  # noqa: E402
from vllm.v1.worker.gpu.model_states.default import DefaultModelState  # noqa: E402
from vllm.v1.worker.gpu_model_runner import GPUModelRunner  # noqa: E402
from vllm.v1.worker.ubatch_utils import UBatchSlice  # noqa: E402
from vllm.v1.worker.utils import AttentionGroup  # noqa: E402

BLOCK, MAX_ROWS, MAX_TOKENS, MAX_MODEL_LEN = 16, 64, 512, 4096
BUDGET = 100
CHUNK = 64
RUNNERS = ("v1", "v2")


@dataclass(frozen=True)
class Request:
    """A request in one step: prompt tokens, tokens in the cache before the step, tokens of the step.

    Args:
        wanted: the token budget that it asks for, 0 for none.
    """

    prompt: int
    computed: int
    new: int = 1
    wanted: int = 0

    @property
    def context(self) -> int:
        return self.computed + self.new

    @property
    def prefilling(self) -> bool:
        return self.computed < self.prompt


def decoding(context: int, drafts: int = 0) -> Request:
    """A decode step whose last own token ends a context of ``context`` tokens; drafts follow it."""
    return Request(prompt=max(1, context // 2), computed=context - 1, new=1 + drafts)


def remainder(prompt: int) -> Request:
    """A cached prompt with one token left to compute."""
    return Request(prompt=prompt, computed=prompt - 1)


def chunk(computed: int, new: int) -> Request:
    return Request(prompt=computed + new, computed=computed, new=new)


def group_of(
    options: dict, micro_batches: int = 1, drafts: int = 0, ranks: int = 1, chunk: int = 0
) -> AttentionGroup:
    """A KV cache group with a real metadata builder for each micro-batch.

    Args:
        drafts: tokens that a drafter may propose per request and step.
        ranks: that keep a share of every context each.
        chunk: tokens of the chunks that its layers attend within, 0 for all tokens.
    """
    backend = AdamasBackend
    if chunk:
        backend = create_chunked_local_attention_backend(AdamasBackend, chunk)
    spec = FullAttentionSpec(
        block_size=BLOCK, num_kv_heads=1, head_size=64, head_size_v=64, dtype=torch.bfloat16
    )
    options = {"metrics": False, "log_interval": 0, "audit_interval": 0, **options}
    layer = object.__new__(ChunkedLocalAttention) if chunk else SimpleNamespace()
    layer.attention_chunk_size = chunk
    shared = SimpleNamespace(stats=SelectionStats(AdamasConfig.parse(options), "cpu"), requested={})
    layer.impl = SimpleNamespace(shared=shared)
    config = SimpleNamespace(
        additional_config={"adamas": options},
        compilation_config=SimpleNamespace(
            max_cudagraph_capture_size=MAX_ROWS,
            static_forward_context={"layer": layer},
        ),
        scheduler_config=SimpleNamespace(max_num_seqs=MAX_ROWS, max_num_batched_tokens=MAX_TOKENS),
        parallel_config=SimpleNamespace(decode_context_parallel_size=ranks),
        model_config=SimpleNamespace(
            max_model_len=MAX_MODEL_LEN,
            attention_chunk_size=chunk or None,
            model="",
            revision=None,
            hf_text_config=SimpleNamespace(model_type="llama"),
        ),
        speculative_config=SimpleNamespace(num_speculative_tokens=drafts, parallel_drafting=False)
        if drafts
        else None,
    )
    builders = [
        backend.get_builder_cls()(spec, ["layer"], config, torch.device("cpu"))
        for _ in range(micro_batches)
    ]
    assert all(isinstance(builder, AdamasMetadataBuilder) for builder in builders)
    return AttentionGroup(backend, ["layer"], spec, 0, metadata_builders=builders)


def ask(group: AttentionGroup, requests: list[Request], slots: list[int]) -> None:
    """What logits processors have noted of the requests and of those that had other slots before."""
    layers = group.get_metadata_builder().vllm_config.compilation_config.static_forward_context
    budgets = layers["layer"].impl.shared.requested
    budgets.clear()
    wanted = [request.wanted for request in requests]
    if any(wanted):
        budgets.update(dict.fromkeys(set(range(MAX_ROWS)) - set(slots), 333))
        budgets.update({slot: n for slot, n in zip(slots, wanted, strict=True) if n})


def in_order(requests: list[Request], drafts: int = 0) -> list[Request]:
    """As the runners sort a batch: those with few new tokens lead."""
    by_id = {str(i): request for i, request in enumerate(requests)}
    new = {name: request.new for name, request in by_id.items()}
    proposed = {
        name: [0] * (request.new - 1) for name, request in by_id.items() if not request.prefilling
    }
    return [by_id[name] for name in sort_batch_req_ids(new, proposed, 1 + drafts)]


def padded_tokens(group: AttentionGroup, requests: list[Request], rows: int, capture: bool) -> int:
    """Tokens of a step; a full graph has the same number for each of its requests."""
    tokens = sum(request.new for request in requests)
    each = group.get_metadata_builder().reorder_batch_threshold
    return rows * each if capture or rows > len(requests) else tokens


def starts_of(requests: list[Request], rows: int) -> np.ndarray:
    starts = np.zeros(rows + 1, dtype=np.int32)
    starts[1 : len(requests) + 1] = np.cumsum([request.new for request in requests])
    starts[len(requests) + 1 :] = starts[len(requests)]
    return starts


def block_tables(rows: int) -> torch.Tensor:
    """Other blocks in each row; whole tables, as the runners keep them."""
    width = MAX_MODEL_LEN // BLOCK
    return torch.arange(MAX_ROWS * width, dtype=torch.int32).view(MAX_ROWS, width)[:rows].clone()


def build_v1(
    group: AttentionGroup, requests: list[Request], rows: int, capture=False, ubatches=None
) -> AdamasMetadata | list[AdamasMetadata]:
    """Through GPUModelRunner; ``rows`` above the number of requests are a full graph's padding."""
    number, tokens = len(requests), sum(request.new for request in requests)
    padded = padded_tokens(group, requests, rows, capture)
    stale = [Request(prompt=2000, computed=9)] * MAX_ROWS  # of requests that have ended
    known = (requests + stale)[:MAX_ROWS]
    ask(group, requests, list(range(number)))
    starts = torch.from_numpy(starts_of(requests, MAX_ROWS))
    lens = torch.tensor([request.context for request in requests] + [0] * (MAX_ROWS - number))
    lens = lens.to(torch.int32)
    runner = SimpleNamespace(
        kv_cache_config=SimpleNamespace(
            kv_cache_groups=[SimpleNamespace(kv_cache_spec=group.kv_cache_spec)]
        ),
        attn_groups=[[group]],
        max_model_len=MAX_MODEL_LEN,
        optimistic_seq_lens_cpu=lens,
        seq_lens=lens,
        query_start_loc=SimpleNamespace(gpu=starts, cpu=starts),
        positions=torch.zeros(MAX_TOKENS, dtype=torch.int64),
        device=torch.device("cpu"),
        input_batch=SimpleNamespace(
            block_table=[SimpleNamespace(get_device_tensor=block_tables)],
            num_computed_tokens_cpu_tensor=torch.tensor([x.computed for x in known]),
            num_prompt_tokens_cpu_tensor=torch.tensor([x.prompt for x in known]),
        ),
        model_config=SimpleNamespace(rswa_window=None),
        cache_config=SimpleNamespace(use_replayssm=False, kv_sharing_fast_prefill=False),
        is_mm_prefix_lm=False,
        dcp_world_size=1,
        speculative_config=None,
        _get_encoder_seq_lens=lambda *args, **kwargs: (None, None),
    )
    found, _ = GPUModelRunner._build_attention_metadata(
        runner,
        num_tokens=tokens,
        num_reqs=number,
        max_query_len=max(request.new for request in requests),
        num_tokens_padded=padded,
        num_reqs_padded=rows,
        ubatch_slices=ubatches,
        for_cudagraph_capture=capture,
        slot_mappings={0: torch.arange(padded)},
    )
    return [one["layer"] for one in found] if ubatches else found["layer"]


def build_v2(
    group: AttentionGroup, requests: list[Request], rows: int, capture=False
) -> AdamasMetadata:
    """Through DefaultModelState; ``rows`` above the number of requests are a full graph's padding."""
    number, tokens = len(requests), sum(request.new for request in requests)
    buffers = InputBuffers(MAX_ROWS, MAX_TOKENS, torch.device("cpu"))
    batch = InputBatch.make_dummy(number, tokens, buffers)
    starts = starts_of(requests, rows)
    lens = [request.context for request in requests] + [0] * (rows - number)
    batch.query_start_loc_np, batch.query_start_loc = starts, torch.from_numpy(starts)
    batch.seq_lens = torch.tensor(lens, dtype=torch.int32)
    batch.seq_lens_cpu_upper_bound = batch.seq_lens.clone()
    batch.num_scheduled_tokens = np.diff(starts)[:number]
    batch.is_prefilling_np = np.array([request.prefilling for request in requests])
    batch.idx_mapping_np = (np.arange(number) * 7 + 3) % MAX_ROWS
    ask(group, requests, batch.idx_mapping_np.tolist())
    batch.num_reqs_after_padding = rows
    batch.num_tokens_after_padding = padded_tokens(group, requests, rows, capture)
    state = SimpleNamespace(
        max_model_len=MAX_MODEL_LEN, supports_mm_inputs=False, encoder_cache=None, model_config=None
    )
    found = DefaultModelState.prepare_attn(
        state,
        batch,
        CUDAGraphMode.FULL if rows > number or capture else CUDAGraphMode.NONE,
        (block_tables(rows),),
        torch.arange(batch.num_tokens_after_padding)[None],
        [[group]],
        SimpleNamespace(kv_cache_groups=[None]),
        for_capture=capture,
    )
    return found["layer"]


BUILD = {"v1": build_v1, "v2": build_v2}


def build(
    runner: str, options: dict, requests: list[Request], rows: int = 0, drafts: int = 0
) -> AdamasMetadata:
    return BUILD[runner](group_of(options, drafts=drafts), requests, rows or len(requests))


def usual(metadata: AdamasMetadata) -> DecodeBatch:
    """The decode rows of layers without a budget of their own."""
    return next(iter(metadata.decode.values()))


def check(
    metadata: AdamasMetadata,
    options: dict,
    requests: list[Request],
    rows: int = 0,
    drafts: int = 0,
) -> None:
    """Every live row has its own length, budget and blocks, and padding has none."""
    rows, config = rows or len(requests), AdamasConfig.parse(options).resolved()
    few = [request for request in requests if request.new <= 1 + drafts]
    assert requests[: len(few)] == few
    live = [(i, x, x.computed + n + 1) for i, x in enumerate(few) for n in range(x.new)]
    padding = [0] * ((rows - len(requests)) * (1 + drafts))
    contexts = [context for _, _, context in live] + padding
    assert metadata.num_decode_rows == len(contexts)
    assert metadata.query_start_loc.tolist() == list(range(len(contexts) + 1))
    assert list(metadata.decode) == config.budgets
    longest = max((request.context for request in requests), default=0)
    tables = block_tables(rows)
    places = [n for x in few for n in range(x.new)]
    for budget, batch in metadata.decode.items():
        if drafts and few:
            assert batch.positions.tolist()[: len(places)] == places
            assert batch.num_requests >= len(few)
        else:
            assert batch.positions is None
        budgets = [
            context if x.prefilling else max(budget.of(context), min(x.wanted, context))
            for _, x, context in live
        ]
        assert batch.seq_lens.tolist() == contexts
        assert batch.budgets.tolist() == budgets + padding
        assert longest <= batch.max_seq_len <= MAX_MODEL_LEN
        assert torch.equal(batch.block_table[: len(live)], tables[[i for i, _, _ in live]])
        assert len(batch.block_table) == len(contexts)
    several = requests[len(few) :]
    if not several:
        assert metadata.prefill is None
        return
    plan = metadata.prefill
    assert (plan.first_token, plan.num_tokens) == (len(live), sum(x.new for x in several))
    assert plan.query_start_loc.diff().tolist()[: len(several)] == [x.new for x in several]
    assert plan.seq_lens.tolist() == [x.context for x in several]
    assert plan.seq_lens_cpu.tolist() == [x.context for x in several]
    assert torch.equal(plan.block_table, tables[len(few) :])


@pytest.mark.parametrize("runner", RUNNERS)
def test_a_warm_prompt_with_one_token_left_beside_decodes_in_a_padded_graph(runner: str) -> None:
    """641 tokens of which 640 are cached, beside two decodes, in a graph of four rows."""
    requests = in_order([decoding(300), decoding(50), remainder(641)])
    metadata = build(runner, {"token_budget": BUDGET}, requests, rows=4)
    assert usual(metadata).budgets.tolist() == [BUDGET, 50, 641, 0]
    check(metadata, {"token_budget": BUDGET}, requests, rows=4)


@pytest.mark.parametrize("runner", RUNNERS)
def test_one_remainder_is_not_spread_over_the_padding_or_other_rows(runner: str) -> None:
    """A mask of one element would broadcast over any number of rows."""
    for rows in range(1, 9):
        metadata = build(runner, {"token_budget": BUDGET}, [remainder(641)], rows)
        check(metadata, {"token_budget": BUDGET}, [remainder(641)], rows)


@pytest.mark.parametrize("drafts", [0, 3])
@pytest.mark.parametrize("runner", RUNNERS)
def test_graphs_of_every_size(runner: str, drafts: int) -> None:
    """One builder serves them all, as in an engine: nothing of one step is left in the next."""
    options = {"token_budget": BUDGET}
    group = group_of(options, drafts=drafts)
    for rows in range(1, MAX_ROWS + 1):
        for live in {1, (rows + 1) // 2, max(1, rows - 1), rows}:
            requests = [
                chunk(BLOCK * i + 1, 1 + drafts) if i % 3 == 1 else decoding(40 * i + 7, drafts)
                for i in range(live)
            ]
            check(BUILD[runner](group, requests, rows), options, requests, rows, drafts)


OPTIONS = [
    {"token_budget": BUDGET},
    {"token_budget": BUDGET, "selection": "query_head"},
    {"token_budget": 0.25, "min_token_budget": 40},
    {"token_budget": BUDGET, "min_context": 500},
    {"token_budget": BUDGET, "layer_budgets": {"0": 700, "2": 0.5, "5": BUDGET}},
    {"token_budget": 1, "layer_budgets": {"0": 1.0}},
]
WANTED = st.sampled_from([0, 0, BUDGET + 1, 900])
REQUESTS = st.one_of(
    st.builds(
        lambda context, wanted: replace(decoding(context), wanted=wanted),
        st.integers(2, MAX_MODEL_LEN),
        WANTED,
    ),
    st.integers(2, MAX_MODEL_LEN).map(remainder),
    st.just(Request(prompt=1, computed=0)),
    st.builds(chunk, computed=st.integers(0, 2000), new=st.integers(2, 40)),
    st.builds(lambda c, n: Request(c + n + 50, c, n), st.integers(0, 2000), st.integers(2, 40)),
)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("runner", RUNNERS)
@given(
    requests=st.lists(REQUESTS, min_size=1, max_size=12).map(in_order),
    padding=st.integers(0, MAX_ROWS - 12),
)
@settings(max_examples=150, deadline=None)
def test_any_batch(runner: str, options: dict, requests: list[Request], padding: int) -> None:
    """Only graphs are padded, and they hold requests with one new token alone."""
    rows = len(requests) + (padding if all(request.new == 1 for request in requests) else 0)
    check(build(runner, options, requests, rows), options, requests, rows)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("runner", RUNNERS)
@given(
    requests=st.lists(
        st.one_of(
            st.builds(
                lambda context, drafts, wanted: replace(decoding(context, drafts), wanted=wanted),
                st.integers(2, MAX_MODEL_LEN - 4),
                st.integers(0, 4),
                WANTED,
            ),
            st.builds(chunk, computed=st.integers(1, 2000), new=st.integers(1, 8)),
            REQUESTS,
        ),
        min_size=1,
        max_size=12,
    ).map(lambda requests: in_order(requests, drafts=4)),
    padding=st.integers(0, 40),
)
@settings(max_examples=150, deadline=None)
def test_any_batch_with_drafts(
    runner: str, options: dict, requests: list[Request], padding: int
) -> None:
    """Each request has as many as its drafter proposed; only equal numbers go into a padded graph."""
    rows = len(requests) + (padding if all(request.new == 5 for request in requests) else 0)
    check(build(runner, options, requests, rows, 4), options, requests, rows, 4)


def check_chunks(metadata: AdamasMetadata, requests: list[Request]) -> None:
    """Every token of the step sees the blocks of its chunk up to itself, as a row or in the prefill."""
    found = []
    if metadata.num_decode_rows:
        batch = usual(metadata)
        found += zip(batch.block_table.tolist(), batch.seq_lens.tolist(), strict=True)
        assert max(batch.seq_lens) <= batch.max_seq_len <= CHUNK
    if plan := metadata.prefill:
        assert plan.first_token == len(found)
        assert torch.equal(plan.seq_lens, plan.seq_lens_cpu)
        news = plan.query_start_loc.diff().tolist()
        assert sum(news) == plan.num_tokens
        assert max(news) <= plan.max_query_len
        parts = zip(plan.block_table.tolist(), plan.seq_lens.tolist(), news, strict=True)
        found += [
            (blocks, length - new + n + 1) for blocks, length, new in parts for n in range(new)
        ]
    tables = block_tables(len(requests)).tolist()
    expected = []
    for own, request in zip(tables, requests, strict=True):
        for position in range(request.computed, request.context):
            start = position // CHUNK * CHUNK
            expected.append((own[start // BLOCK : position // BLOCK + 1], position - start + 1))
    assert [(blocks[: -(-n // BLOCK)], n) for blocks, n in found] == expected


@pytest.mark.parametrize("drafts", [0, 4])
@pytest.mark.parametrize("runner", RUNNERS)
@given(
    requests=st.lists(
        st.one_of(st.builds(chunk, st.integers(1, 200), st.integers(1, 8)), REQUESTS),
        min_size=1,
        max_size=12,
    )
)
@settings(max_examples=150, deadline=None)
def test_chunked_local_attention(runner: str, drafts: int, requests: list[Request]) -> None:
    """vLLM cuts requests at the chunks before our builder sees them; what they ask for is for other layers."""
    requests = in_order(requests, drafts)
    group = group_of({"token_budget": BUDGET}, drafts=drafts, chunk=CHUNK)
    check_chunks(BUILD[runner](group, requests, len(requests)), requests)


@pytest.mark.parametrize("drafts", [0, 3])
@pytest.mark.parametrize("runner", RUNNERS)
def test_most_requests_that_chunks_cut_in_two(runner: str, drafts: int) -> None:
    """Both parts of each are as short as a decode's."""
    requests = [chunk(CHUNK - 1 - drafts, 2 * (1 + drafts))] * MAX_ROWS
    group = group_of({"token_budget": BUDGET}, drafts=drafts, chunk=CHUNK)
    metadata = BUILD[runner](group, requests, len(requests))
    assert metadata.num_decode_rows == 2 * (1 + drafts) * MAX_ROWS
    check_chunks(metadata, requests)


@pytest.mark.parametrize("runner", RUNNERS)
def test_drafts_have_contexts_of_their_own(runner: str) -> None:
    """Two drafts, none and a prompt's last three tokens: the budget is exceeded within a request."""
    requests = [decoding(99, 2), decoding(300), chunk(200, 3), chunk(50, 4)]
    batch = usual(build(runner, {"token_budget": BUDGET}, requests, drafts=2))
    assert batch.seq_lens.tolist() == [99, 100, 101, 300, 201, 202, 203]
    assert batch.budgets.tolist() == [99, 100, 100, BUDGET, 201, 202, 203]
    assert torch.equal(batch.block_table, block_tables(3)[[0, 0, 0, 1, 2, 2, 2]])


@pytest.mark.parametrize("runner", RUNNERS)
def test_requests_raise_their_budgets(runner: str) -> None:
    """Beside one that asks for nothing, one beyond its context, and a prompt's last token; in all layers."""
    options = {"token_budget": BUDGET, "layer_budgets": {"0": 400}, "max_token_budget": 1000}
    requests = [
        replace(decoding(300), wanted=200),
        decoding(900),
        replace(decoding(600), wanted=1000),
        replace(decoding(900), wanted=700),
        replace(remainder(641), wanted=200),
    ]
    usual, first = build(runner, options, requests, rows=8).decode.values()
    assert usual.budgets.tolist() == [200, BUDGET, 600, 700, 641, 0, 0, 0]
    assert first.budgets.tolist() == [300, 400, 600, 700, 641, 0, 0, 0]


def test_micro_batches_have_their_own_rows() -> None:
    """vLLM leaves the mask out of them, so a prompt's last token is budgeted as a decode step."""
    options = {"token_budget": BUDGET}
    requests = in_order([decoding(300), remainder(641), decoding(90), chunk(100, 30)])
    slices = [UBatchSlice(slice(0, 2), slice(0, 2)), UBatchSlice(slice(2, 4), slice(2, 33))]
    first, second = build_v1(group_of(options, 2), requests, len(requests), ubatches=slices)
    assert usual(first).budgets.tolist() == [BUDGET, BUDGET]
    assert (first.prefill, second.num_decode_rows) == (None, 1)
    assert usual(second).seq_lens.tolist() == [requests[2].context]
    assert second.prefill.num_tokens == 30
    assert torch.equal(second.prefill.block_table, block_tables(4)[3:])


@pytest.mark.parametrize("drafts", [0, 2])
@pytest.mark.parametrize("runner", RUNNERS)
def test_the_audit_knows_the_length_of_every_row(runner: str, drafts: int) -> None:
    """Upper bounds on the host, one per row: a draft's context is its own. Padding and prompts are not audited."""
    group, seen = group_of({"token_budget": BUDGET}, drafts=drafts), []
    builder = group.get_metadata_builder()
    builder.audit = SimpleNamespace(
        reset=lambda: None,
        step=lambda decode, sparse_rows: seen.extend(sparse_rows(next(iter(decode)))),
    )
    requests = in_order(
        [decoding(BUDGET + 1, drafts), decoding(50, drafts), decoding(300, drafts)], drafts
    )
    BUILD[runner](group, requests, 4)
    contexts = [request.computed + n + 1 for request in requests for n in range(request.new)]
    assert seen == [(row, context) for row, context in enumerate(contexts) if context > BUDGET]


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("rows", [1, 2, 8, MAX_ROWS])
@pytest.mark.parametrize("drafts", [0, 3])
def test_a_capture_and_the_steps_that_replay_it_share_their_buffers(
    runner: str, rows: int, drafts: int
) -> None:
    options = {"token_budget": BUDGET, "layer_budgets": {"0": 200, "3": 0.5}}
    group, make = group_of(options, drafts=drafts), BUILD[runner]
    captured = make(group, [Request(1, 0, 1 + drafts)] * rows, rows, capture=True)
    assert captured.num_decode_rows == rows * (1 + drafts)
    make(group, [decoding(70 + i) for i in range(rows)], rows)  # a step outside the graph
    replayed = make(group, [decoding(300, drafts)], rows)
    assert len(captured.decode) == len(replayed.decode) == 3
    lens = list(range(300, 301 + drafts))
    padding = [0] * ((rows - 1) * (1 + drafts))
    addresses = set()
    for budget, before in captured.decode.items():
        now = replayed.decode[budget]
        assert before.max_seq_len == MAX_MODEL_LEN
        assert now.budgets.data_ptr() == before.budgets.data_ptr()
        assert before.budgets.tolist() == [budget.of(n) for n in lens] + padding
        addresses.add(before.budgets.data_ptr())
        if drafts:  # otherwise they are tensors of vLLM
            assert now.seq_lens.data_ptr() == before.seq_lens.data_ptr()
            assert before.seq_lens.tolist() == lens + padding
            assert now.positions.data_ptr() == before.positions.data_ptr()
            assert before.positions.tolist()[: 1 + drafts] == list(range(1 + drafts))
            assert now.block_table.data_ptr() == before.block_table.data_ptr()
            assert torch.equal(before.block_table[: 1 + drafts], block_tables(1)[[0] * len(lens)])
    assert len(addresses) == 3
    assert captured.query_start_loc.data_ptr() == replayed.query_start_loc.data_ptr()


def common(**changes) -> CommonAttentionMetadata:
    """Three decodes, the last of which is a prompt's last token."""
    lens = torch.tensor([300, 50, 641], dtype=torch.int32)
    starts = torch.arange(4, dtype=torch.int32)
    fields = {
        "query_start_loc": starts,
        "query_start_loc_cpu": starts,
        "seq_lens": lens,
        "num_reqs": 3,
        "num_actual_tokens": 3,
        "max_query_len": 1,
        "max_seq_len": 641,
        "block_table_tensor": block_tables(3),
        "slot_mapping": torch.arange(3),
        "seq_lens_cpu_upper_bound": lens,
        "is_prefilling": torch.tensor([False, False, True]),
    }
    return CommonAttentionMetadata(**{**fields, **changes})


@pytest.mark.parametrize(
    ("mask", "budgets"),
    [
        ([False, False, True], [100, 50, 641]),
        ([False, False], [100, 50, 100]),
        ([True], [300, 50, 100]),
        ([], [100, 50, 100]),
        (None, [100, 50, 100]),
        ([True, False, False, True, True], [300, 50, 100]),
    ],
    ids=str,
)
def test_masks_that_are_missing_or_of_another_length(mask, budgets: list[int]) -> None:
    mask = None if mask is None else torch.tensor(mask, dtype=torch.bool)
    builder = group_of({"token_budget": BUDGET}).get_metadata_builder()
    metadata = builder.build(0, common(is_prefilling=mask))
    assert usual(metadata).budgets.tolist() == budgets


def test_a_step_without_requests() -> None:
    nothing = torch.zeros(0, dtype=torch.int32)
    builder = group_of({"token_budget": BUDGET}).get_metadata_builder()
    metadata = builder.build(
        0,
        common(
            query_start_loc=torch.zeros(1, dtype=torch.int32),
            query_start_loc_cpu=torch.zeros(1, dtype=torch.int32),
            seq_lens=nothing,
            seq_lens_cpu_upper_bound=nothing,
            num_reqs=0,
            num_actual_tokens=0,
            max_query_len=0,
            max_seq_len=0,
            block_table_tensor=block_tables(0),
            slot_mapping=nothing.long(),
            is_prefilling=torch.zeros(0, dtype=torch.bool),
        ),
    )
    assert (metadata.num_decode_rows, metadata.prefill) == (0, None)
    batch = usual(metadata)
    assert len(batch.seq_lens) == len(batch.budgets) == len(batch.block_table) == 0


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"causal": False}, "non-causal"),
        ({"causal": torch.tensor([True, True, False])}, "non-causal"),
        ({"rswa_prefix_lens": torch.tensor([1, 1, 1])}, "reference sliding window"),
    ],
    ids=["not causal", "some rows not causal", "rswa"],
)
def test_attention_that_is_not_causal_over_the_context(changes: dict, what: str) -> None:
    builder = group_of({}).get_metadata_builder()
    refused(lambda: builder.build(0, common(**changes)), what, "--attention-backend")
