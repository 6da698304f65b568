import gzip
import tracemalloc
import zipfile

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet
import pytest
import torch

from dadvi import ingest, open_shards, write_shards
from dadvi.sharding.fieldspec import FieldSpec

N = 1000
MIB = 2**20
CARRIERS = np.array(["UA", "AA", "B6", "9E"])


def table(num_rows=N, seed=0):
    rng = np.random.default_rng(seed)
    return pa.table(
        {
            "i": np.arange(num_rows),
            "hour": rng.integers(0, 24, num_rows),
            "distance": rng.normal(1000.0, 300.0, num_rows),
            "carrier": CARRIERS[rng.integers(0, 4, num_rows)],
            "late": rng.random(num_rows) < 0.2,
        }
    )


def write_parquet(content, stem):
    pa.parquet.write_table(content, path := stem.with_suffix(".parquet"), row_group_size=300)
    return path


def write_csv(content, stem):
    pa.csv.write_csv(content, path := stem.with_suffix(".csv"))
    return path


def write_csv_gz(content, stem):
    path = write_csv(content, stem)
    packed = stem.with_suffix(".csv.gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    return packed


def write_csv_zip(content, stem):
    path = write_csv(content, stem)
    with zipfile.ZipFile(packed := stem.with_suffix(".csv.zip"), "w") as archive:
        archive.write(path, path.name)
    path.unlink()
    return packed


def write_feather(content, stem):
    pa.feather.write_feather(content, path := stem.with_suffix(".feather"), chunksize=300)
    return path


def write_arrow_stream(content, stem):
    with pa.ipc.new_stream(path := stem.with_suffix(".arrow"), content.schema) as writer:
        writer.write_table(content, max_chunksize=300)
    return path


WRITERS = [write_parquet, write_csv, write_csv_gz, write_csv_zip, write_feather, write_arrow_stream]


def whole(data, name):
    return torch.cat([data.read(chunk)[name] for chunk in range(data.manifest.num_chunks)]).numpy()


def labels(data, name):
    return np.array(data.fields[name].categories)[whole(data, name)]


@pytest.mark.parametrize("write", WRITERS)
def test_every_format_comes_back_with_text_as_categories(tmp_path, write):
    content = table()
    data = ingest(write(content, tmp_path / "t"), tmp_path / "out", shuffle=None)
    assert list(data.fields) == content.column_names
    for name in ("i", "hour", "late"):
        assert np.array_equal(whole(data, name), content[name].to_numpy())
    assert np.allclose(whole(data, "distance"), content["distance"].to_numpy(), rtol=1e-15, atol=0)
    assert data.fields["carrier"].categories == ("9E", "AA", "B6", "UA")
    assert data.fields["carrier"].dtype == "int8"
    assert np.array_equal(labels(data, "carrier"), content["carrier"].to_numpy(zero_copy_only=False))


@pytest.mark.parametrize("write", [write_parquet, write_csv, write_feather])
def test_a_directory_a_pattern_and_a_list_are_the_same_rows(tmp_path, write):
    (tmp_path / "many" / "deep").mkdir(parents=True)
    content = table()
    paths = [write(content[start : start + 250], tmp_path / f"many/t{start:03d}") for start in (0, 250, 500)]
    paths.append(write(content[750:], tmp_path / "many/deep/t750"))
    (tmp_path / "many" / "_SUCCESS").touch()
    (tmp_path / "many" / "readme.txt").touch()
    suffix = paths[0].suffix
    for number, sources in enumerate(
        [paths, [*paths[:2], paths[2], str(paths[3])], [f"{tmp_path}/many/t*{suffix}", paths[3]]]
    ):
        data = ingest(sources, tmp_path / f"out{number}", shuffle=None)
        assert np.array_equal(whole(data, "i"), np.arange(N))
        assert np.array_equal(labels(data, "carrier"), content["carrier"].to_numpy(zero_copy_only=False))
    assert sorted(whole(ingest(tmp_path / "many", tmp_path / "directory"), "i")) == list(range(N))


def test_shuffle_is_that_of_write_shards(tmp_path):
    path = write_parquet(table(), tmp_path / "t")
    ingested = ingest(path, tmp_path / "a", "i hour", shuffle=3, memory_bytes=8_000)
    written = write_shards(tmp_path / "b", {"i": np.arange(N)}, shuffle=3)
    assert np.array_equal(whole(ingested, "i"), whole(written, "i"))
    assert np.array_equal(whole(ingested, "hour"), table()["hour"].to_numpy()[whole(ingested, "i")])
    assert ingested.manifest.made["shuffle"] == 3


def test_columns_are_stacked_in_their_common_dtype(tmp_path):
    content = table()
    data = ingest(write_parquet(content, tmp_path / "t"), tmp_path / "out", "x=hour,distance z=hour,i", shuffle=None)
    assert data.fields["x"].columns == ("hour", "distance")
    assert (data.fields["x"].dtype, data.fields["x"].shape) == ("float64", (2,))
    assert (data.fields["z"].dtype, data.fields["z"].shape) == ("int64", (2,))
    assert np.array_equal(whole(data, "x"), np.stack([content["hour"], content["distance"]], axis=1))


@pytest.mark.parametrize("offset", [0.0, 1e9], ids=["near 0", "far from 0"])
def test_standardised_columns_have_mean_0_and_sd_1_and_can_be_taken_back(tmp_path, offset):
    content = table(200_000)
    raw = np.stack([content["hour"].to_numpy() + offset, content["distance"].to_numpy()], axis=1)
    content = pa.table({"hour": raw[:, 0], "distance": raw[:, 1]})
    data = ingest(write_parquet(content, tmp_path / "t"), tmp_path / "out", "x=hour,distance:standardize", shuffle=None)
    x, field = whole(data, "x"), data.fields["x"]
    assert field.dtype == "float64"
    assert np.allclose(x.mean(axis=0), 0, atol=1e-6)
    assert np.allclose(x.std(axis=0), 1, atol=1e-6)
    assert np.allclose(field.mean, raw.mean(axis=0), rtol=1e-12)
    assert np.allclose(x * field.scale + field.mean, raw, rtol=1e-12)


def test_dtypes_asked_for_are_stored(tmp_path):
    path = write_csv(table(), tmp_path / "t")
    specs = [
        "d=distance:float32",
        "s=hour:standardize:float32",
        "h=hour:int16",
        "c=carrier:category:int32",
        "l=late:float32",
    ]
    data = ingest(path, tmp_path / "out", specs)
    assert [each.dtype for each in data.fields.values()] == ["float32", "float32", "int16", "int32", "float32"]


@pytest.mark.parametrize(
    ("values", "categories"),
    [
        (["b", "c", "b", "a"], ("a", "b", "c")),
        ([10, 9, 10, -1], (-1, 9, 10)),
        ([True, False, True, True], (False, True)),
        ([2.5, 0.5, 2.5, 2.5], (0.5, 2.5)),
        (pd.Categorical(["b", "c", "b", "a"], categories=["z", "c", "b", "a"]), ("a", "b", "c")),
    ],
)
def test_categories_are_the_sorted_values_seen(tmp_path, values, categories):
    content = pa.Table.from_pandas(pd.DataFrame({"g": values}))
    data = ingest(write_parquet(content, tmp_path / "t"), tmp_path / "out", "g:category", shuffle=None)
    assert open_shards(tmp_path / "out").fields["g"].categories == categories
    assert labels(data, "g").tolist() == list(values)


def test_many_categories_get_wider_codes(tmp_path):
    names = [f"n{number:05d}" for number in range(40_000)]
    content = pa.table({"g": names, "h": [name[:4] for name in names]})
    data = ingest(write_parquet(content, tmp_path / "t"), tmp_path / "out")
    assert [each.dtype for each in data.fields.values()] == ["int32", "int16"]
    assert sorted(labels(data, "g")) == names


def test_a_csv_column_that_starts_with_whole_numbers_may_go_on_with_fractions(tmp_path):
    values = [str(number) for number in range(700_000)] + ["0.5"]
    path = tmp_path / "t.csv"
    path.write_text("v\n" + "\n".join(values) + "\n")
    assert path.stat().st_size > 4 * MIB
    assert whole(ingest(path, tmp_path / "out", "v:float64", shuffle=None), "v")[-1] == 0.5


def test_files_may_differ_in_how_they_hold_a_column(tmp_path):
    whole_numbers = write_csv(pa.table({"v": [1, 2], "n": pa.array(["", "a"])}), tmp_path / "a")
    fractions = write_csv(pa.table({"n": pa.array(["a", "b"]), "v": [0.5, 1.5]}), tmp_path / "b")
    data = ingest([whole_numbers, fractions], tmp_path / "out", "v", shuffle=None)
    assert whole(data, "v").tolist() == [1.0, 2.0, 0.5, 1.5]


def test_decimals_are_numbers(tmp_path):
    content = pa.table({"v": pa.array([1, 2, 3]).cast(pa.decimal128(25, 2))})
    data = ingest(write_parquet(content, tmp_path / "t"), tmp_path / "out", shuffle=None)
    assert whole(data, "v").tolist() == [1.0, 2.0, 3.0]


def test_the_manifest_tells_how_the_data_were_made(tmp_path):
    path = write_csv(table(), tmp_path / "t")
    made = ingest(path, tmp_path / "out", "i").manifest.made
    assert made["sources"] == [str(path)]
    assert (made["format"], made["shuffle"], made["missing"]) == ("csv", 0, "refuse")
    assert (made["rows_read"], made["rows_dropped"]) == (N, 0)


def test_memory_does_not_grow_with_the_table(tmp_path):
    num_rows, columns = 2**14, 32
    part = pa.table({f"c{number}": np.random.default_rng(number).random(num_rows) for number in range(columns)})
    with pa.parquet.ParquetWriter(tmp_path / "t.parquet", part.schema) as writer:
        for _ in range(32):
            writer.write_table(part)
    spec = f"x={','.join(part.column_names)}:standardize"
    tracemalloc.start()
    arrow = pa.default_memory_pool()
    try:
        data = ingest(
            tmp_path / "t.parquet", tmp_path / "out", spec, chunk_bytes=MIB, shard_bytes=4 * MIB, memory_bytes=8 * MIB
        )
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert data.manifest.num_bytes == 128 * MIB
    assert peak < 64 * MIB
    # Parts of the table are held by Arrow, whose memory tracemalloc does not see.
    assert arrow.max_memory() is None or arrow.max_memory() < 64 * MIB


# Missing values -------------------------------------------------------------------------------------------------------


def with_missing():
    return pa.table(
        {
            "i": np.arange(6),
            "a": pa.array([1.0, None, 3.0, float("nan"), 5.0, 6.0]),
            "k": pa.array([1, 2, None, 4, 5, 6]),
            "n": pa.array(["u", "v", "w", "u", None, "v"]),
        }
    )


@pytest.mark.parametrize("write", WRITERS)
def test_missing_values_are_refused_naming_columns_and_counts(tmp_path, refused, write):
    paths = [write(with_missing(), tmp_path / f"t{number}") for number in range(2)]
    with refused("a (4 of 12 rows)", "k (2 of 12 rows)", "n (2 of 12 rows)", "missing='drop'"):
        ingest(paths, tmp_path / "out", memory_bytes=100)


@pytest.mark.parametrize("write", WRITERS)
def test_rows_with_missing_values_are_dropped_when_asked(tmp_path, write):
    data = ingest(write(with_missing(), tmp_path / "t"), tmp_path / "out", shuffle=None, missing="drop")
    assert whole(data, "i").tolist() == [0, 5]
    assert data.fields["k"].dtype == "int64"
    assert data.fields["n"].categories == ("u", "v")
    assert data.manifest.made["rows_dropped"] == 4


def test_only_columns_asked_for_can_be_missing(tmp_path):
    path = write_parquet(with_missing(), tmp_path / "t")
    assert ingest(path, tmp_path / "out", "i").num_rows == 6


def test_nothing_left_is_refused(tmp_path, refused):
    path = write_parquet(pa.table({"a": pa.array([None, 1.0]), "b": pa.array([1.0, None])}), tmp_path / "t")
    with refused("empty data: 0 of 2 rows are left", "1 in a", "1 in b"):
        ingest(path, tmp_path / "out", missing="drop")
    empty = write_csv(pa.table({"a": pa.array([], pa.float64())}), tmp_path / "e")
    with refused("empty data"):
        ingest(empty, tmp_path / "out")


def test_a_column_without_any_value_is_missing(tmp_path, refused):
    path = write_csv(pa.table({"a": pa.array([None, None], pa.float64()), "b": [1, 2]}), tmp_path / "t")
    with refused("a (2 of 2 rows)"):
        ingest(path, tmp_path / "out")


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["refuse", "drop"])
def test_infinite_values_are_always_refused(tmp_path, refused, missing):
    values = np.ones(N)
    values[[500, 600]] = np.inf, -np.inf
    path = write_parquet(pa.table({"a": values, "g": ["u"] * N}), tmp_path / "t")
    with refused("infinite values in a (2 values, the first in row 500)"):
        ingest(path, tmp_path / "out", missing=missing)


