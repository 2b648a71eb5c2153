"""Scan: a score of every token of every context."""

import pytest
import torch
from cases import Case
from targets import REFERENCE, Target, on_cpu, over_cases, over_targets, target  # noqa: F401


@over_cases()
def test_scan(target: Target, case: Case) -> None:
    """Bit-identical: a score is an exact integer times the token's scale, rounded once."""
    batch = target.build(case)
    # Codes on a threshold may differ, so the reference reads what the kernels wrote.
    host = on_cpu(batch)
    ours, theirs = batch.scan(target.backend).cpu(), host.scan(REFERENCE)
    clear = ~host.ambiguous()
    assert clear.float().mean() > 0.75
    assert ours.shape == theirs.shape
    assert torch.equal(ours[clear], theirs[clear])
    for row, length in enumerate(case.lengths):
        assert ours[row, :, :length].isfinite().all()
        assert (ours[row, :, length:] == -torch.inf).all()


@pytest.mark.parametrize("selection", ["query_head", "kv_head"])
@pytest.mark.parametrize("head_size, dim", [(64, 3), (80, 70), (96, 3), (96, 95), (192, 70)])
@over_targets("cpu")
def test_scan_of_a_query_with_nan(target: Target, head_size: int, dim: int, selection: str) -> None:
    """It has no codes, whichever part of the head the transform spreads the NaN over."""
    case = Case(head_size=head_size, selection=selection, lengths=(300, 70))
    batch = target.build(case)
    batch.query[0, 1, dim] = torch.nan
    ours, theirs = batch.scan(target.backend), batch.scan(REFERENCE)
    assert not ours[0, 0 if selection == "kv_head" else 1, :300].any()
    assert torch.equal(ours[0, :, :300].isnan(), theirs[0, :, :300].isnan())
    assert torch.equal(ours == 0, theirs == 0)
