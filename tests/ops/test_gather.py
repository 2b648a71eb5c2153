"""Gather: K and V of whole contexts, row after row, as the pages hold them."""

import dataclasses

import torch
from cases import Case, many
from targets import Target, on_cpu, over_cases, target  # noqa: F401


def check_gather(target: Target, case: Case) -> None:
    batch = target.build(case)
    got = batch.gathered(target.backend, target.gather_dtype)
    expected = torch.stack(on_cpu(batch).stored()).to(got.dtype)
    assert torch.equal(got.cpu(), expected)


@over_cases()
def test_gather(target: Target, case: Case) -> None:
    check_gather(target, case)


MANY = {
    "cpu": {"1030": many(1030)},
    "cuda": {"4096": many(4096), "4096-e4m3": dataclasses.replace(many(4096), fp8="e4m3")},
}


@over_cases(cases=MANY)
def test_gather_of_many_rows(target: Target, case: Case) -> None:
    """More than are added up at a time."""
    check_gather(target, case)
