"""The decode benchmark on a CPU: a stand-in for the CUDA backend computes, and nothing is timed."""

from __future__ import annotations

import copy
import importlib
import itertools
import json
import sys
from types import SimpleNamespace

import bench_decode_gpu as bench
import pytest
import torch
from bench_decode_gpu import Bench, Part, Pool
from common import ROOT
from keys import Contexts, Heads

from vllm_adamas.backends.base import Params
from vllm_adamas.backends.cuda.policy import THREE, Form
from vllm_adamas.backends.reference.backend import ReferenceBackend

HEADS, LENGTH, ROWS, COPIES = Heads(4, 2, 64), 192, 2, 3


class Host(ReferenceBackend):
    """The CUDA backend's interface. Of every step one set is selected again; ``launches`` has each
    step's bound and the tokens that its block table holds."""

    def __init__(self):
        self.launches: list[tuple[int, int]] = []

    def plan(self, layer, rows, dtype, max_seq_len):
        return SimpleNamespace(form=Form(2, 8) if max_seq_len <= LENGTH else THREE)

    def fused_form(self, layer, rows, dtype, max_seq_len):
        return Form(2, 8)

    def decode(self, layer, query, batch, output, stats, *, form, stages=7):
        size = layer.params.layout.block_size
        self.launches.append((batch.max_seq_len, batch.block_table.shape[1] * size))
        super().decode(layer, query, batch, output, stats)
        stats[4] += 1


def pool(**options) -> Pool:
    return Pool(HEADS, LENGTH, ROWS, COPIES, device="cpu", **options)


def contexts(name: str = "drift") -> Contexts:
    return Contexts(name, HEADS, LENGTH, COPIES * ROWS, torch.Generator().manual_seed(3))


@pytest.fixture
def filled() -> tuple[Pool, list[torch.Tensor]]:
    """A pool, and the keys of its contexts."""
    made, backend = pool(), ReferenceBackend()
    given = contexts()
    kept: list[list[torch.Tensor]] = []

    def keys(row):
        kept.append([])
        for chunk in Contexts.keys(given, row):
            kept[-1].append(chunk.to(bench.DTYPE))
            yield chunk

    given.keys = keys
    made.fill(backend, given)
    return made, [torch.cat(chunks) for chunks in kept]


def test_contexts_lie_in_pages_in_the_order_of_their_positions(filled) -> None:
    made, expected = filled
    backend = ReferenceBackend()
    layer, lens = made.layer(backend, "dot", "kv_head"), torch.full((ROWS,), LENGTH)
    found = []
    for table in made.tables():
        key, value = torch.empty(2, ROWS * LENGTH, HEADS.kv, HEADS.size, dtype=bench.DTYPE)
        backend.gather(layer, table, lens.int(), key, value)
        found += key.unflatten(0, (ROWS, LENGTH)).unbind()
    assert len(found) == len(expected) == COPIES * ROWS
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("block_size", [16, 64])
def test_the_dense_cache_has_the_same_contexts(filled, block_size: int) -> None:
    made, expected = filled
    key, _ = made.cell(LENGTH).pages(block_size)
    found = [key[row].flatten(0, 1) for table in made.tables(block_size) for row in table.long()]
    assert all(map(torch.equal, found, expected))


