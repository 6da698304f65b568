"""What a model is, as digests that another process can compare with those of the model that a run began with.

Functions count by their bytecode, constants, defaults, and the values that they close over or find in their module;
distributions by their parameters; library code by its name. Comments and line numbers do not count.
"""

import hashlib
import inspect
import re
import sys
import sysconfig
from collections.abc import Mapping, Set
from functools import partial
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
from torch import Tensor
from torch.distributions import Distribution
from torch.distributions.utils import lazy_property

from dadvi.model import Model
from dadvi.supports import support_to_json

ADDRESS = re.compile(r" at 0x[0-9a-f]+")
LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})


def model_parts(model: Model) -> dict[str, str]:
    """Return a digest for each part of a model, by what the part is called."""
    parts: dict[str, Any] = {
        f"the prior of {site.name!r}": (list(site.shape), support_to_json(site.support), prior.spec)
        for site, prior in zip(model.space.sites, model._priors, strict=True)
    }
    parts["the likelihood"] = model.row_function
    parts["observed, weight or dims"] = (model.observed, model.weight, model.dims)
    parts["the order of the latents"] = [site.name for site in model.space.sites]
    return {name: fingerprint(part) for name, part in parts.items()}


def fingerprint(value: Any) -> str:
    """Return the sha256 of a value, the same in every process that has an equal one."""
    digest = hashlib.sha256()
    _Reader(digest).read(value)
    return digest.hexdigest()


class _Reader:
    """Feeds a digest with all that a value is made of."""

    def __init__(self, digest: "hashlib._Hash") -> None:
        self.digest = digest
        self.seen: dict[int, tuple[int, Any]] = {}  # id to its number and the object, kept so that the id stays its own

    def read(self, value: Any) -> None:
        """Add a value."""
        if value is None or isinstance(value, bool | int | float | complex | str | bytes):
            self.tell(type(value).__name__, repr(value))
        elif isinstance(value, ModuleType):
            self.tell("module", value.__name__)
        elif id(value) in self.seen:
            self.tell("seen", str(self.seen[id(value)][0]))
        else:
            self.seen[id(value)] = len(self.seen), value
            self._read_object(value)

    def tell(self, *texts: str) -> None:
        """Add texts, each with its length, so that no two sequences of them look alike."""
        for text in texts:
            raw = text.encode()
            self.digest.update(len(raw).to_bytes(8, "little") + raw)

    def _read_object(self, value: Any) -> None:
        match value:
            case Tensor() | np.ndarray():
                array = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
                self.tell("array", array.dtype.str, str(array.shape))
                if array.dtype.hasobject:
                    self.read(array.tolist())
                else:
                    self.digest.update(np.ascontiguousarray(array).tobytes())
            case list() | tuple():
                self.tell("sequence", str(len(value)))
                for each in value:
                    self.read(each)
            case Mapping():
                self.tell("mapping", str(len(value)))
                for key, each in value.items():
                    self.read(key)
                    self.read(each)
            case Set():
                self.tell("set", *sorted(fingerprint(each) for each in value))
            case CodeType():
                self._read_code(value)
            case FunctionType():
                self._read_function(value)
            case MethodType():
                self.read((value.__func__, value.__self__))
            case partial():
                self.read((value.func, value.args, value.keywords))
            case BuiltinFunctionType():
                self.tell("builtin", str(value.__module__), value.__qualname__)
            case type():
                self._read_class(value)
            case Distribution():
                self._read_distribution(value)
            case _:
                self.read(type(value))
                if hasattr(value, "__dict__"):
                    self.read(dict(sorted(vars(value).items())))
                else:
                    self.tell(ADDRESS.sub("", repr(value)))

    def _read_function(self, function: FunctionType) -> None:
        self.tell("function")
        if _of_library(function.__module__):
            self.tell(function.__module__, function.__qualname__)
            return
        self.read(function.__code__)
        self.read((function.__defaults__, function.__kwdefaults__))
        for cell in function.__closure__ or ():
            try:
                self.read(cell.cell_contents)
            except ValueError:  # a variable that has no value yet
                self.tell("empty")
        for name in _names(function.__code__):
            if name in function.__globals__:
                self.tell(name)
                self.read(function.__globals__[name])

    def _read_code(self, code: CodeType) -> None:
        self.tell("code", code.co_code.hex(), *code.co_names, *code.co_varnames, *code.co_freevars)
        self.tell(str((code.co_argcount, code.co_kwonlyargcount, code.co_flags)))
        self.read(list(code.co_consts))

    def _read_class(self, kind: type) -> None:
        self.tell("class", kind.__qualname__)
        if _of_library(kind.__module__):
            self.tell(kind.__module__)
            return
        for name, member in sorted(vars(kind).items()):
            inner = inspect.unwrap(getattr(member, "__func__", getattr(member, "fget", member)) or member)
            if isinstance(inner, FunctionType) or not (callable(inner) or name.startswith("__")):
                self.tell(name)
                self.read(inner if isinstance(inner, FunctionType) else ADDRESS.sub("", repr(inner)))
        self.read(list(kind.__bases__))

    def _read_distribution(self, distribution: Distribution) -> None:
        """Read parameters by name, probs and logits both; not what else was computed from them on the way."""
        kind = type(distribution)
        self.read(kind)
        computed = {name for each in kind.__mro__ for name, of in vars(each).items() if isinstance(of, lazy_property)}
        parameters = computed & set(kind.arg_constraints if isinstance(kind.arg_constraints, Mapping) else ())
        names = {name for name in vars(distribution) if not name.startswith("_")} - computed | parameters
        for name in sorted(names):
            self.tell(name)
            self.read(getattr(distribution, name))


def _names(code: CodeType) -> list[str]:
    """Return the names that a function, or one within it, looks up in its module or as attributes, in order."""
    inner = [name for each in code.co_consts if isinstance(each, CodeType) for name in _names(each)]
    return list(dict.fromkeys([*code.co_names, *inner]))


def _of_library(module_name: str | None) -> bool:
    """Return whether a module is Python's, an installed package's, or this one's: told by name and version then."""
    if module_name is None or module_name.partition(".")[0] in {"dadvi", "builtins"}:
        return True
    module = sys.modules.get(module_name)
    file = getattr(module, "__file__", None)
    if module is None or file is None:
        return module is not None and module_name != "__main__"
    return Path(file).resolve().is_relative_to(Path(sys.prefix).resolve()) or file.startswith(LIBRARIES)
