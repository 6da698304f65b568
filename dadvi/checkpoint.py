"""What a run leaves on disk: ``posterior.zarr``, ``trace.jsonl`` and ``settings.json`` in one directory."""

import json
import os
from pathlib import Path

from dadvi.errors import InputError
from dadvi.posterior import Posterior
from dadvi.sharding.output import check_free, staged

POSTERIOR, TRACE, SETTINGS = "posterior.zarr", "trace.jsonl", "settings.json"


class RunDirectory:
    """A directory for the results of one run: checked before the run starts, written whole when it has ended.

    Raises
    ------
    InputError
        If something stands at `path` that is not an earlier run, or is one and `overwrite` is not set; or if nothing
        can be written beside it.

    """

    def __init__(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        self.path = Path(path).expanduser().resolve()
        self._overwrite = overwrite
        check_free(self.path, overwrite=overwrite, is_ours=is_run)
        if not os.access(self.path.parent, os.W_OK):
            raise InputError(
                f"cannot write to {self.path.parent}; create that directory, or choose one that can be written"
            )

    def write(self, posterior: Posterior) -> None:
        """Write the results; the directory appears whole or not at all."""
        with staged(self.path, overwrite=self._overwrite, is_ours=is_run) as directory:
            posterior.save(directory / POSTERIOR)
            posterior.trace.to_json(directory / TRACE, orient="records", lines=True)
            (directory / SETTINGS).write_text(json.dumps(posterior.settings, indent=2) + "\n")


def is_run(path: Path) -> bool:
    """Return whether the directory of a run, and nothing else, stands at `path`."""
    return path.is_dir() and {entry.name for entry in path.iterdir()} == {POSTERIOR, TRACE, SETTINGS}