def test_the_row_of_an_infinite_value_counts_dropped_rows(tmp_path, refused):
    path = write_parquet(pa.table({"a": pa.array([None, None, 1.0, float("inf")])}), tmp_path / "t")
    with refused("the first in row 3"):
        ingest(path, tmp_path / "out", missing="drop")


BAD = {
    "nope": ("no column nope", "i, hour, distance, carrier, late"),
    "x=hour,carrier": ("column 'carrier' is text", "x=carrier:category"),
    "c=carrier": ("column 'carrier' is text", "c=carrier:category"),
    "late:standardize year:standardize": ("column 'year' is constant (2013", "leave out :standardize"),
    "i:int8": ("column 'i' has the value 999", "int8 goes from -128 to 127", "wider dtype"),
    "negative:uint8": ("column 'negative' has the value -5", "uint8 goes from 0 to 255"),
    "distance:int32": ("column 'distance' has the value", "which is no int32", "float"),
    "huge:float32": ("column 'huge' has the value 1e+300", "float32 goes from -3.4", "wider dtype"),
    "huge:standardize": ("column 'huge' goes from", "too far to be standardised"),
    "tiny:standardize": ("column 'tiny' goes from 0.0 to 1e-200", "too little to be standardised"),
    "i:bool": ("column 'i' has the value 999", "bool goes from 0 to 1"),
    "i:category:int8": ("field 'i' has 1000 categories", "codes of int8 end at 127", "use int16"),
    "big": ("column 'big' has the value 9223372036854775808", "wider dtype"),
    "day": ("column 'day' has type timestamp", "days since"),
    "nested": ("column 'nested' has type list", "leave it out"),
    "x=Arr Delay:float32:": ("unknown modifier ''",),
}


