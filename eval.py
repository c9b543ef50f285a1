"""Evaluate a trained model, or train one and evaluate it.

  python eval.py --checkpoint runs/mqar --suite mqar
  python eval.py --checkpoint runs/mqar --suite mqar --windows full
  python eval.py --checkpoint runs/mqar --suite mqar --config.eval.num_kv_pairs=2,4,8
  python eval.py --checkpoint runs/stdlib --suite perplexity,ruler:vt+fwe --config.eval.lengths=1024
  python eval.py --config configs/mqar.py --suite mqar         trains as train.py would, then tests

--checkpoint is the workdir of a training run (or its checkpoints folder, or one checkpoint in
that). --suite is one suite or several, joined by commas; some take an argument, NAME:ARGUMENT.
--windows W is short for --config.model.windows=W.
--config.model.KEY=VALUE changes the model where its weights allow, --config.eval.KEY=VALUE an
option of every suite that has it. Tables are shown; JSON and pictures go to the folder eval in the
workdir. Over several hosts each does all of the work, and the first one shows and writes it.
python -m nha_jax.evals.report compares evaluations; docs/evaluation.md describes the suites. Bad
input is exit code 2.
"""

import sys
from pathlib import Path

from nha_jax import cli


def main() -> int:
    parser = cli.ArgumentParser(__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", type=Path, metavar="DIR")
    source.add_argument("--config", metavar="PATH.py[:VARIANT]")
    parser.add_argument("--suite", required=True, metavar="NAME[:ARGUMENT][,NAME...]")
    parser.add_argument("--step", type=int, help="of --checkpoint; default: the newest")
    parser.add_argument(
        "--workdir", type=Path, metavar="DIR", help="of --config; default: runs/NAME, as train.py"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: eval in the workdir")
    cli.add_windows(parser)
    args, overrides = parser.parse_known_args()
    overrides = cli.windows_override(args, overrides)
    if args.config and args.step is not None:
        parser.error("--step goes with --checkpoint")
    if args.checkpoint and args.workdir:
        parser.error("--workdir goes with --config")

    from nha_jax import evals

    if args.checkpoint:
        evals.run(args.suite, args.checkpoint, overrides, step=args.step, out=args.out)
    else:
        config = cli.load_config(args.config)
        workdir = args.workdir or Path("runs") / cli.config_name(args.config)
        evals.train_and_run(args.suite, config, workdir, overrides, out=args.out)
    return 0


if __name__ == "__main__":
    # Hosts evaluate each at its own pace, so that one may wait long for the last.
    sys.exit(cli.run(lambda: cli.on_all_hosts(main, patience=3600)))
