"""Train a Native Hybrid Attention language model.

  python train.py --config configs/mqar.py                  train with the config's own values
  python train.py --config configs/mqar.py:hard             ... in the variant named `hard`
  python train.py --config configs/mqar.py --config.steps=200 --config.optimizer.learning_rate=1e-3

  python train.py --config configs/nha_1_3b.py --rehearse v5e:16x16        no TPU needed

Any value of the config can be set with --config.KEY=VALUE. Metrics and checkpoints go to the
workdir; the same command again carries on from the last checkpoint there. Ctrl-C and SIGTERM save
a checkpoint before leaving (exit codes 130 and 143). Bad input is exit code 2; so is a device that
is out of memory, with what to lower.
"""

import sys

from nha_jax import cli


def main() -> int:
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("--config", required=True, metavar="PATH.py[:VARIANT]")
    parser.add_argument("--workdir", metavar="DIR", help="default: runs/NAME, NAME the config's")
    parser.add_argument(
        "--rehearse",
        metavar="SLICE",
        help="compile for a TPU slice like v5e:16x16, print memory and time per device, and leave",
    )
    args, overrides = parser.parse_known_args()
    config = cli.load_config(args.config)
    cli.apply_overrides(config, overrides)

    from nha_jax import training

    if args.rehearse:
        return training.rehearse(config, args.rehearse)
    return training.run(config, args.workdir or f"runs/{cli.config_name(args.config)}")


if __name__ == "__main__":
    sys.exit(cli.run(lambda: cli.on_all_hosts(main)))
