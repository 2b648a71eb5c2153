"""Steps of speculative decoding: the table, what the peer is asked for, and cells that are refused."""

import sys

import bench_drafts_gpu as bench
import pytest
import torch
from peers.base import Cell


def test_the_table_compares_with_one_position() -> None:
    cells = [
        {"context": 32768, "requests": 8, "positions": n, "fa3": {"us": a}, "adamas": {"us": b}}
        for n, a, b in ((1, 240.0, 40.0), (4, 252.0, 100.0))
    ]
    _, rows = bench.table(cells)
    assert rows[0][3:] == ["240.0 (1.00x)", "40.0 (1.00x)", "6.00x"]
    assert rows[1][3:] == ["252.0 (1.05x)", "100.0 (2.50x)", "2.52x"]


def test_a_peer_gets_the_positions_of_a_request_as_one_sequence() -> None:
    cache = torch.zeros(128, 2, 8)
    cell = Cell(cache, cache, lambda size: [], 4, 64, rows=2, launch=64, positions=3)
    asked = cell.varlen_arguments(16)
    assert asked["cu_seqlens_q"].tolist() == [0, 3, 6]
    assert asked["max_seqlen_q"] == 3
    assert cell.queries(1)[0].shape == (6, 4, 8)


def test_cells_that_are_none_are_refused(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_drafts_gpu.py", "--cells", "100x1"])
    with pytest.raises(SystemExit):
        bench.main()
    assert "is not a cell" in capsys.readouterr().err
