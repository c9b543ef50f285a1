"""Evaluate a trained model.

  python eval.py --checkpoint runs/mqar --suite mqar
  python eval.py --checkpoint runs/mqar --suite mqar --config.model.windows=full
  python eval.py --checkpoint runs/mqar --suite mqar --config.eval.num_kv_pairs=2,4,8

--checkpoint is the workdir of a training run (or its checkpoints folder, or one checkpoint in
that). --config.model.KEY=VALUE changes the model where its weights allow, --config.eval.KEY=VALUE
the suite's options. A table is shown; JSON and a picture go to the folder eval in the workdir.
Bad input is exit code 2.
"""

import sys
from pathlib import Path

from nha_jax import cli


def main() -> int:
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("--checkpoint", required=True, type=Path, metavar="DIR")
    parser.add_argument("--suite", required=True, metavar="NAME")
    parser.add_argument("--step", type=int, help="default: the newest checkpoint")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: eval in the workdir")
    args, overrides = parser.parse_known_args()

    from nha_jax import evals

    evals.run(args.suite, args.checkpoint, overrides, step=args.step, out=args.out)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
