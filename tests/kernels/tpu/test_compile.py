"""Real compilation for v5e and v6e, with the TPU compiler and without a TPU."""

import warnings

import pytest

from pallas_kernels.tpu import compile_report
from pallas_kernels.tpu.compile_report import Case
from pallas_kernels.tpu.cost import Cost
from pallas_kernels.tpu.tiles import GENERATIONS, device, load

CASES = [
    Case("v5e", "8b", 64, 2048, "train"),
    Case("v5e", "340m", 0, 8192, "forward"),
    Case("v6e", "340m", 512, 2048, "train"),
    Case("v6e", "8b", 64, 2048, "decode"),
]


@pytest.fixture(scope="module")
def meshes():
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return {chip: compile_report.mesh_of(chip) for chip in ("v5e", "v6e")}
    except Exception as error:
        pytest.skip(
            "TPU COMPILATION NOT CHECKED: the compiler does not load, is libtpu installed "
            f"(pip install 'jax[tpu]')? {str(error).splitlines()[0]}"
        )


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.chip}-{c.layer}-{c.window}-{c.kind}")
def test_compiles(case, meshes):
    result = compile_report.run(case, meshes[case.chip])
    assert result.status == "compiled"
    assert 0 < result.vmem <= load(case.chip).vmem
    assert result.ratio < compile_report.MAX_TEMPORARIES


def test_a_window_beyond_vmem_is_refused(meshes):
    case = Case("v5e", "8b", 1 << 17, 1 << 17, "train")
    result = compile_report.run(case, meshes["v5e"])
    assert result.status.startswith("refused: Window 131072")
    assert not result.failed(case)


def test_excessive_temporaries_fail():
    case = Case("v5e", "8b", 64, compile_report.LONG, "train")
    assert compile_report.Result("compiled", temporaries=151, inputs=100).failed(case)
    assert not compile_report.Result("compiled", temporaries=149, inputs=100).failed(case)
    assert compile_report.Result("FAILED: no").failed(case)


def test_roofline_is_the_slower_of_compute_and_memory():
    chip = device("v5e")
    assert compile_report.milliseconds(Cost(197e12, 1.0), chip) == pytest.approx(1000)
    assert compile_report.milliseconds(Cost(1.0, 819e9), chip) == pytest.approx(1000)


def test_every_generation_has_tiles():
    for generation in GENERATIONS:
        assert load(generation).chunk % 128 == 0
        assert device(generation).hbm_bytes > 1e11
