"""The command line that train.py and eval.py share: a config, its overrides, clear refusals."""

import argparse
import re
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_flags import config_path

from nha_jax.errors import RunFailed, UserError, nearest

TYPE_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}


class ArgumentParser(argparse.ArgumentParser):
    """An argparse parser whose refusals are ``UserError``."""

    def __init__(self, description: str | None, **options: Any) -> None:
        super().__init__(
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **options,
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help).")


def run(main: Callable[[], int]) -> int:
    """The exit code of ``main``; a ``UserError`` becomes its sentence on stderr and code 2, a
    ``RunFailed`` code 1."""
    try:
        return main()
    except (UserError, RunFailed) as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1


def on_all_hosts(main: Callable[[], int], patience: int = 300) -> int:
    """``main`` in each of the processes that one launcher started, joined by `parallel.connect`."""
    from nha_jax import parallel

    parallel.connect(patience)
    return main()


def add_windows(parser: argparse.ArgumentParser) -> None:
    """``--windows``, short for ``--config.model.windows``."""
    parser.add_argument("--windows", metavar="W", help='such as 64, full or "64*7,full"')


def windows_override(args: argparse.Namespace, overrides: Sequence[str]) -> list[str]:
    """The overrides with that of ``--windows``."""
    if args.windows is None:
        return list(overrides)
    if any(re.match(r"--?config\.model\.windows\b", override) for override in overrides):
        raise UserError("--windows and --config.model.windows say the same thing; give one.")
    return [f"--config.model.windows={args.windows}", *overrides]


def load_config(location: str) -> ConfigDict:
    """The locked config of ``PATH.py`` or ``PATH.py:ARGUMENT``."""
    path, *argument = location.split(":", 1)
    if not Path(path).is_file():
        near = [str(p) for p in Path(path).parent.glob("*.py")]
        hint = nearest(path, near) if near else ""
        raise UserError(f"config file {path!r} does not exist.{hint}")
    get_config = runpy.run_path(path).get("get_config")
    if get_config is None:
        raise UserError(f"config file {path!r} has no function get_config.")
    config = get_config(*argument)
    config.lock()
    return config


def config_name(location: str) -> str:
    """A name for runs of this config: ``configs/mqar.py:hard`` gives ``mqar-hard``."""
    path, *argument = location.split(":", 1)
    return "-".join([Path(path).stem, *(re.sub(r"\W+", "-", a) for a in argument if a)])


def apply_overrides(config: ConfigDict, arguments: Sequence[str]) -> None:
    """Sets ``--config.a.b=value`` arguments in ``config``, in place.

    Raises ``UserError`` for an unknown key, a value of the wrong type, or any other argument.
    """
    for argument in arguments:
        if match := re.match(r"--?(?:no)?config\.([^=]*)", argument):
            _check_key(config, match[1])
    values = flags.FlagValues()
    argv = ["", *arguments]
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
        unused = values(argv)[1:]
    except flags.UnrecognizedFlagError as error:
        raise UserError(f"unknown argument --{error.flagname} (see --help).") from error
    except flags.IllegalFlagValueError as error:
        raise UserError(_wrong_type(config, str(error))) from error
    except flags.Error as error:
        raise UserError(f"{str(error).splitlines()[0].removesuffix('.')} (see --help).") from error
    if unused:
        raise UserError(f"unknown argument {unused[0]!r} (see --help).")


def _check_key(config: ConfigDict, key: str) -> None:
    """Refuses a dotted key that does not name a value of ``config``."""
    node, path = config, "config"
    for part in key.split("."):
        if not isinstance(node, ConfigDict):
            raise UserError(f"unknown config key config.{key}: {path} is a single value.")
        if part not in node:
            elsewhere = [leaf for leaf in _leaves(config) if leaf.endswith(f".{part}")]
            hint = f" Did you mean config.{elsewhere[0]}?" if elsewhere else nearest(part, node)
            raise UserError(f"unknown config key config.{key}: {path} has no {part!r}.{hint}")
        node, path = node[part], f"{path}.{part}"
    if isinstance(node, ConfigDict):
        raise UserError(f"config.{key} is a group of values; set one of: {', '.join(node)}.")


def _leaves(config: ConfigDict, prefix: str = "") -> list[str]:
    found = []
    for key, value in config.items():
        path = f"{prefix}{key}"
        found += _leaves(value, f"{path}.") if isinstance(value, ConfigDict) else [path]
    return found


def _wrong_type(config: ConfigDict, message: str) -> str:
    """One sentence for absl's report of a value that it cannot parse."""
    match = re.match(r"flag --config\.([\w.]+)=(.*?): ", message, re.DOTALL)
    if not match:
        return message.split("\n")[0]
    key, value = match.groups()
    wanted = config_path.get_type(key, config)
    return f"config.{key} must be {TYPE_NAMES.get(wanted, wanted.__name__)}, not {value!r}."