@pytest.mark.parametrize("spec", BAD)
def test_what_does_not_go_with_the_values_is_refused(tmp_path, refused, spec):
    content = table()
    others = {
        "year": pa.array(np.full(N, 2013)),
        "negative": pa.array(np.arange(N) % 6 - 5),
        "huge": pa.array(np.where(np.arange(N) == 3, 1e300, 1.0)),
        "tiny": pa.array(np.where(np.arange(N) == 3, 1e-200, 0.0)),
        "big": pa.array(np.array([2**63] * N, np.uint64)),
        "day": pa.array(np.array(["2020-01-01"] * N, "M8[s]")),
        "nested": pa.array([[1]] * N),
    }
    for name, column in others.items():
        content = content.append_column(name, column)
    path = write_parquet(content, tmp_path / "t")
    with refused(*BAD[spec]):
        ingest(path, tmp_path / "out", [spec] if "Arr" in spec else spec)


def test_bad_columns_are_refused_when_every_column_is_taken(tmp_path, refused):
    path = write_parquet(pa.table({"Arr Delay": [1], "class": [2]}), tmp_path / "t")
    with refused("'Arr Delay', 'class'", "identifiers"):
        ingest(path, tmp_path / "out")
    twice = write_parquet(pa.table([[1], [2]], names=["a", "a"]), tmp_path / "twice")
    with refused("more than one column a"):
        ingest(twice, tmp_path / "out")
    assert ingest(path, tmp_path / "out", [FieldSpec("y", ("Arr Delay",))]).num_rows == 1


