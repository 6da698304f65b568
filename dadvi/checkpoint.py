"""What a run leaves on disk: ``posterior.zarr``, ``trace.jsonl`` and ``settings.json`` in one directory."""

import json
import os
from pathlib import Path

from dadvi.errors import InputError
from dadvi.posterior import Posterior
from dadvi.sharding.output import staged

POSTERIOR, TRACE, SETTINGS = "posterior.zarr", "trace.jsonl", "settings.json"


class RunDirectory:
    """A directory for the results of one run, claimed before the run starts and written whole when it has ended.

    Raises
    ------
    InputError
        If `path` exists and is not an earlier run, or is one and `overwrite` is not set.

    """

    def __init__(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        self.path = Path(path).expanduser().resolve()
        self._overwrite = overwrite
        if self.path.exists():
            if not (self.path / SETTINGS).is_file():
                raise InputError(f"{self.path} exists and is not the directory of a run; choose another")
            if not overwrite:
                raise InputError(f"{self.path} holds an earlier run; choose another directory, or set overwrite=True (--overwrite)")
        if not os.access(self.path.parent, os.W_OK):
            raise InputError(f"cannot write to {self.path.parent}; create that directory, or choose one that can be written")

    def write(self, posterior: Posterior) -> None:
        """Write the results; the directory appears whole or not at all."""
        with staged(self.path, overwrite=self._overwrite) as directory:
            posterior.save(directory / POSTERIOR)
            posterior.trace.to_json(directory / TRACE, orient="records", lines=True)
            (directory / SETTINGS).write_text(json.dumps(posterior.settings, indent=2) + "\n")