def test_contexts_share_no_block_and_are_shuffled() -> None:
    tables = torch.stack(pool().tables())
    assert tables.shape == (COPIES, ROWS, LENGTH // bench.BLOCK_SIZE)
    assert sorted(tables.flatten().tolist()) == list(range(tables.numel()))
    assert tables.flatten().tolist() != list(range(tables.numel()))


@pytest.fixture
def measured(monkeypatch):
    """A function from a part to its cells. Calls run once; the baseline takes a microsecond a token."""

    def timed(calls, replays=1):
        for call in calls:
            call()
        return {"us": 50.0, "q1": 49.0, "q3": 51.0}

    def peer(peer, pool, launch):
        return {"us": float(launch), "q1": 1.0, "q3": 1.0, "GBps": 1}

    monkeypatch.setattr(bench, "timed", timed)
    monkeypatch.setattr(bench, "bench_peer", peer)
    monkeypatch.setattr(
        bench, "bench_read", lambda pool: {"us": 5.0, "q1": 5.0, "q3": 5.0, "GBps": 9}
    )
    monkeypatch.setattr(bench, "WORKING_SET", 1)
    monkeypatch.setattr(bench, "SERVED", (256, 512))

    def run(part: Part, backend=None, dense=True):
        return Bench(backend or Host(), dense, [], device="cpu").part(part)

    return run


def part(**options) -> Part:
    return Part(((LENGTH, ROWS),), heads=(HEADS,), budgets=(32,), **options)


def test_steps_are_launched_for_the_server_or_exactly(measured) -> None:
    backend = Host()
    server, exact = measured(part(launches=("server", "exact"), selections=("kv_head",)), backend)
    assert (server["launch"], exact["launch"]) == (256, LENGTH)
    assert set(backend.launches) == {(256, 256), (LENGTH, LENGTH)}
    # The policy and the baseline are asked about the same launch.
    for cell, runs in ((server, "three"), (exact, "fused")):
        assert cell["dot kv_head"]["runs"] == runs
        assert cell["fa3"]["us"] == cell["launch"]
        assert cell["dot kv_head"]["three"]["speedup"] == round(cell["launch"] / 50, 2)


def test_a_context_of_the_servers_length_is_launched_once(measured) -> None:
    (cell,) = measured(
        Part(((256, 1),), heads=(HEADS,), budgets=(32,), launches=("server", "exact"))
    )
    assert cell["launch"] == 256


def test_fallbacks_are_a_share_of_the_token_sets(measured) -> None:
    cell, _ = measured(part(keys=("gaussian", "repeat2")))
    for selection, sets in (("query_head", HEADS.query), ("kv_head", HEADS.kv)):
        for form in ("three", "fused"):
            assert cell[f"dot {selection}"][form]["again"] == round(1 / (ROWS * sets), 4)


def test_the_first_cell_of_a_part_is_thorough(measured) -> None:
    cells = measured(part(keys=("gaussian", "real"), launches=("server", "exact"), thorough=True))
    assert [cell["keys"] for cell in cells] == ["gaussian", "gaussian", "real", "real"]
    assert ["read" in cell for cell in cells] == [True, False, False, False]
    assert "scan_us" in cells[0]["dot kv_head"]["three"]
    assert "scan_us" not in cells[2]["dot kv_head"]["three"]


def test_without_a_baseline_there_is_no_speed_up(measured) -> None:
    (cell,) = measured(part(), dense=False)
    assert "fa3" not in cell
    assert "speedup" not in cell["dot kv_head"]["three"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--cells", "32768"], ("32768x8", "multiple of 64")),
        (["--cells", "1000x1"], ("multiple of 64",)),
        (["--cells", "2097152x1"], ("1048576",)),
        (["--heads", "30x8x128"], ("32x8x128",)),
        (["--heads", "32x8x96", "--keys", "real"], ("96", "--keys")),
        (["--budgets", "0"], ("token_budget",)),
        (["--quick", "--parts", "cells"], ("--quick", "--parts")),
    ],
)
def test_bad_options_end_before_a_measurement(monkeypatch, capsys, arguments, words) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_decode_gpu.py", *arguments])
    with pytest.raises(SystemExit):
        bench.parse_args()
    message = capsys.readouterr().err.splitlines()[-1]
    assert all(word in message for word in words)


def test_options_replace_those_of_every_part(monkeypatch) -> None:
    options = "--parts cells keys --cells 8192x8 --heads 24x8x128 9x3x64 --keys real --budgets 64 --launch exact"
    monkeypatch.setattr(sys, "argv", ["bench_decode_gpu.py", *options.split()])
    _, parts = bench.parse_args()
    assert list(parts) == ["cells", "keys"]
    for one in parts.values():
        assert one.cells == ((8192, 8),)
        assert one.heads == (Heads(24, 8, 128), Heads(9, 3, 64))
        assert (one.keys, one.budgets, one.launches) == (("real",), (64,), ("exact",))


def test_the_quick_set_has_every_distribution() -> None:
    (quick,) = bench.QUICK.values()
    assert set(quick.keys) == set(bench.DISTRIBUTIONS)
    assert quick.cells == ((32768, 1), (32768, 8), (8192, 8))
    assert (quick.launches, quick.budgets) == (("server",), (256,))
    assert (quick.scores, quick.selections) == (("dot",), ("kv_head",))


def test_a_pool_is_coded_as_its_layers_read_it() -> None:
    """Pages are written once, for both scores."""
    codings = {pool().params(score, "kv_head").coding for score in bench.SCORES}
    assert len(codings) == 1
    assert isinstance(pool().params("dot", "kv_head"), Params)


# what the documents make of a record


