"""Ingest by workers: the same bytes as by one process, bad input refused alike, nothing left behind."""

import hashlib
import os
import sys
import threading
import time
from collections import Counter
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet
import pytest
from clusters import local_client, scheduler_process, worker
from distributed import Client, KilledWorker, get_worker
from zarr.storage import MemoryStore

import dadvi
from dadvi import clients
from dadvi.errors import ClusterError, DataError, InputError, WorkError
from dadvi.ingest import Workers, _absent
from dadvi.sharding import tables

FIELDS = "x=a,b:standardize:float32 k g:category h=k:category"
FILES = 3


def content(number, num_rows=2_000):
    rng = np.random.default_rng(number)
    a = rng.normal(5.0, 2.0, num_rows)
    a[rng.random(num_rows) < 0.01] = np.nan
    return pa.table(
        {
            "a": a,
            "b": rng.normal(size=num_rows),
            "k": rng.integers(0, 50, num_rows),
            "g": np.array(["p", "q", "r", "s"])[rng.integers(number, 2 + number, num_rows)],
        }
    )


WRITERS = {
    "parquet": lambda table, path: pa.parquet.write_table(table, path, row_group_size=300),
    "csv": pa.csv.write_csv,
    "arrow": lambda table, path: pa.feather.write_feather(table, str(path), chunksize=300),
}


@pytest.fixture
def small_units(monkeypatch):
    """Units of a row group or two, cut by the coordinator."""
    monkeypatch.setattr(tables, "UNIT_BYTES", 15_000)


@pytest.fixture
def sources(tmp_path, small_units):  # noqa: ARG001
    def write(kind="parquet", files=FILES):
        for number in range(files):
            WRITERS[kind](content(number), tmp_path / f"t{number}.{kind}")
        return str(tmp_path / f"t*.{kind}")

    return write


def digests(path):
    """Return a digest of every file of a data set, and the data set's own digest."""
    found = {
        str(each.relative_to(path)): hashlib.sha256(each.read_bytes()).hexdigest()
        for each in sorted(Path(path).rglob("*"))
        if each.is_file()
    }
    return found, dadvi.open_shards(path).digest


