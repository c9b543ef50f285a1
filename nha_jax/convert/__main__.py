"""Pretrained models in and out.

  python -m nha_jax.convert import --hf DIR --out WORKDIR --windows "64*7,full"
  python -m nha_jax.convert export --checkpoint WORKDIR --out DIR

import reads a Hugging Face folder (config.json, safetensors, tokenizer) of Llama 2 to 3.2,
Mistral, Qwen2, Qwen2.5 or Qwen3, or one that export wrote, and writes a checkpoint of step 0 for
eval.py, train.py (--config.init_from=WORKDIR) and generation. export writes the plain architecture
where one computes the model, that is where all its windows are full; else it adds the gates, and
config.json says what they are. No PyTorch needed. Bad input is exit code 2.
"""

import sys
from pathlib import Path

from nha_jax import cli
from nha_jax.convert.gates import GATES


def main() -> int:
    parser = cli.ArgumentParser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="import|export")
    reader = commands.add_parser("import", description="Hugging Face folder -> checkpoint")
    reader.add_argument("--hf", required=True, type=Path, metavar="DIR")
    reader.add_argument("--out", required=True, type=Path, metavar="WORKDIR", help="must be new")
    reader.add_argument(
        "--windows", help='default: the source\'s own; 64, full, "64*7,full" repeats'
    )
    reader.add_argument("--slots", type=int, metavar="M", help="per kv head, default 64")
    reader.add_argument("--gates", default="key", metavar="KIND", help=", ".join(GATES))
    reader.add_argument("--seed", type=int, default=0, help="of random gates")
    writer = commands.add_parser("export", description="checkpoint -> Hugging Face folder")
    writer.add_argument("--checkpoint", required=True, type=Path, metavar="DIR")
    writer.add_argument("--out", required=True, type=Path, metavar="DIR", help="must be new")
    writer.add_argument("--step", type=int, help="default: the newest checkpoint")
    writer.add_argument("--dtype", help="bfloat16, float16 or float32; default: the checkpoint's")
    writer.add_argument("--windows", help="default: the checkpoint's")
    writer.add_argument("--shard-gb", type=float, default=4.9, help="most GB of a file")
    args = parser.parse_args()

    from nha_jax import convert

    if args.command == "import":
        model = convert.import_model(
            *(args.hf, args.out),
            windows=args.windows,
            slots=args.slots,
            gate_init=args.gates,
            seed=args.seed,
        )
        print(
            f"{model.num_params():,} parameters ({model.param_dtype}), windows {model.windows}, "
            f"{model.slots} slots: {args.out}"
        )
    else:
        kind = convert.export_model(
            *(args.checkpoint, args.out),
            step=args.step,
            dtype=args.dtype,
            windows=args.windows,
            shard_bytes=int(args.shard_gb * 1e9),
        )
        print(f"model_type {kind}: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
