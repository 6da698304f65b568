"""Bad rows and changed bytes that the checks before a fit do not see: refused where they are met, with their place."""

import shutil
from pathlib import Path

import pytest
import torch
from bad_files import BAD_CHUNK, BAD_ROW, CHUNK, CHUNKS, edit, flip, logistic

import dadvi as package
from dadvi import quadratic
from dadvi.errors import DataError
from dadvi.sharding import sampling
from dadvi.structure import Structure

# Rows -----------------------------------------------------------------------------------------------------------------

BAD_ROWS = {
    "nan": ("nan_middle.zarr", f"field 'x' has 1 rows that are not finite, the first in row {BAD_ROW} (value nan)"),
    "support": (
        "middle.zarr",
        f"observed field 'y' has 1 rows outside the support of Bernoulli, the first in row {BAD_ROW}",
    ),
}

SHARD_CHUNKS = {"nan_middle.zarr": CHUNKS, "middle.zarr": 4}  # all the foreign chunks together are less than 64 MiB


@pytest.mark.parametrize("kind", BAD_ROWS)
@pytest.mark.parametrize("met_in", ["curvature", "step"])
@pytest.mark.parametrize("seed", range(3))
def test_a_bad_row_that_the_warm_start_does_not_meet_is_refused(world, monkeypatch, kind, met_in, seed):
    """With a small subsample it is met in the measuring of curvature, or if that takes few chunks in a step."""
    if met_in == "step":
        monkeypatch.setattr(quadratic, "CURVATURE_WORK", 1)
    name, message = BAD_ROWS[kind]
    data = package.open_shards(world / name)
    others = {int(chunk) for chunk in sampling.subsample(data.manifest, 2, seed)}
    others |= (
        {int(chunk) for chunk in quadratic.curvature_chunks(data.manifest, Structure.full(2), seed)}
        if met_in == "step"
        else set()
    )
    assert BAD_CHUNK not in others
    method = package.ADVI(subsample_rows=2 * CHUNK, batch_rows=5 * CHUNK)
    with pytest.raises(DataError) as refused:
        package.fit(logistic(), data, method=method, seed=seed, client="serial", max_passes=3)
    assert str(refused.value).startswith(met_in)
    assert message in str(refused.value)
    assert f"(shard {BAD_CHUNK // SHARD_CHUNKS[name]}, chunk {BAD_CHUNK})" in str(refused.value)


def test_a_gradient_pass_refuses_rows_that_are_not_finite(world):
    name, message = BAD_ROWS["nan"]
    with pytest.raises(DataError) as refused:
        package.full_gradient(logistic(), package.open_shards(world / name), torch.zeros(2), client="serial")
    assert message in str(refused.value)
    assert f"chunk {BAD_CHUNK}" in str(refused.value)


# Bytes of a posterior -------------------------------------------------------------------------------------------------


def test_a_posterior_with_any_byte_changed_is_refused_or_the_same(world, tmp_path):
    """Bytes of numbers are all protected; those of JSON that say nothing may change without harm."""
    whole = world / "run" / "posterior.zarr"
    good = package.load_posterior(whole)
    files = [path.relative_to(whole) for path in sorted(whole.rglob("*")) if path.is_file()]
    assert {str(file) for file in files} >= {"zarr.json", "loc/zarr.json", "loc/c/0", "log_scale/c/0"}
    for file in files:
        size = (whole / file).stat().st_size
        refused = 0
        positions = sorted(set(range(0, size, max(1, size // 25))) | {size - 1})
        for position in positions:
            copy = tmp_path / "copy.zarr"
            shutil.copytree(whole, copy)
            flip(copy / file, position)
            loaded = loaded_or_none(copy)
            refused += loaded is None
            if loaded is not None:
                assert file.name == "zarr.json", f"{file} changed at {position}, and nobody noticed"
                assert loaded._to_json() == good._to_json()
                for name, value in good.unconstrained.params.items():
                    assert torch.equal(loaded.unconstrained.params[name], value)
            shutil.rmtree(copy)
        assert refused == len(positions) if file.name == "0" else refused > 0, file


def loaded_or_none(path: Path) -> package.Posterior | None:
    """Return the posterior, or None where it is refused as it should be."""
    try:
        return package.load_posterior(path)
    except DataError as error:
        if str(path) not in str(error):
            raise
        return None


def test_a_posterior_with_a_changed_number_in_its_description_is_refused(world, tmp_path):
    copy = tmp_path / "copy.zarr"
    shutil.copytree(world / "run" / "posterior.zarr", copy)
    edit(copy, "dadvi_posterior", "document", "elbo", value=package.load_posterior(copy).elbo + 1e-9)
    with pytest.raises(
        DataError, match=r"has changed since it was written: its digest is [0-9a-f]{64}, and [0-9a-f]{64}"
    ):
        package.load_posterior(copy)