def left(directory):
    return sorted(each.name for each in directory.iterdir() if not each.name.startswith("t"))


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("shuffle", [3, None])
def test_same_bytes_from_one_process_and_from_workers(tmp_path, sources, process_clients, kind, shuffle):
    ingest = partial(
        dadvi.ingest, sources(kind), fields=FIELDS, shuffle=shuffle, missing="drop", chunk_rows=128, shard_rows=512
    )
    ingest(out=tmp_path / "serial", client="serial")
    reference = digests(tmp_path / "serial")
    assert len(reference[0]) > 4 * 11
    for number in (1, 2, 4):
        ingest(out=tmp_path / f"w{number}", client=process_clients(number), memory_bytes=2**28 // number)
        assert digests(tmp_path / f"w{number}") == reference
    ingest(out=tmp_path / "tight", client="serial", memory_bytes=1)
    assert digests(tmp_path / "tight") == reference
    assert left(tmp_path) == ["serial", "w1", "w2", "w4"]


def test_a_table_of_many_units_has_its_rows_and_the_moments_of_all(tmp_path, sources):
    data = dadvi.ingest(sources(), tmp_path / "out", FIELDS, missing="drop", shuffle=None, client="serial")
    whole = pa.concat_tables([content(number) for number in range(FILES)])
    kept = ~np.isnan(whole["a"].to_numpy())
    assert len(tables.open_table(sources()).units()) > 2 * FILES
    k, g, h, x = (
        np.concatenate([data.read(chunk)[name] for chunk in range(data.manifest.num_chunks)]) for name in "kghx"
    )
    assert np.array_equal(k, whole["k"].to_numpy()[kept])
    assert np.array_equal(np.array(data.fields["g"].categories)[g], whole["g"].to_numpy()[kept])
    assert np.array_equal(np.array(data.fields["h"].categories)[h], k)
    raw = np.stack([whole["a"], whole["b"]], axis=1)[kept]
    assert np.allclose(data.fields["x"].mean, raw.mean(axis=0), rtol=1e-12)
    assert np.allclose(data.fields["x"].scale, raw.std(axis=0), rtol=1e-12)
    assert np.allclose(x, (raw - raw.mean(axis=0)) / raw.std(axis=0), atol=1e-6)
    assert data.manifest.made["rows_read"] == len(whole)


def test_a_scheduler_is_named_by_its_address(tmp_path, sources, process_clients):
    address = process_clients(2).scheduler.address
    dadvi.ingest(sources(), tmp_path / "out", "k", client=address)
    dadvi.ingest(sources(), tmp_path / "serial", "k", client="serial")
    assert digests(tmp_path / "out") == digests(tmp_path / "serial")
    with pytest.raises(ClusterError, match="cannot be used"):
        dadvi.ingest(sources(), tmp_path / "other", client="nowhere")


@pytest.mark.parametrize("who", ["serial", "workers"])
def test_bad_values_are_told_alike_and_nothing_is_left(tmp_path, sources, process_clients, who):
    client = "serial" if who == "serial" else process_clients(2)
    pattern = sources()
    with pytest.raises(DataError, match=r"missing values in a \(\d+ of 6000 rows\)"):
        dadvi.ingest(pattern, tmp_path / "out", client=client)
    table = content(0)
    values = np.ones(len(table))
    values[700] = np.inf
    table = table.set_column(1, "b", pa.array(values))
    WRITERS["parquet"](table, tmp_path / "t9.parquet")
    with pytest.raises(DataError, match=r"infinite values in b \(1 values, the first in row 6700\)"):
        dadvi.ingest(pattern, tmp_path / "out", "b", client=client)
    damaged = bytearray((tmp_path / "t1.parquet").read_bytes())
    damaged[4 : len(damaged) // 2] = bytes(len(damaged) // 2 - 4)
    (tmp_path / "t1.parquet").write_bytes(damaged)
    with pytest.raises(DataError, match=r"t1\.parquet cannot be read as parquet"):
        dadvi.ingest(pattern, tmp_path / "out", "b", client=client)
    assert left(tmp_path) == []


def test_what_workers_cannot_open_is_refused(tmp_path, sources, process_clients, thread_client, monkeypatch):
    pattern, client = sources(), process_clients(2)
    with pytest.raises(DataError, match=r"memory of this process.*client='serial'"):
        dadvi.ingest(pattern, MemoryStore(), "k", client=client)
    assert dadvi.ingest(pattern, MemoryStore(), "k", client=thread_client).num_rows == FILES * 2_000
    monkeypatch.setattr(sys.modules["dadvi.ingest"], "_absent", lambda paths: _absent([*paths, "/no/such/disk"]))
    with pytest.raises(DataError, match=r"worker .* does not see /no/such/disk; .* share"):
        dadvi.ingest(pattern, tmp_path / "out", "k", client=client)
    assert left(tmp_path) == []


def test_numbers_of_workers_that_make_no_sense_are_refused(tmp_path, sources):
    for options in ({"num_workers": 0}, {"num_workers": 2, "client": "serial"}):
        with pytest.raises(InputError, match="num_workers"):
            dadvi.ingest(sources(), tmp_path / "out", **options)


def test_a_task_that_fails_is_tried_again_and_order_kept(tmp_path, thread_client):
    def fail_once(item):
        marker = tmp_path / f"tried{item}"
        if item == 1 and not marker.exists():
            marker.touch()
            raise OSError("the disk blinked")
        return item

    assert list(Workers(thread_client, shareable=True).map(fail_once, range(4))) == [0, 1, 2, 3]
    assert (tmp_path / "tried1").exists()


def test_a_failure_waits_for_tasks_that_are_under_way(tmp_path, thread_client, monkeypatch):
    monkeypatch.setattr(clients, "POLL_SECONDS", 0.05)  # it is seen while others work

    def fail_or_work(item):
        if item == 0:
            raise RuntimeError("no bad input, but a mistake")
        work(tmp_path, item)

    with pytest.raises(RuntimeError, match="a mistake"):
        list(Workers(thread_client, shareable=True, retries=0).map(fail_or_work, range(40)))
    started, ended = done(tmp_path)
    assert started == ended
    assert 0 < len(ended) < 39


@pytest.mark.parametrize("num_items", [2, 4, 12])
def test_every_worker_gets_tasks_be_they_few_or_many(num_items):
    def where(_item):
        time.sleep(0.1)
        return get_worker().address

    with local_client(processes=False, n_workers=2) as client:
        for _ in range(2):  # Dask knows by now how long they take
            found = Counter(Workers(client, shareable=True).map(where, range(num_items)))
            assert len(found) == 2
            assert min(found.values()) >= num_items // 3


def work(directory, item):
    (directory / f"started{item}").touch()
    time.sleep(0.5)
    (directory / f"ended{item}").touch()


def done(directory):
    """Return which items were begun and which were finished. In files: a worker has a copy of all else."""
    return ([path.name[-1] for path in sorted(directory.glob(f"{what}*"))] for what in ("started", "ended"))


def _die_once(marker):
    """Have the next worker that is about to rename a file of Zarr's end there, as if it were killed."""
    rename = Path.replace

    def replace(path, target):
        if path.suffix == ".partial":
            try:
                Path(marker).touch(exist_ok=False)
            except FileExistsError:
                return rename(path, target)
            os._exit(1)
        return rename(path, target)

    Path.replace = replace


def test_a_worker_that_is_killed_as_it_writes_leaves_nothing(tmp_path, sources):
    ingest = partial(dadvi.ingest, sources(), fields="k", chunk_rows=128, shard_rows=512)
    ingest(out=tmp_path / "serial", client="serial")
    with local_client(processes=True, n_workers=2) as client:
        client.run(_die_once, str(tmp_path / "t-killed"))
        ingest(out=tmp_path / "out", client=client)
    assert (tmp_path / "t-killed").exists()
    assert digests(tmp_path / "out") == digests(tmp_path / "serial")
    assert left(tmp_path) == ["out", "serial"]


def test_a_task_that_ends_its_workers_is_given_up_after_the_others_have_ended(tmp_path, thread_client, monkeypatch):
    def killed(*_arguments):
        while not any(tmp_path.glob("started*")):
            time.sleep(0.01)
        raise KilledWorker("task", None, 3)

    monkeypatch.setattr(sys.modules["dadvi.ingest"], "gather", killed)  # `dadvi.ingest` is the function
    with pytest.raises(WorkError, match="a task ended 4 workers"):
        list(Workers(thread_client, shareable=True).map(partial(work, tmp_path), range(3)))
    started, ended = done(tmp_path)
    assert started == ended != []


def test_an_ingest_without_workers_is_given_up_after_a_while():
    with local_client(processes=True, n_workers=1) as client:
        workers = Workers(client, shareable=True, wait_seconds=1.0)
        client.cluster.scale(0)
        while client.cluster.scheduler.workers:
            time.sleep(0.05)
        with pytest.raises(WorkError, match=r"has had no workers for \d+ s; start some, and ingest again"):
            list(workers.map(abs, range(3)))
        client.cluster.scale(1)
        client.wait_for_workers(1, timeout=60)
        assert list(workers.map(abs, range(-3, 0))) == [3, 2, 1]


def test_an_ingest_whose_scheduler_is_lost_says_so_and_leaves_nothing(tmp_path, sources):
    writing = tmp_path / "t-writing"

    def hang(marker):  # a worker, instead of renaming a file of Zarr's
        rename = Path.replace

        def replace(path, target):
            if path.suffix == ".partial":
                Path(marker).touch()
                time.sleep(60)
            return rename(path, target)

        Path.replace = replace

    def kill(scheduler):
        while not writing.exists():
            time.sleep(0.01)
        scheduler.kill()

    (tmp_path / "t").mkdir()
    with ExitStack() as stack:
        scheduler, address = stack.enter_context(scheduler_process(tmp_path / "t"))
        hanging = stack.enter_context(worker(address, tmp_path / "t" / "worker"))
        client = stack.enter_context(Client(address, set_as_default=False))
        client.run(hang, str(writing))
        killer = threading.Thread(target=kill, args=[scheduler])
        killer.start()
        with pytest.raises(WorkError, match=r"the scheduler at tcp://.* was lost, .* start it, and ingest again"):
            dadvi.ingest(sources(), tmp_path / "out", fields="k", client=client)
        killer.join()
        hanging.kill()
    assert left(tmp_path) == []
