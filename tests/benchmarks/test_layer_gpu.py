"""Steps between matrix products: the table, and arguments that are refused before a GPU is asked for."""

import sys

import bench_layer_gpu as bench
import pytest


def test_the_table_shows_what_a_step_adds() -> None:
    fa3 = {"us": 42.0, "spread_us": 0.3, "alone_us": 41.0}
    ours = {"us": 20.0, "spread_us": 0.2, "alone_us": 19.0, "speedup": 2.1}
    cell = {"context": 32768, "rows": 1, "keys": "real", "copies": 2, "fa3": fa3, "dot max": ours}
    headers, rows = bench.table([cell])
    assert headers[3:] == ["fa3 µs (alone)", "dot max µs (alone)"]
    assert rows == [[32768, 1, "real", "42.0 (41.0)", "20.0 (19.0) 2.10x"]]


@pytest.mark.parametrize("cell", ["32768", "100x1", "0x1"])
def test_cells_that_are_none_are_refused(monkeypatch, capsys, cell: str) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_layer_gpu.py", "--cells", cell])
    with pytest.raises(SystemExit):
        bench.main()
    assert "is not a cell" in capsys.readouterr().err