def test_files_that_disagree_are_refused(tmp_path, refused):
    first = write_parquet(pa.table({"v": [1.0]}), tmp_path / "a")
    second = write_parquet(pa.table({"v": ["text"]}), tmp_path / "b")
    third = write_parquet(pa.table({"w": [1.0]}), tmp_path / "c")
    with refused("files disagree on a column", "v"):
        ingest([first, second], tmp_path / "out")
    with refused("c.parquet has no column v; it has w"):
        ingest([first, third], tmp_path / "out")


def test_sources_that_are_not_there_or_not_readable_are_refused(tmp_path, refused):
    parquet, csv = write_parquet(table(), tmp_path / "t"), write_csv(table(), tmp_path / "t")
    (tmp_path / "notes.txt").write_text("text")
    (tmp_path / "fake.parquet").write_text("text")
    (tmp_path / "fake.feather").write_text("text")
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "empty").mkdir()
    cases = {
        tmp_path / "missing.csv": "missing.csv does not exist",
        tmp_path / "empty": "holds no file of a known format",
        tmp_path / "notes.txt": "unknown format; names must end in one of .parquet",
        tmp_path / "fake.parquet": "fake.parquet cannot be read as parquet",
        tmp_path / "fake.feather": "fake.feather cannot be read as arrow",
        tmp_path / "empty.csv": "empty.csv cannot be read as csv",
        "nowhere://x.csv": "cannot look for nowhere://x.csv",
    }
    for source, part in cases.items():
        with refused(part):
            ingest(source, tmp_path / "out")
    with refused("several formats: csv, parquet"):
        ingest([parquet, csv], tmp_path / "out")
    with refused("no source files"):
        ingest([], tmp_path / "out")


