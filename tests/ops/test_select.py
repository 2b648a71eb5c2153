"""Select: the tokens of the best scores, forced ones among them; CUDA has it inside its decode alone."""

import pytest
import torch
from cases import SCORES, check_select
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from targets import Target, over_targets, target  # noqa: F401


def kept_tokens(length: int) -> list[tuple[int, int, int]]:
    """Budgets, sinks and recent tokens."""
    kept = [(1, 0, 0), (length // 2 + 1, 0, 0), (length + 9, 0, 0)]
    if length > 8:
        kept += [(length - 1, 0, 5), (max(8, length // 10), 3, 4)]
    return kept


def more_kept_tokens(length: int) -> list[tuple[int, int, int]]:
    """For backends that are fast."""
    kept = [(length - 1, 0, 0), (length, 0, 0)]
    if length > 8:
        kept += [(8, 3, 4), (max(8, length // 10), 7, 0)]
    return [*kept, (0, 0, 0), (-(2**31), 2, 1), (4, 40, 1), (1, length, length)]


def check_kept(target: Target, kind: str, length: int, kept: list[tuple[int, int, int]]) -> None:
    scores = SCORES[kind]((3, 2, length), torch.Generator().manual_seed(length)).to(target.device)
    lens = torch.tensor([length, length // 2 + 1, 0], dtype=torch.int32, device=target.device)
    for budget, sinks, recent in kept:
        budgets = (budget, 2 * budget if budget > 0 else budget, budget)
        check_select(target.backend, scores, lens, budgets, sinks, recent)
    check_select(target.backend, scores, lens, (0, -(2**31), 2), 2, 5)


@pytest.mark.parametrize("length", [1, 3001])
@pytest.mark.parametrize("kind", SCORES)
@over_targets("cpu", "triton")
def test_select(target: Target, kind: str, length: int) -> None:
    check_kept(target, kind, length, kept_tokens(length))


@pytest.mark.parametrize("length", [1, 2, 17, 255, 1023, 1024, 1025, 5003])
@pytest.mark.parametrize("kind", SCORES)
@over_targets("cpu")
def test_select_of_odd_lengths(target: Target, kind: str, length: int) -> None:
    check_kept(target, kind, length, kept_tokens(length) + more_kept_tokens(length))


@over_targets("cpu", "triton")
def test_select_takes_both_zeros_as_one_score(target: Target) -> None:
    scores = torch.tensor([[[0.0, -0.0, 0.0, -0.0, -1.0]]], device=target.device)
    lens = torch.tensor([5], dtype=torch.int32, device=target.device)
    check_select(target.backend, scores, lens, (2,), 0, 0)


@over_targets("cpu")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_select_any_scores(target: Target, data) -> None:
    values = st.floats(width=32, allow_nan=False, allow_infinity=False)
    few = st.sampled_from([-3.5, 0.0, -0.0, 1e-38, 7.0])  # both zeros are one score
    scores = data.draw(st.lists(data.draw(st.sampled_from([values, few])), min_size=1, max_size=90))
    budget = data.draw(st.integers(1, len(scores) + 1))
    lens = torch.tensor([len(scores)], dtype=torch.int32)
    check_select(target.backend, torch.tensor(scores).view(1, 1, -1), lens, (budget,), 0, 0)
