"""Files that models are written in: ``MODEL.py:NAME`` loaded, and its errors told with the line they came through."""

import importlib.util
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from dadvi.errors import InputError, ModelError
from dadvi.model import Model
from dadvi.runfiles import MODEL
from dadvi.sharding import ShardedDataset


@dataclass(frozen=True)
class ModelFile:
    """A Python file, and the name in it of a `Model`, or of a function of the data set that returns one.

    Parameters
    ----------
    reference
        ``MODEL.py:NAME``.

    Raises
    ------
    ModelError
        If the reference has another form.

    """

    reference: str

    def __post_init__(self) -> None:
        path, colon, name = self.reference.rpartition(":")
        if not (colon and path and name.isidentifier()):
            raise ModelError(
                f"model {self.reference!r} is not of the form MODEL.py:NAME; give a Python file and a name in it"
            )

    @property
    def path(self) -> Path:
        """The file, as it was given."""
        return Path(self.reference.rpartition(":")[0])

    @property
    def name(self) -> str:
        """The name in it."""
        return self.reference.rpartition(":")[2]

    @property
    def absolute(self) -> str:
        """The reference from wherever the process is started."""
        return f"{self.path.resolve()}:{self.name}"

    def load(self, data: ShardedDataset) -> Model:
        """Run the file and return the model.

        The module is not left importable: thus its functions are pickled by value, and workers, wherever they run, need
        no copy of the file.

        Raises
        ------
        ModelError
            If there is no such file or name, the file fails (with its line), or what it holds is not a model.

        """
        path, name = self.path, self.name
        if not path.is_file():
            raise ModelError(
                f"no model file '{path}'; give the path of a Python file and a name in it, as MODEL.py:NAME"
            )
        module_name = f"_dadvi_model_{path.stem}"
        spec = importlib.util.spec_from_file_location(module_name, path)
        if spec is None or spec.loader is None:
            raise ModelError(f"'{path}' cannot be loaded as Python; its name must end in .py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module  # dataclasses, for one, look their module up while it runs
        try:
            spec.loader.exec_module(module)
            found: Any = getattr(module, name, None)
            if callable(found) and not isinstance(found, Model):
                found = found(data)
        except InputError as error:
            raise ModelError(f"{path}{_line_in(error, path)}: {error}") from error
        except (Exception, SystemExit) as error:
            raise ModelError(f"{path} failed{_line_in(error, path)}: {type(error).__name__}: {error}") from error
        finally:
            del sys.modules[module_name]
        if not hasattr(module, name):
            models = [key for key, value in vars(module).items() if isinstance(value, Model)]
            functions = [
                key
                for key, value in vars(module).items()
                if inspect.isfunction(value) and value.__module__ == module_name
            ]
            others = f"; the functions, of which one may return a model: {', '.join(functions)}" if functions else ""
            raise ModelError(f"{path} has no {name!r}; the models in it are: {', '.join(models) or 'none'}{others}")
        if not isinstance(found, Model):
            what = "returned" if callable(getattr(module, name)) else "is"
            raise ModelError(
                f"{self.reference} {what} a {type(found).__name__}; it must be a dadvi.Model, or a function of the "
                "data set that returns one"
            )
        return found

    def check_unchanged(self, source: str | None) -> None:
        """Raise ModelError if the file has not the text that a run began with, naming the first line that differs.

        Parameters
        ----------
        source
            That text; None where it was not kept.

        """
        if source is None or not self.path.is_file():
            return  # `load` has its own words for a file that is missing
        lines = zip_longest(source.splitlines(), self.path.read_text().splitlines(), fillvalue="nothing")
        for number, (was, now) in enumerate(lines, start=1):
            if was != now:
                raise ModelError(
                    f"{self.path} has changed since the run began: line {number} is {now.strip()!r} and was "
                    f"{was.strip()!r}; restore it from the run's {MODEL}, or fit anew"
                )

    @contextmanager
    def naming_line(self) -> Iterator[None]:
        """Add to a ModelError the line of the file that it came through, if it did."""
        try:
            yield
        except ModelError as error:
            if line := _line_in(error, self.path):
                raise ModelError(f"{error} ({self.path}{line})") from error
            raise


def _line_in(error: BaseException, path: Path) -> str:
    """Return " in line N" for the last line of a file that an error, or what caused it, passed through."""
    file, line = str(path.resolve()), ""
    cause: BaseException | None = error
    while cause is not None:
        trace = cause.__traceback__
        while trace is not None:
            if str(Path(trace.tb_frame.f_code.co_filename).resolve()) == file:
                line = f" in line {trace.tb_lineno}"
            trace = trace.tb_next
        cause = cause.__cause__
    return line