def test_a_csv_column_of_mixed_types_is_refused_with_the_remedy(tmp_path, refused):
    path = tmp_path / "t.csv"
    path.write_text("v\n" + "\n".join(map(str, range(700_000))) + "\n0.5\n")
    with refused("t.csv cannot be read as csv", "0.5", "NAME:float64"):
        ingest(path, tmp_path / "out")


def test_a_damaged_file_in_the_middle_leaves_nothing(tmp_path, refused):
    first, second = (write_parquet(table(20_000), tmp_path / name) for name in "ab")
    content = bytearray(second.read_bytes())
    content[4 : len(content) // 2] = bytes(len(content) // 2 - 4)
    second.write_bytes(content)
    with refused("b.parquet cannot be read as parquet"):
        ingest([first, second], tmp_path / "out", memory_bytes=10_000)


def test_an_unknown_policy_is_refused_and_existing_output_kept(tmp_path, refused):
    path = write_parquet(table(), tmp_path / "t")
    with refused("missing='ignore'", "'drop'"):
        ingest(path, tmp_path / "out", missing="ignore")
    ingest(path, tmp_path / "out", "i")
    with refused("exists", "--overwrite"):
        ingest(path, tmp_path / "out", "hour")
    with refused("no column nope"):
        ingest(path, tmp_path / "out", "nope", overwrite=True)
    assert list(open_shards(tmp_path / "out").fields) == ["i"]
    assert list(ingest(path, tmp_path / "out", "hour", overwrite=True).fields) == ["hour"]
