import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from nha_jax.errors import UserError
from nha_jax.training import bench, breakdown

TINY = str(Path(__file__).parent / "tiny.py")

HLO = """
HloModule jit_step

fused_computation {
  ROOT add.1 = f32[8]{0} add(p0, p1), metadata={op_name="jit(step)/optimizer/add"}
}

ENTRY main {
  %p = f32[8]{0} parameter(0), metadata={op_name="state.params"}
  %loop_add_fusion.3 = f32[8]{0} fusion(%p), metadata={op_name="jit(step)/optimizer/add"}
  %custom-call.7 = bf16[8]{0} custom-call(%p), metadata={op_name="jit(step)/jvp()/attention_op/x"}
  ROOT %copy.2 = f32[8]{0} copy(%loop_add_fusion.3)
}
"""


def test_settings_are_measured_in_processes_of_their_own(tmp_path):
    found = tmp_path / "results.json"
    command = [sys.executable, "-m", "nha_jax.training.bench", "--config", TINY]
    command += ["--setting", "big: batch_size=16", "--setting", "two: accumulate=2"]
    command += ["--steps", "2", "--profile", "big", "--json", str(found)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    big, two = json.loads(found.read_text())
    assert (big["name"], two["name"]) == ("big", "two")
    assert (big["tokens"], two["tokens"]) == (16 * 8, 8 * 8)
    for result in (big, two):
        assert result["error"] is None
        assert len(result["step_ms"]) == 2
        assert min(result["step_ms"]) > 0 < result["compile_s"]
        assert result["loss"] == pytest.approx(2.8, abs=0.5)  # log(16)
    assert two["breakdown_ms"] is None
    times = big["breakdown_ms"]
    assert set(times) == {*breakdown.CLASSES, "gaps"}
    for kind in ("attention op", "matrix products", "cross entropy", "optimizer"):
        assert times[kind] > 0
    assert times["collectives"] == 0
    assert "| big | 8 | 128 |" in done.stdout


def test_a_setting_without_a_name_is_refused():
    assert bench.parse_setting("T 8: data.seq_len=8 batch_size=1") == (
        "T 8",
        ["--config.data.seq_len=8", "--config.batch_size=1"],
    )
    with pytest.raises(UserError, match="has no name"):
        bench.parse_setting("batch_size=1")


def test_xla_options_are_refused_by_name(tmp_path):
    for value, reason in (("nothing", "write NAME=VALUE"), ("xla_nothing=1", "xla_nothing")):
        command = [sys.executable, "-m", "nha_jax.training.bench", "--config", TINY]
        done = subprocess.run(
            [*command, f"--config.xla_options={value}"], capture_output=True, text=True
        )
        assert done.returncode == 2
        assert reason in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_what_does_not_fit_is_told(monkeypatch, capfd, exhausted):
    monkeypatch.setattr(bench, "compile_step", exhausted)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["bench", "--config", TINY, "--config.accumulate=2"])
    assert bench.main() == 2
    said = capfd.readouterr()
    assert (
        "lower config.batch_size=8 or lower config.data.seq_len=8 or raise config.acc" in said.err
    )
    assert "| out of memory |" in said.out


@pytest.mark.parametrize(
    ("name", "instruction", "source", "kind"),
    [
        ("output_kernel", "custom-call.7", "", "attention op"),
        ("nha_window_dkv_mosaic_gpu_kernel", "custom-call.8", "", "attention op"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", "custom-call", "", "attention op"),
        ("loop_multiply_fusion", "loop_multiply_fusion", "jvp()/attention_op/mul", "attention op"),
        ("nvjet_sm90_tst_128x256", "cublas-gemm.4", "jvp()/dot_general", "matrix products"),
        ("nvjet_sm90_tst_128x256", "cublas-gemm.5", "cross_entropy/dot", "matrix products"),
        ("input_reduce_fusion", "input_reduce_fusion", "jvp(cross_entropy)/max", "cross entropy"),
        ("loop_add_fusion", "loop_add_fusion.3", "jit(step)/optimizer/add", "optimizer"),
        ("MemcpyD2D", "copy.4", "", "copies"),
        ("ncclDevKernel_AllReduce_Sum", "all-reduce.1", "optimizer/add", "collectives"),
        ("input_reduce_fusion_2", "input_reduce_fusion.2", "jvp()/mean", "norms, activations"),
    ],
)
def test_classes_of_kernels(name, instruction, source, kind):
    assert breakdown.classify(name, instruction, source) == kind


def test_times_gaps_and_kernels_launched_by_a_graph(monkeypatch, tmp_path):
    (tmp_path / "x.xplane.pb").touch()
    events = [
        ("loop_add_fusion_3", "command_buffer_9", 0.0, 2e6),  # of a graph
        ("output_kernel", "custom-call.7", 1e6, 3e6),  # beside it on another stream
        ("loop_add_fusion_3", "loop_add_fusion.3", 6e6, 1e6),
        ("while", "while.1", 0.0, 9e6),
        ("nvjet", "cublas-gemm.1", 7e6, 1e6),
    ]
    monkeypatch.setattr(breakdown, "_events", lambda path: iter(events))
    found = breakdown.read(tmp_path, HLO, steps=2)
    times = found.by_class()
    assert times["optimizer"] == (2 + 1) / 2
    assert times["attention op"] == 3 / 2
    assert times["matrix products"] == 1 / 2
    assert (found.gaps, found.span) == (2 / 2, 8 / 2)
    assert [kernel.ms for kernel in found.kernels] == sorted(
        (kernel.ms for kernel in found.kernels), reverse=True
    )
    assert breakdown.op_names(HLO)["loop_add_fusion_3"] == "jit(step)/optimizer/add"


def test_no_events_are_no_time(monkeypatch, tmp_path):
    (tmp_path / "x.xplane.pb").touch()
    monkeypatch.setattr(breakdown, "_events", lambda path: iter(()))
    assert sum(breakdown.read(tmp_path, HLO, steps=1).by_class().values()) == 0


def test_trace_of_a_product_holds_it(tmp_path):
    """What jax writes is what is read."""
    product = jax.jit(lambda x: x @ x)
    x = jax.numpy.ones((256, 256))
    text = product.lower(x).compile().as_text()
    product(x).block_until_ready()
    with jax.profiler.trace(tmp_path):
        product(x).block_until_ready()
    assert breakdown.read(tmp_path, text, steps=1).by_class()["matrix products"] > 0


def test_rows_are_packed_with_documents():
    rows = bench.random_batch(4, 1000, 16, seed=0, documents=50)
    ids, positions = rows["segment_ids"], rows["positions"]
    first = np.diff(ids, axis=1, prepend=0) == 1
    assert set(np.unique(np.diff(ids, axis=1))) == {0, 1}
    assert (positions[first] == 0).all()
    assert (np.diff(positions, axis=1) == 1)[~first[:, 1:]].all()
    assert 4000 / first.sum() == pytest.approx(50, rel=0.3)
    assert set(bench.random_batch(4, 10, 16, seed=0)) == {"inputs", "labels"}


@pytest.mark.parametrize("option", ["--documents=0", "--jobs=-1", "--steps=0"])
def test_options_out_of_range(option, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench", "--config", TINY, option])
    with pytest.raises(UserError, match=f"{option}.* must be"):
        bench.main()
