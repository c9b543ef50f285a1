"""The most memory that an import takes, on a folder of random weights in the shape of Llama-3-8B.

  python -m nha_jax.convert.memory --workdir DIR               16 GB, twice
  python -m nha_jax.convert.memory --workdir DIR --layers 2    3 GB, twice

DIR is made, and removed at the end unless --keep. Prints the peak of the importing process (its
resident set, files that it maps included) and the bound: twice the largest tensor and 1 GB.
"""

import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from nha_jax import cli
from nha_jax.convert.architecture import hf_config
from nha_jax.convert.folder import DTYPES, Writer
from nha_jax.convert.tensors import tensors
from nha_jax.errors import UserError
from nha_jax.models import ModelConfig

GB = 1e9


def main() -> int:
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("--workdir", required=True, type=Path, metavar="DIR", help="must be new")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--keep", action="store_true")
    args = parser.parse_args()
    if args.workdir.exists():
        raise UserError(f"--workdir={args.workdir} exists already; choose another.")
    try:
        largest = make_folder(args.workdir / "hf", args.layers)
        command = [sys.executable, "-m", "nha_jax.convert", "import", "--windows", "64*7,full"]
        if args.layers % 8:
            command[-1] = "64"
        command += ["--hf", str(args.workdir / "hf"), "--out", str(args.workdir / "imported")]
        began = time.perf_counter()
        subprocess.run(command, check=True)
        seconds = time.perf_counter() - began
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    finally:
        if not args.keep:
            shutil.rmtree(args.workdir, ignore_errors=True)
    bound = 2 * largest + GB
    print(
        f"peak {peak / GB:.2f} GB, bound {bound / GB:.2f} GB (largest tensor {largest / GB:.2f}), "
        f"{seconds:.0f} s"
    )
    return 0 if peak <= bound else 1


def make_folder(folder: Path, layers: int) -> int:
    """Writes the folder; returns the bytes of its largest tensor."""
    shape = {"layers": layers, "windows": "full", "param_dtype": "bfloat16"}
    model = ModelConfig.from_config({"preset": "nha_8b", **shape})
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(hf_config(model)))
    dtype = DTYPES["BF16"]
    shapes = {
        tensor.name.format(layer): tensor.hf_shape
        for tensor in tensors(model)
        if not tensor.extra
        for layer in range(layers if tensor.stacked else 1)
    }
    writer = Writer(folder, shapes.items(), dtype, 5_000_000_000)
    # The same numbers again and again, too far apart for a compressor to see.
    numbers = np.random.default_rng(0).standard_normal(32 << 20, np.float32)
    numbers = (0.02 * numbers).astype(dtype)
    for name, (rows, *rest) in shapes.items():
        step = numbers.size // int(np.prod(rest))
        for start in range(0, rows, step):
            part = min(step, rows - start), *rest
            writer.write(name, numbers[: int(np.prod(part))].reshape(part), start)
    return max(int(np.prod(shape)) * dtype.itemsize for shape in shapes.values())


if __name__ == "__main__":
    sys.exit(cli.run(main))
