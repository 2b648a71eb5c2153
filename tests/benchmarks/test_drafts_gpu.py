"""Steps of speculative decoding: the table, what the peer is asked for, and cells that are refused."""

import sys

import bench_drafts_gpu as bench
import pytest
import torch
from peers.base import Cell


def test_the_table_compares_with_one_position() -> None:
    cells = [
        {
            "context": 32768,
            "requests": 8,
            "positions": n,
            "fa3": {"us": dense},
            "adamas": {"us": us},
            "runs": runs,
            runs: {"us": us},
            "three": {"us": 120.0},
        }
        for n, dense, us, runs in ((1, 240.0, 40.0, "fused"), (4, 252.0, 100.0, "shared"))
    ]
    _, rows = bench.table(cells)
    assert rows[0][3:7] == ["240.0 (1.00x)", "40.0 (1.00x)", "6.00x", "one kernel"]
    assert rows[0][7:] == ["40.0", "120.0", "–"]
    assert rows[1][3:7] == ["252.0 (1.05x)", "100.0 (2.50x)", "2.52x", "shared scan"]
    assert rows[1][7:] == ["–", "120.0", "100.0"]


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
