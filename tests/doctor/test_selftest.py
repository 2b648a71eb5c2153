"""The self-test: it passes on the kernels of this host, and fails on each kind of fault."""

import cases
import pytest
import torch
from targets import COMPILED, Target, over_targets, target  # noqa: F401

from vllm_adamas.backends.reference import ReferenceBackend
from vllm_adamas.doctor import selftest
from vllm_adamas.doctor.selftest import CASES, PADDING, Batch


@over_targets("cpu", "triton", "cuda")
def test_the_kernels_of_this_host_pass(target: Target, monkeypatch) -> None:
    if target.backend.name == "triton" and not COMPILED:  # interpreted kernels take seconds a batch
        few = {name: case for name, case in CASES.items() if case.distinct}
        monkeypatch.setattr(selftest, "CASES", few)
    outcome = selftest.run(target.backend, target.device)
    assert outcome.failures == []
    assert outcome.cases == len(selftest.CASES) > 1


@pytest.mark.parametrize("name", CASES)
def test_no_code_depends_on_the_order_of_additions(name: str) -> None:
    """What makes equality of codes, scores and tokens a fair demand."""
    case = CASES[name]
    built = Batch.build(case, "cpu")
    batch = cases.Batch(
        params=built.params,
        kv=torch.cat((built.key, built.value), 1),
        slots=built.slots,
        memory=built.pages,
        query=built.query,
        block_table=built.rows.block_table,
        seq_lens=built.rows.seq_lens,
        budgets=built.rows.budgets,
    )
    assert not cases.near_threshold(batch.coded_keys(), batch.params).any()
    assert not batch.ambiguous().any()


def test_the_batches_have_corners() -> None:
    for case in CASES.values():
        assert 0 in case.lengths
        assert any(length % 32 for length in case.lengths)
    assert any(case.distinct for case in CASES.values())
    assert {case.heads.group for case in CASES.values()} >= {2, 3, 4}
    dense = [
        all(budget >= n for budget, n in zip(case.budgets, case.lengths, strict=True))
        for case in CASES.values()
    ]
    assert any(dense)
    assert not all(dense)


class FlipsABit(ReferenceBackend):
    def append(self, layer, key, value, slot_mapping):
        super().append(layer, key, value, slot_mapping)
        layer.params.layout.lo(layer.kv_cache)[int(slot_mapping[7]) // 32, 0, 0, 0, 0] ^= 1


class WritesBesideTheTokens(ReferenceBackend):
    def append(self, layer, key, value, slot_mapping):
        used = slot_mapping[slot_mapping >= 0] // 32
        (spare,) = set(range(len(layer.kv_cache))) - set(used.tolist())
        layer.params.layout.v(layer.kv_cache)[spare, 0, 0, 0] = 1
        super().append(layer, key, value, slot_mapping)


class FitsScalesBadly(ReferenceBackend):
    def append(self, layer, key, value, slot_mapping):
        super().append(layer, key, value, slot_mapping)
        layer.params.layout.scale(layer.kv_cache)[:] *= 1.01


class ScoresWrongly(ReferenceBackend):
    def scan(self, layer, query, block_table, seq_lens):
        scores = super().scan(layer, query, block_table, seq_lens)
        scores[0, 1, 299] += 1
        return scores


class BreaksTiesTowardsTheOldest(ReferenceBackend):
    def select(self, params, scores, seq_lens, budgets):
        chosen = super().select(params, scores, seq_lens, budgets)
        budget = int(budgets[0])
        oldest = scores[0, 0].sort(descending=True, stable=True).indices[:budget]
        chosen[0, 0, :budget] = oldest.sort().values
        return chosen


class AttendsToTheWrongTokens(ReferenceBackend):
    """Its output is a plausible attention, over one budget too few."""

    def decode(self, layer, query, batch, output, stats):
        batch.budgets[0] -= 1
        super().decode(layer, query, batch, output, stats)
        batch.budgets[0] += 1
        stats[3] += query.shape[1]


class WritesNaN(ReferenceBackend):
    def decode(self, layer, query, batch, output, stats):
        super().decode(layer, query, batch, output, stats)
        output[2, 1, 5] = torch.nan


class LeavesEmptyRowsAsTheyAre(ReferenceBackend):
    def decode(self, layer, query, batch, output, stats):
        before = output[3].clone()
        super().decode(layer, query, batch, output, stats)
        output[3] = before


class WritesPaddingRows(ReferenceBackend):
    def decode(self, layer, query, batch, output, stats):
        super().decode(layer, query, batch, output, stats)
        output[-PADDING:] = 0


class DoesNotCount(ReferenceBackend):
    def decode(self, layer, query, batch, output, stats):
        super().decode(layer, query, batch, output, stats.clone())


class SwapsKeysAndValues(ReferenceBackend):
    def gather(self, layer, block_table, seq_lens, key, value):
        super().gather(layer, block_table, seq_lens, value, key)


@pytest.mark.parametrize(
    ("broken", "found"),
    [
        (FlipsABit, "append: 1 of "),
        (WritesBesideTheTokens, "bytes of the v plane are wrong"),
        (FitsScalesBadly, "scales are wrong"),
        (ScoresWrongly, "scan: 1 of 3000 scores are wrong, the first at [0, 1, 299]"),
        (BreaksTiesTowardsTheOldest, "selected tokens are wrong, the first at [0, 0, "),
        (AttendsToTheWrongTokens, "heads of the output are wrong, the first at [0, "),
        (WritesNaN, "decode: 1 of 40 heads of the output are wrong, the first at [2, 1]"),
        (LeavesEmptyRowsAsTheyAre, "the first at [3, 0]"),
        (WritesPaddingRows, "padding rows are wrong"),
        (DoesNotCount, "decode: counted [0, 0, 0, 0] where"),
        (SwapsKeysAndValues, "gather: "),
    ],
)
def test_a_fault_is_found(broken: type[ReferenceBackend], found: str) -> None:
    failures = list(selftest.check(CASES["dot, kv_head, max, equal keys"], broken(), "cpu"))
    assert any(found in failure for failure in failures), failures


def test_what_a_kernel_raises_is_a_failure(monkeypatch) -> None:
    class Raises(ReferenceBackend):
        def decode(self, layer, query, batch, output, stats):
            raise RuntimeError("no kernel image is available\nfor this device")

    monkeypatch.setattr(selftest, "CASES", {"some": CASES["manhattan, query_head, equal keys"]})
    outcome = selftest.run(Raises(), "cpu")
    assert outcome.failures == ["some: RuntimeError: no kernel image is available"]
