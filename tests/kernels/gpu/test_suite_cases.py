"""Cases of the op's suite that reach the limits of a dtype, in Triton's interpreter.

tests/ops/test_gpu.py runs all cases on a GPU; the tolerances are the same.
"""

import pytest

from nha_jax.ops import backends
from pallas_kernels.gpu import attention, launch
from tests.ops import test_gpu

pytestmark = pytest.mark.filterwarnings("ignore")  # numpy's, from inside the interpreter


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    import interpret

    monkeypatch.setattr(launch, "call", interpret.call)
    monkeypatch.setattr(launch, "missing", lambda: None)
    monkeypatch.setattr(attention, "device_name", lambda: "h100")
    monkeypatch.setattr(backends, "platform", lambda: "gpu")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("open_gates", "float32"),  # sums of gates to -3000
        ("open_gates", "bfloat16"),
        ("extreme_gates", "float32"),
        ("no_lag", "bfloat16"),  # keys rotated here and there must round to the same numbers
        ("packed", "float32"),
        ("packed", "bfloat16"),  # few numbers in log_alpha's gradient
        ("packed", "float16"),
        ("packed_long", "bfloat16"),  # documents, and rows too long for float32
        ("full_packed", "float16"),
        ("full_packed", "float32"),
        ("full_packed_long", "bfloat16"),
        ("full_continued", "bfloat16"),
        ("window_only", "float16"),
    ],
)
def test_case(name, dtype):
    assert test_gpu.compared(test_gpu.CASES[name], dtype) == []


def test_pieces_of_a_call(monkeypatch):
    test_gpu.test_pieces_of_a_call("packed_pure", monkeypatch)
