"""Parameters that a run leaves as they are: no gradient, no optimizer state."""

import dataclasses
from fnmatch import fnmatchcase
from typing import Any

from flax import traverse_util

from nha_jax.errors import UserError, nearest

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Split:
    """A tree of parameters, or of anything that has their paths, in two parts and one again."""

    frozen_paths: frozenset[Path] = frozenset()

    @classmethod
    def of(cls, patterns: str, params: Any) -> "Split":
        """The parameters whose dotted path fits one of ``patterns``, which commas separate; a *
        stands for any characters.

        Raises `UserError` if a pattern fits no path, or if nothing is left to train.
        """
        paths = {".".join(path): path for path in traverse_util.flatten_dict(params)}
        frozen: set[str] = set()
        for pattern in filter(None, map(str.strip, patterns.split(","))):
            fits = {name for name in paths if fnmatchcase(name, pattern)}
            if not fits:
                hint = nearest(pattern, paths)
                raise UserError(f"config.freeze: {pattern!r} fits no parameter.{hint}")
            frozen |= fits
        if len(frozen) == len(paths):
            raise UserError(f"config.freeze={patterns!r} leaves no parameter to train.")
        return cls(frozenset(paths[name] for name in frozen))

    def trained(self, tree: Any) -> Any:
        return self._part(tree, frozen=False)

    def frozen(self, tree: Any) -> Any:
        return self._part(tree, frozen=True)

    def merge(self, trained: Any, frozen: Any) -> Any:
        """The whole tree of its two parts."""
        flat = traverse_util.flatten_dict(trained) | traverse_util.flatten_dict(frozen)
        return traverse_util.unflatten_dict(flat)

    def _part(self, tree: Any, frozen: bool) -> Any:
        flat = traverse_util.flatten_dict(tree)
        chosen = {p: leaf for p, leaf in flat.items() if (p in self.frozen_paths) == frozen}
        return traverse_util.unflatten_dict(chosen)


ALL_TRAINED = Split()
