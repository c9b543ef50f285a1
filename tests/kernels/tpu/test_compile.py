"""Real compilation for v5e and v6e, with the TPU compiler and without a TPU."""

import importlib.util
import json
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from nha_jax.ops import init_state, nha_attention, nha_decode_step
from pallas_kernels.tpu import compile_case, compile_report, tune
from pallas_kernels.tpu.compile_case import LONG, Case, Result, failure, figures_of, stamp
from pallas_kernels.tpu.cost import Cost
from pallas_kernels.tpu.tiles import GENERATIONS, device, load

CASES = [
    Case("v5e", "8b", 64, 2048, "train"),
    Case("v5e", "340m", 0, 8192, "forward", 4),
    Case("v6e", "340m", 512, 2048, "train", 4),
    Case("v6e", "8b", 64, 2048, "decode"),
]
compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="TPU COMPILATION NOT CHECKED: no libtpu here (pip install 'jax[tpu]')",
)


@compiler
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.chip}-{c.layer}-{c.window}-{c.kind}")
def test_compiles(case):
    result = compile_case.run(case)
    assert result.status == "compiled"
    assert failure(case, result) is None
    assert 0 < result.vmem <= figures_of(case).vmem_estimate <= load(case.chip).vmem
    assert result.temporaries < compile_case.MAX_TEMPORARIES * figures_of(case).inputs


@compiler
def test_auto_takes_the_kernels_under_a_mesh():
    """The op itself, forward, backward and decode, on four v5e: batch and heads are split."""
    mesh = compile_case.mesh_of("v5e", 4)
    f32, bf16 = jnp.float32, jnp.bfloat16

    def x(*shape, dtype=bf16, spec=None):
        spec = spec or PartitionSpec("data", None, "tensor")
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    def call(t):
        return x(2, t, 4, 64), x(2, t, 2, 64), x(2, t, 2, 64), x(2, t, 2, 16, dtype=f32)

    def grads(*x):
        return jax.grad(lambda *x: nha_attention(*x, window=64).sum(dtype=f32), (0, 1, 2, 3))(*x)

    def full(*x):
        return jax.grad(lambda *x: nha_attention(*x, None, window=None).sum(dtype=f32), (0, 1, 2))(
            *x
        )

    state = jax.tree.map(
        lambda a: (
            x(
                *a.shape,
                dtype=a.dtype,
                spec=PartitionSpec("data", "tensor" if a.shape[1:2] == (2,) else None),
            )
            if a.ndim > 1
            else x(*a.shape, dtype=a.dtype, spec=PartitionSpec("data"))
        ),
        jax.eval_shape(lambda: init_state(2, 2, 64, 64, 16, 64, dtype=bf16)),
    )
    with jax.set_mesh(mesh):
        for function, arguments, names in (
            (grads, call(256), ("nha_forward", "nha_backward")),
            (full, call(256)[:3], ("splash",)),
            (lambda *x: nha_decode_step(*x, window=64), (*call(1), state), ("nha_decode",)),
        ):
            text = jax.jit(function).lower(*arguments).compile().as_text()
            for name in names:
                assert name in text
            assert "tpu_custom_call" in text


def test_a_window_beyond_vmem_is_refused():
    case = Case("v5e", "8b", 1 << 17, 1 << 17, "train")
    result = compile_case.run(case)
    assert result.status.startswith("refused: Window 131072 and slot lag 131072")
    assert failure(case, result) is None


def test_excessive_temporaries_and_wrong_estimates_fail():
    case = Case("v5e", "8b", 64, LONG, "train")
    inputs = figures_of(case).inputs
    assert "1.51 times" in failure(case, Result("compiled", temporaries=int(1.51 * inputs)))
    assert failure(case, Result("compiled", temporaries=int(1.49 * inputs))) is None
    assert "VMEM" in failure(case, Result("compiled", vmem=1 << 30))
    assert failure(case, Result("FAILED: no")) == "FAILED: no"


@pytest.fixture
def crashing(monkeypatch):
    """A worker that compiles windows of 64, and dies of all others."""
    program = """
import json, os, signal, sys
for line in sys.stdin:
    if json.loads(line)["window"] != 64:
        print("F0000 Check failed: too wide", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)
    print(json.dumps({"status": "compiled", "vmem": 1}), flush=True)
"""
    monkeypatch.setattr(compile_report.Worker, "COMMAND", (sys.executable, "-c", program))
    monkeypatch.setattr(compile_report, "LIBTPU", "1")


def test_a_crash_of_the_compiler_is_one_failing_row(crashing, capsys, tmp_path):
    kept = tmp_path / "report.json"
    command = "--chips v6e --layers 8b --lengths 2048 --passes forward --devices 1 --windows"
    assert compile_report.main([*command.split(), "0", "64", "512", "--json", str(kept)]) == 1
    out, err = capsys.readouterr()
    rows = [line for line in out.splitlines() if line.startswith("| v6e")]
    assert [row.split(" | ")[-1] for row in rows] == [
        "FAILED: the compiler crashed (signal SIGSEGV): F0000 Check failed: too wide |",
        "compiled |",
        "FAILED: the compiler crashed (signal SIGSEGV): F0000 Check failed: too wide |",
    ]
    assert out.endswith("3 cases, 0 refused, 2 failed.\n")
    assert "[3/3] v6e 8b 512 2048 forward 1: FAILED" in err
    assert [entry["case"]["window"] for entry in json.loads(kept.read_text())] == [0, 64, 512]


def test_rows_of_the_same_sources_are_not_compiled_again(crashing, capsys, tmp_path):
    kept = tmp_path / "report.json"
    case = Case("v6e", "8b", 512, 2048, "forward")
    log = compile_report.Log(kept)
    row = stamp(case, Result("compiled", vmem=1 << 20), 1.0)
    log.add(case, compile_case.dataclasses.replace(row, libtpu="1"))
    command = "--chips v6e --layers 8b --windows 512 --lengths 2048 --passes forward --devices 1"
    assert compile_report.main([*command.split(), "--json", str(kept)]) == 0
    kept.write_text(kept.read_text().replace(row.source, "other"))
    assert compile_report.main([*command.split(), "--json", str(kept)]) == 1
    kept.write_text("{}")
    assert compile_report.main([*command.split(), "--json", str(kept)]) == 2
    assert "is not a report" in capsys.readouterr().err


def test_the_whole_matrix():
    cases = compile_report.cases(compile_report.arguments([]))
    chips, layers, windows, lengths = 5, 2, 4, 3
    assert len(cases) == chips * layers * windows * (2 * lengths + 1 + 2 + 1)
    assert len(set(cases)) == len(cases)
    with pytest.raises(SystemExit):
        compile_report.arguments(["--windows", "-1"])


def test_no_compiler_is_said(monkeypatch, capsys):
    monkeypatch.setattr(compile_report, "LIBTPU", "none")
    assert compile_report.main([]) == 2
    assert "pip install 'jax[tpu]'" in capsys.readouterr().err


def test_roofline_is_the_slower_of_compute_and_memory():
    chip = device("v5e")
    assert compile_report.milliseconds(Cost(197e12, 1.0), chip) == pytest.approx(1000)
    assert compile_report.milliseconds(Cost(1.0, 819e9), chip) == pytest.approx(1000)


def test_committed_chunks_are_those_of_the_roofline(capsys):
    assert tune.main([]) == 0
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split()[1] for row in rows] == list(GENERATIONS)
