"""The parts of a decode step, from a trace of two layers."""

import bench_step_gpu as bench
import pytest

KERNELS = (  # name, µs
    ("void adamas::append_kernel<4>(adamas::AppendParams)", 2),
    ("void adamas::fused_kernel<128>(adamas::DecodeParams)", 10),
    ("nvjet_sm90_tst_128x8_64x12_2x1_v_bz_TNT", 20),
    ("triton_red_fused_fused_add_rms_norm_0", 3),
)
LAYERS, GAP = 2, 1.0


def trace(steps: int, pause_after: int = -1, overlap: float = 0.0) -> dict:
    """Steps of two layers, with a gap after each kernel; the second kernel starts ``overlap`` µs early."""
    events, now = [{"cat": "cpu_op", "ts": 0, "dur": 9, "name": "append_kernel"}], 0.0
    for step in range(steps):
        for _ in range(LAYERS):
            for at, (name, us) in enumerate(KERNELS):
                early = overlap if at == 1 else 0.0
                event = {"cat": "kernel", "ts": now - early, "dur": us + early, "name": name}
                events.append(event)
                now += us + GAP
        now += 500 * (step == pause_after)
    return {"traceEvents": events}


@pytest.mark.parametrize("overlap", [0.0, 0.5])
def test_each_kernel_counts_for_its_kind(overlap: float) -> None:
    found = bench.parts(trace(6, overlap=overlap), LAYERS)
    assert found["steps"] == 4
    assert found["us"] == {
        "cache write": LAYERS * 2,
        "decode attention": LAYERS * (10 + overlap),
        "matrix products": LAYERS * 20,
        "other kernels": LAYERS * 3,
        "no kernel": LAYERS * (4 * GAP - overlap) - GAP,  # the last gap is the next step's
    }
    assert found["kernels"][0] == {"name": KERNELS[2][0], "us": LAYERS * 20, "count": LAYERS}


def test_time_is_counted_once() -> None:
    """A kernel that starts while another one runs counts from where that one ends."""
    plain = bench.parts(trace(6), LAYERS)["us"]
    found = bench.parts(trace(6, overlap=GAP + 1.5), LAYERS)["us"]
    assert found["cache write"] == plain["cache write"]
    assert found["decode attention"] == plain["decode attention"] + LAYERS * GAP


def test_a_pause_of_the_server_does_not_count() -> None:
    assert bench.parts(trace(8, pause_after=3), LAYERS)["us"] == bench.parts(trace(8), LAYERS)["us"]


def test_a_trace_without_a_whole_step_is_refused() -> None:
    with pytest.raises(ValueError, match="no whole step"):
        bench.parts(trace(2), LAYERS)