@pytest.fixture
def update_kernels(monkeypatch):
    """The script, whose ``common`` is that of the benchmarks."""
    for name in ("common", "update_kernels"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("update_kernels")


def scaled(cell: dict, factor: float, **changes) -> dict:
    """A cell whose steps took ``factor`` times as long."""
    changed = copy.deepcopy(cell) | changes
    for name, result in changed.items():
        for form in ("three", "fused") if isinstance(result, dict) and "runs" in result else ():
            if form in result:
                one = changed[name][form]
                one |= {"us": one["us"] * factor, "speedup": one["speedup"] / factor, "again": 0.0}
    return changed


@pytest.fixture
def record() -> dict:
    """Cells launched for a server, exactly, and over other keys: real ones are slowest at eight rows."""
    published = json.loads(bench.RESULTS.read_text())
    made = {**published, "cells": [], "keys": []}
    for cell in published["cells"]:
        if cell["context"] < cell["launch"]:
            made["cells"].append(scaled(cell, 2.0, launch=1 << 17))
            made["cells"].append(scaled(cell, 1.0, launch=cell["context"]))
            cell = {key: one for key, one in cell.items() if not key.startswith("manhattan")}
            factor = 3.0 if cell["rows"] == 8 else 1.5
            made["keys"].append(scaled(cell, factor, launch=1 << 17, keys="real"))
            made["keys"].append(scaled(cell, 10.0, launch=1 << 17, keys="repeat1"))
            result = made["keys"][-1]["dot kv_head"]
            result[result["runs"]]["again"] = 0.25
    return made


def columns(lines: list[str], title: str) -> list[list[str]]:
    """The table that follows a line, without its rule: the text of every field."""
    start = next(i for i, line in enumerate(lines) if line.startswith(title))
    rows = itertools.takewhile(
        lambda line: line.startswith("|"),
        itertools.dropwhile(lambda line: not line.startswith("|"), lines[start:]),
    )
    fields = [[field.strip() for field in line.strip("|").split("|")] for line in rows]
    return [fields[0], *fields[2:]]


def test_the_table_shows_the_worse_of_gaussian_and_real_keys(update_kernels, record) -> None:
    lines = update_kernels.conditions(record) + update_kernels.cells(record)
    assert lines[0] == (
        "Steps were launched for 131,072 or 1,048,576 tokens. Times are the slower ones of Gaussian and real keys, "
        "where both were measured."
    )
    _, *rows = columns(lines, "Steps")
    cells = [cell for cell in record["cells"] if cell["launch"] > cell["context"]]
    assert len(rows) == len(cells)
    for row, cell in zip(rows, cells, strict=True):
        factor = 1.5 if cell["rows"] == 8 else 1.0
        assert row[3].startswith(f"{factor * update_kernels.used(cell, 'dot kv_head')['us']:.1f} ")
        assert row[6].startswith(f"{update_kernels.used(cell, 'manhattan kv_head')['us']:.1f} ")


def test_every_distribution_has_a_column(update_kernels, record) -> None:
    lines = update_kernels.over_all_keys(record)
    names, *rows = columns(lines, "Over all keys, dot, per KV head, sum")
    assert names[2:] == ["gaussian", "real", "repeat1", "gaussian, launched exactly"]
    shown = dict(zip(names, rows[-1], strict=True))  # 32K x 32
    us = update_kernels.used(record["cells"][-1], "dot kv_head")["us"]
    assert shown["gaussian, launched exactly"].startswith(f"{us:.1f} ")
    assert shown["gaussian"].startswith(f"{2 * us:.1f} ")
    assert shown["repeat1"].startswith(f"{10 * us:.1f} ")
    assert shown["repeat1"].endswith("(25.0%)")
    assert "%" not in shown["real"]


def test_a_record_of_the_benchmark_can_be_shown(update_kernels, measured) -> None:
    part = Part(
        ((192, 1),), budgets=(32,), scores=bench.SCORES, launches=bench.LAUNCHES, thorough=True
    )
    others = Part(((192, 1),), budgets=(32,), keys=("sinks", "real"))
    heads = Part(((192, 1),), heads=(Heads(9, 3, 64), Heads(4, 1, 256)), budgets=(32,))
    parts = {"cells": part, "keys": others, "heads": heads}
    record = {name: measured(one) for name, one in parts.items()}
    for cells in record.values():
        for cell in cells:
            cell["fa3"]["us"] = 100.0
    record["cells"][0]["dot query_head"]["three"]["scan_us"] = 10.0
    environment = SimpleNamespace(gpu="a GPU", driver="1", cuda="2", versions={"torch": "3"})
    lines = update_kernels.render(record, environment)
    names, row = columns(lines, "Over all keys, dot, per query head")
    assert names[2:] == ["gaussian", "sinks", "real", "gaussian, launched exactly"]
    assert all("50.0" in field for field in row[2:])
    _, *shapes = columns(lines, "Other layers")
    assert [row[1] for row in shapes] == ["9x3x64", "4x1x256"]
