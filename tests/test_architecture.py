"""The direction of imports: a module may use what stands to its left in ORDER, and nothing else of the package."""

import ast
from pathlib import Path

import pytest

import dadvi

PACKAGE = Path(dadvi.__file__).parent

ORDER = [
    "errors",
    "types",
    "stopwatch",
    "acceleration",
    "sharding",
    "supports",
    "bijections",
    "transforms",
    "model",
    "batching",
    "likelihood",
    "affine",
    "structure",
    "passes",
    "binding",
    "summing",
    "memory",
    "clients",
    "executors",
    "ingest",
    "nonfinite",
    "families",
    "elbo",
    "quadrature",
    "quadratic",
    "whitening",
    "subsample",
    "probing",
    "scales",
    "local",
    "response",
    "descent",
    "optim",
    "posterior",
    "records",
    "fingerprint",
    "runfiles",
    "checkpoint",
    "control",
    "iterates",
    "advi",
    "starting",
    "anchored",
    "progress",
    "fit",
    "jobs",
    "modelfile",
    "plan",
    "cli",
]

SUBPACKAGES = {"sharding": {"errors", "types"}, "optim": {"errors", "types"}}
"""Parts that stand by themselves: what they may use of the rest."""


def parts():
    """Return every module of the package but the front, dadvi/__init__.py, with the part it belongs to."""
    files = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
    return [(file, file.parts[0].removesuffix(".py")) for file in files if file != Path("__init__.py")]


def imported(file):
    """Return the parts of dadvi that a file imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / file).read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            # `from dadvi import x` means dadvi.x if there is such a part, and else the front, which is right of all
            names = [f"dadvi.{alias.name}" for alias in node.names] if node.module == "dadvi" else [str(node.module)]
        else:
            continue
        found |= {([*name.split("."), "__init__"])[1] for name in names if name.split(".")[0] == "dadvi"}
    return found


def test_every_part_has_its_place():
    assert {part for _, part in parts()} - {"__main__"} == set(ORDER)


@pytest.mark.parametrize(("file", "part"), parts(), ids=lambda value: str(value))
def test_imports_point_left(file, part):
    allowed = SUBPACKAGES.get(part, set(ORDER[: ORDER.index(part)])) | {part}
    assert imported(file) <= allowed, f"dadvi/{file}"


def test_the_scan_sees_imports():
    assert imported(Path("fit.py")) >= {"advi", "errors", "executors", "sharding"}
    assert imported(Path("sharding/reader.py")) >= {"errors", "sharding"}
    assert imported(Path("errors.py")) == set()
