"""Ingest of a Parquet table of floats, beside a plain copy of the same file: seconds as ratios, and peak memory.

    python scripts/bench_ingest.py [--quick] [--json PATH]

The copy is `shutil.copyfile` of the Parquet file, without fsync; ingest has none either. Each way runs once to warm up
the disk's cache and then REPEATS times, in turns; the medians are compared. Local workers are started beforehand. Peak
memory is the largest resident set of a process during its last run, seen every 20 ms.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet

import dadvi
from dadvi.clients import start_local

COLUMNS = 24
ROWS_OF_A_GROUP = 250_000
REPEATS = 3
MIB = 2**20


def write_table(path: Path, num_rows: int) -> None:
    """Write a Parquet file of COLUMNS float64 columns of noise, uncompressed and without dictionaries."""
    rng = np.random.default_rng(0)
    schema = pa.schema([(f"c{number}", pa.float64()) for number in range(COLUMNS)])
    with pa.parquet.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
        for _ in range(0, num_rows, ROWS_OF_A_GROUP):
            columns = [rng.standard_normal(ROWS_OF_A_GROUP) for _ in range(COLUMNS)]
            writer.write_table(pa.table(columns, schema=schema), row_group_size=ROWS_OF_A_GROUP)


def peaks(work: Callable[[], object], processes: dict[str, psutil.Process]) -> dict[str, float]:
    """Return the largest resident set of each process while the work is done, in MiB."""
    found = dict.fromkeys(processes, 0.0)
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            for name, process in processes.items():
                found[name] = max(found[name], process.memory_info().rss / MIB)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        work()
    finally:
        done.set()
        thread.join()
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="500 000 rows in place of 2 000 000")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    num_rows = 500_000 if options.quick else 2_000_000
    with tempfile.TemporaryDirectory(prefix="bench-ingest-") as name:
        directory = Path(name)
        table, out = directory / "table.parquet", directory / "out.zarr"
        write_table(table, num_rows)
        client, cluster = start_local(2)
        try:
            fields = f"x={','.join(f'c{number}' for number in range(COLUMNS))}"
            ways: dict[str, Callable[[], object]] = {
                "copy": lambda: shutil.copyfile(table, directory / "copy.parquet"),
                "serial": lambda: dadvi.ingest(table, out, fields, client="serial", overwrite=True),
                "2 workers": lambda: dadvi.ingest(table, out, fields, client=client, overwrite=True),
            }
            seconds: dict[str, list[float]] = {way: [] for way in ways}
            for repeat in range(REPEATS + 1):
                for way, work in ways.items():
                    started = time.perf_counter()
                    work()
                    if repeat:
                        seconds[way].append(time.perf_counter() - started)
            here = psutil.Process()
            workers = {
                f"worker {number}": psutil.Process(pid)
                for number, pid in enumerate(client.run(lambda: psutil.Process().pid).values())
            }
            memory = {
                "2 workers": peaks(ways["2 workers"], {"coordinator": here, **workers}),
                "serial": peaks(ways["serial"], {"this process": here}),
            }
        finally:
            client.close()
            cluster.close()
        size = table.stat().st_size
    medians = {way: statistics.median(each) for way, each in seconds.items()}
    print(f"{num_rows} rows, {COLUMNS} float64 columns, {size / MIB:.0f} MiB of Parquet; medians of {REPEATS}")
    for way, median in medians.items():
        speed = medians["copy"] / median
        print(f"{way:>10}: {median:7.2f} s, {speed:5.2f} of the speed of the copy {memory.get(way, '')}")
    if options.json:
        figures = {"num_rows": num_rows, "bytes": size, "seconds": seconds, "peak_mib": memory}
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
