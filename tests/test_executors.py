"""Executors: the same bits wherever a pass runs and whatever fails on the way; clusters that cannot be used."""

import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from clusters import local_client
from scripted import ScriptedDataset
from torch.distributions import Bernoulli, HalfNormal, Normal
from zarr.storage import MemoryStore

import dadvi
from dadvi import executors, summing
from dadvi.binding import bind_to
from dadvi.clients import check_workers, connect, versions
from dadvi.errors import ClusterError, DataError, InputError, ModelError, WorkError
from dadvi.executors import DaskExecutor, SerialExecutor, make_executor
from dadvi.passes import Gradient, HessianVector, LogLik, Pass
from dadvi.sharding import open_shards, write_shards

ROWS, CHUNK, SHARD = 203, 10, 30  # 21 chunks, the last of 3 rows; 7 shards
SUBSETS = [None, [0], [20], [3, 4, 5], [2, 9, 14, 20], range(0, 21, 2)]


def fields():
    rng = np.random.default_rng(0)
    return {"x": rng.standard_normal((ROWS, 3)).astype(np.float32), "y": rng.random(ROWS) < 0.4}


def model():
    return dadvi.Model(
        prior={"tau": HalfNormal(1.0), "b": lambda tau: Normal(torch.zeros(3), tau)},
        likelihood=lambda tau, b, x: Bernoulli(logits=tau * (x @ b)),
        observed="y",
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("executors") / "data.zarr"
    return write_shards(path, fields(), chunk_rows=CHUNK, shard_rows=SHARD)


@pytest.fixture(scope="module")
def bound(data):
    return bind_to(model(), data)


def works():
    rng = np.random.default_rng(1)
    points = rng.standard_normal((3, 4))
    return [Gradient(points), HessianVector(points, rng.standard_normal((5, 4))), LogLik(points)]


@pytest.fixture(scope="module")
def reference(bound, data):
    """The serial executor's sums by (pass, subset)."""
    serial = SerialExecutor(bound, data)
    return [[serial.run(work, subset) for subset in SUBSETS] for work in works()]


def assert_same_bits(sums, expected):
    assert type(sums) is type(expected)
    for a, b in zip(sums, expected, strict=True):
        assert a.dtype == b.dtype == np.float64
        assert a.tobytes() == b.tobytes()


def assert_all_the_same_bits(executor, reference):
    for work, expected in zip(works(), reference, strict=True):
        for subset, sums in zip(SUBSETS, expected, strict=True):
            assert_same_bits(executor.run(work, subset), sums)


@pytest.fixture(params=["serial", "dask"])
def make(request):
    """Make an executor of either kind: make(bound, data). Dask's worker is a thread of this process here."""
    if request.param == "serial":
        return SerialExecutor
    client = request.getfixturevalue("thread_client")
    return lambda bound, data: DaskExecutor(bound, data, client)


# --- both executors


def test_the_reference_is_the_sum_over_all_rows(bound, data, reference):
    whole = open_shards(data.location).read(0)
    batch = {name: torch.cat([data.read(chunk)[name] for chunk in range(21)]) for name in whole}
    eta = torch.from_numpy(works()[0].points).requires_grad_()
    value = bound.log_lik(eta, batch)
    (grad,) = torch.autograd.grad(value.sum(), eta)
    np.testing.assert_allclose(reference[0][0].log_lik, value.detach(), rtol=1e-6)
    np.testing.assert_allclose(reference[0][0].grad, grad, rtol=1e-5, atol=1e-5)


def test_same_bits_in_this_process(make, bound, data, reference):
    with make(bound, data) as executor:
        assert_all_the_same_bits(executor, reference)
        assert_all_the_same_bits(executor, reference)  # now from memory


def test_same_bits_with_chunks_summed_two_at_a_time(thread_client, bound, data, monkeypatch):
    monkeypatch.setattr(summing, "ROWS_AT_ONCE", 2 * CHUNK)
    serial = SerialExecutor(bound, data)
    with DaskExecutor(bound, data, thread_client) as executor:
        for work in works():
            assert_same_bits(executor.run(work), serial.run(work))


def test_rows_read_are_counted(make, bound, data):
    with make(bound, data) as executor:
        executor.run(works()[2])
        executor.run(works()[2], [0, 20])
        assert executor.rows_read == ROWS + CHUNK + 3


def test_chunks_that_do_not_exist_are_refused(make, bound, data):
    with make(bound, data) as executor, pytest.raises((InputError, IndexError)):
        executor.run(works()[2], [0, 21])


def test_a_run_of_no_chunks_is_refused(make, bound, data):
    with make(bound, data) as executor, pytest.raises(InputError, match="no chunks"):
        executor.run(works()[2], [])


def test_bad_input_is_refused_once_with_label_shard_and_chunk(make, bound, data, tmp_path):
    scripted = ScriptedDataset(data, tmp_path / "faults", {13: ["refuse"]})
    with make(bound, scripted) as executor, pytest.raises(DataError) as caught:
        executor.run(works()[0], label="step 4")
    for part in ("step 4", "bad rows", "shard 4, chunk 13"):
        assert part in str(caught.value)
    assert scripted.count(13) == 1  # the second reading would have been ok: nobody tried


@pytest.mark.parametrize("action", ["os_error", "work_error"])
def test_failures_that_stay_are_named_with_label_shard_and_chunk(make, bound, data, tmp_path, action):
    scripted = ScriptedDataset(data, tmp_path / "faults", {13: [action] * 100})
    with make(bound, scripted) as executor, pytest.raises((WorkError, OSError)) as caught:
        executor.run(works()[0], label="step 4")
    for part in ("step 4", "the store blinked", "shard 4, chunk 13"):
        assert part in str(caught.value)


class BrokenPass(Pass):
    name = "broken"

    def size(self, dim):  # noqa: ARG002
        return 1

    def on_chunk(self, model, batch):  # noqa: ARG002
        return 1 // int((batch["x"][:, 0] != fields()["x"][137, 0]).all())


def test_a_pass_that_fails_is_named_with_label_shard_and_chunk(make, bound, data):
    with make(bound, data) as executor, pytest.raises(ModelError) as caught:
        executor.run(BrokenPass(), [12, 13], label="certificate")
    for part in ("certificate", "'broken'", "shard 4, chunk 13", "rows 130 to 139", "ZeroDivisionError"):
        assert part in str(caught.value)


def test_sums_added_up_by_workers_have_the_same_bits(thread_client, bound, data, reference, monkeypatch):
    monkeypatch.setattr(executors, "LARGE_SUMS", 0)
    monkeypatch.setattr(executors, "LARGE_PASS", 0)
    monkeypatch.setattr(executors, "TOGETHER", 2)
    gathered = []
    gather = type(thread_client).gather
    monkeypatch.setattr(type(thread_client), "gather", lambda *args: gathered.append(len(args[1])) or gather(*args))
    with DaskExecutor(bound, data, thread_client) as executor:
        assert_same_bits(executor.run(works()[0]), reference[0][0])
        assert gathered == [1]


def test_points_of_many_coordinates_are_sent_without_a_warning(thread_client, tmp_path):
    """Dask warns of tasks with 10 MB of arguments, and warnings are errors here."""
    many = dadvi.Model(
        prior={"b": Normal(torch.zeros(700_000), 1.0)}, likelihood=lambda b, g: Normal(b[g], 1.0), observed="x"
    )
    few = {"g": np.arange(20) % 3, "x": np.zeros(20)}
    data = write_shards(tmp_path / "few", few, chunk_rows=5, shard_rows=10)
    with DaskExecutor(bind_to(many, data), data, thread_client) as executor:
        sums = executor.run(Gradient(np.zeros((2, 700_000))))
    np.testing.assert_array_equal(sums.grad, 0)


def test_bad_input_among_sums_added_up_by_workers_is_refused(thread_client, bound, data, tmp_path, monkeypatch):
    monkeypatch.setattr(executors, "LARGE_SUMS", 0)
    scripted = ScriptedDataset(data, tmp_path / "script", {13: ["refuse"]})
    with (
        DaskExecutor(bound, scripted, thread_client) as executor,
        pytest.raises(DataError, match="bad rows in chunk 13"),
    ):
        executor.run(works()[0])


def test_the_time_of_passes_is_told(make, bound, data):
    with make(bound, data) as executor:
        started = time.perf_counter()
        executor.run(works()[0], check=True)
        first = executor.profile
        executor.run(works()[0])
        elapsed = time.perf_counter() - started
    assert min(first.read, first.check, first.forward, first.backward) > 0
    assert executor.profile.check == first.check
    assert executor.profile.forward > first.forward
    assert sum(vars(executor.profile).values()) <= elapsed


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_decoding_is_told_apart_from_reading(make, tmp_path, compression):
    data = write_shards(tmp_path / "d.zarr", fields(), chunk_rows=CHUNK, shard_rows=SHARD, compression=compression)
    with make(bind_to(model(), data), data) as executor:
        executor.run(works()[0])
        assert executor.profile.read > 0
        assert (executor.profile.decode > 0) == (compression is not None)  # mapped chunks are there as they are stored


def test_data_in_memory(make):
    data = write_shards(MemoryStore(), fields(), chunk_rows=CHUNK, shard_rows=SHARD)
    bound = bind_to(model(), data)
    assert not data.shareable
    expected = SerialExecutor(bound, data).run(works()[0])
    with make(bound, data) as executor:
        assert_same_bits(executor.run(works()[0]), expected)


# --- failures that pass


def test_dask_retries_what_may_pass_and_the_bits_are_the_same(thread_client, bound, data, reference, tmp_path):
    script = {0: ["os_error"], 13: ["os_error", "work_error"], 20: ["work_error"]}
    scripted = ScriptedDataset(data, tmp_path / "faults", script)
    with DaskExecutor(bound, scripted, thread_client) as executor:
        assert_same_bits(executor.run(works()[0]), reference[0][0])
    assert [scripted.count(chunk) for chunk in (0, 13, 20)] == [2, 3, 2]


def test_serial_tells_of_what_may_pass_and_runs_again(bound, data, reference, tmp_path):
    scripted = ScriptedDataset(data, tmp_path / "faults", {13: ["os_error"]})
    executor = SerialExecutor(bound, scripted)
    with pytest.raises(OSError, match=r"shard 4, chunk 13.*the store blinked"):
        executor.run(works()[0])
    assert_same_bits(executor.run(works()[0]), reference[0][0])


# --- worker processes


def wait_until(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def test_workers_keep_their_chunks_when_dask_drops_copies(process_clients, bound, data, tmp_path):
    client = process_clients(4)
    client.wait_for_workers(4)
    scripted = ScriptedDataset(data, tmp_path / "counts", {})
    chunks = [0, 3, 6, 9]  # of a shard for each worker
    with DaskExecutor(bound, scripted, client) as executor:
        for _ in range(3):
            executor.run(works()[0], chunks)
            client.amm.run_once()
    assert [scripted.count(chunk) for chunk in chunks] == [1, 1, 1, 1]


def test_same_bits_on_4_2_and_1_workers(process_clients, bound, data, reference):
    client = process_clients(4)
    with DaskExecutor(bound, data, client) as executor:
        for num_workers in (4, 2, 1):  # one executor sees its workers leave
            client.cluster.scale(num_workers)
            wait_until(lambda n=num_workers: len(client.scheduler_info(n_workers=-1)["workers"]) == n)
            assert_all_the_same_bits(executor, reference)
            with DaskExecutor(bound, data, client) as fresh:
                assert_same_bits(fresh.run(works()[0]), reference[0][0])


def test_same_bits_after_a_worker_is_killed(process_clients, bound, data, reference, tmp_path):
    client = process_clients(4)  # one worker is left of them, or four
    client.cluster.scale(2)
    client.wait_for_workers(2)
    worker_pids = client.run(os.getpid).values()
    scripted = ScriptedDataset(data, tmp_path / "faults", {13: ["hang"]})
    pool = ThreadPoolExecutor(1)
    with DaskExecutor(bound, scripted, client) as executor:
        run = pool.submit(executor.run, works()[0])
        pool.shutdown(wait=False)  # a run that hangs is a failure, not a test that hangs
        wait_until(scripted.hanging.exists)
        pid = int(scripted.hanging.read_text())
        assert pid in worker_pids
        os.kill(pid, signal.SIGKILL)
        assert_same_bits(run.result(timeout=60), reference[0][0])
        assert scripted.count(13) == 2
        assert_same_bits(executor.run(works()[1]), reference[1][0])  # and the executor goes on


def test_data_in_memory_are_refused_by_other_processes(process_clients):
    data = write_shards(MemoryStore(), fields(), chunk_rows=CHUNK, shard_rows=SHARD)
    with pytest.raises(DataError, match=r"lives in this process.*client='serial'"):
        DaskExecutor(bind_to(model(), data), data, process_clients(4))


# --- actors, which sum what is a matter of milliseconds


def transitions_of(client):
    return client.cluster.scheduler.transition_counter


def makes_no_tasks(executor, chunks):
    before = transitions_of(executor.client)
    executor.run(works()[2], chunks)
    return transitions_of(executor.client) == before


@pytest.fixture
def seldom(monkeypatch):
    """Have passes go by actors as soon as there are any."""
    monkeypatch.setattr(executors, "PLACEMENT_SECONDS", 1e6)


@pytest.mark.usefixtures("seldom")
def test_a_pass_over_few_rows_has_the_same_bits_and_makes_no_tasks(thread_client, bound, data, reference):
    with DaskExecutor(bound, data, thread_client) as executor:
        wait_until(lambda: makes_no_tasks(executor, [0]))
        before = transitions_of(thread_client)
        assert_all_the_same_bits(executor, reference)
        assert transitions_of(thread_client) == before
    ours = f"{executor._run}-"
    wait_until(lambda: not any(str(key).startswith(ours) for key in thread_client.cluster.scheduler.tasks))


def test_passes_go_by_tasks_from_time_to_time(thread_client, bound, data, monkeypatch):
    with DaskExecutor(bound, data, thread_client) as executor:
        wait_until(lambda: makes_no_tasks(executor, [0]))
        monkeypatch.setattr(executors, "PLACEMENT_SECONDS", 0.1)
        time.sleep(0.1)
        assert not makes_no_tasks(executor, [0])


@pytest.mark.usefixtures("seldom")
def test_a_large_pass_goes_by_tasks_and_lets_workers_be_retired(thread_client, bound, data, monkeypatch):
    scheduler = thread_client.cluster.scheduler
    with DaskExecutor(bound, data, thread_client) as executor:
        wait_until(lambda: makes_no_tasks(executor, [0]))
        assert [len(worker.actors) for worker in scheduler.workers.values()] == [1]
        monkeypatch.setattr(executors, "FEW_ROWS", CHUNK)
        assert makes_no_tasks(executor, [0])
        assert not makes_no_tasks(executor, [0, 1])
        wait_until(lambda: not any(worker.actors for worker in scheduler.workers.values()))


@pytest.mark.usefixtures("seldom")
def test_what_fails_in_an_actor_is_tried_again_by_tasks(thread_client, bound, data, reference, tmp_path):
    scripted = ScriptedDataset(data, tmp_path / "faults", {9: ["os_error", "work_error"], 13: ["refuse"]})
    with DaskExecutor(bound, scripted, thread_client) as executor:
        wait_until(lambda: makes_no_tasks(executor, [0]))
        assert_same_bits(executor.run(works()[0], SUBSETS[4]), reference[0][4])
        assert scripted.count(9) == 3
        with pytest.raises(DataError, match=r"step 4: bad rows in chunk 13 \(shard 4, chunk 13\)"):
            executor.run(works()[0], label="step 4")
        assert scripted.count(13) == 1


@pytest.mark.usefixtures("seldom")
def test_same_bits_after_an_actor_is_killed_with_its_worker(process_clients, bound, data, reference, tmp_path):
    client = process_clients(2)
    client.wait_for_workers(2)
    scripted = ScriptedDataset(data, tmp_path / "faults", {14: ["hang"]})
    pool = ThreadPoolExecutor(1)
    with DaskExecutor(bound, scripted, client) as executor:
        wait_until(lambda: makes_no_tasks(executor, [0, 3]))
        run = pool.submit(executor.run, works()[0], SUBSETS[4])
        pool.shutdown(wait=False)
        wait_until(scripted.hanging.exists)
        assert not any(worker.processing for worker in client.cluster.scheduler.workers.values())
        os.kill(int(scripted.hanging.read_text()), signal.SIGKILL)
        assert_same_bits(run.result(timeout=60), reference[0][4])
        assert scripted.count(14) == 2
        assert_all_the_same_bits(executor, reference)


# --- tasks, which take the scheduler a while each


def shards_of_tasks(executor, work):
    return [task.num_shards for task in executor._tasks(work, executor._shards(None))]


def test_tasks_have_more_shards_once_it_is_known_how_fast_passes_go(thread_client, bound, data, reference, monkeypatch):
    monkeypatch.setattr(executors, "FEW_ROWS", 0)
    work, other = works()[:2]
    with DaskExecutor(bound, data, thread_client) as executor:
        assert shards_of_tasks(executor, work) == [1] * 7
        executor.run(work)
        (worker,) = executor._threads
        for threads, expected in ((1, [7]), (2, [4, 3]), (3, [3, 3, 1]), (7, [1] * 7), (32, [1] * 7)):
            executor._threads = {worker: threads}
            assert shards_of_tasks(executor, work) == expected
            assert_same_bits(executor.run(work), reference[0][0])
        assert shards_of_tasks(executor, other) == [1] * 7  # of another pass nothing is known


def test_tasks_take_some_seconds_and_large_sums_stay_apart(thread_client, bound, data, monkeypatch):
    work = works()[0]
    with DaskExecutor(bound, data, thread_client) as executor:
        executor.run(work)
        executor._threads = dict.fromkeys(executor._threads, 1)
        executor._pace[work.name] = 1.5 * SHARD / executors.TASK_SECONDS
        assert shards_of_tasks(executor, work) == [2, 2, 2, 1]
        executor._pace[work.name] = 0.5 * SHARD / executors.TASK_SECONDS
        assert shards_of_tasks(executor, work) == [1] * 7
        executor._pace[work.name] = 1e9
        assert shards_of_tasks(executor, work) == [7]
        monkeypatch.setattr(executors, "LARGE_SUMS", 7 * work.size(4) - 1)
        assert shards_of_tasks(executor, work) == [1] * 7


def test_the_pace_of_a_pass_is_that_of_its_threads(thread_client, bound, data):
    work = works()[0]
    with DaskExecutor(bound, data, thread_client) as executor:
        executor.run(work)
        profile = executor.profile
        busy = profile.read + profile.decode + profile.check + profile.forward + profile.backward
        assert executor._pace == {work.name: pytest.approx(ROWS / busy)}  # of one worker


# --- which executor, and clusters that cannot be used


def test_make_executor(thread_client, bound, data, monkeypatch):
    assert isinstance(make_executor(bound, data), SerialExecutor)  # small data stay in this process
    assert isinstance(make_executor(bound, data, "serial"), SerialExecutor)
    with make_executor(bound, data, thread_client) as executor:
        assert isinstance(executor, DaskExecutor)
    assert thread_client.status == "running"  # a client of the user's is not closed
    with make_executor(bound, data, thread_client.scheduler.address) as executor:
        assert isinstance(executor, DaskExecutor)
        assert executor.client is not thread_client
        assert_same_bits(executor.run(works()[2], [0]), SerialExecutor(bound, data).run(works()[2], [0]))
    assert executor.client.status == "closed"  # one of its own is
    assert thread_client.status == "running"

    def failing(*arguments):  # noqa: ARG001
        raise ClusterError("no")

    monkeypatch.setattr("dadvi.executors.check_workers", failing)
    opened = []
    monkeypatch.setattr("dadvi.clients.connect", lambda address: opened.append(connect(address)) or opened[0])
    with pytest.raises(ClusterError, match="no"):
        make_executor(bound, data, thread_client.scheduler.address)
    assert opened[0].status == "closed"


def test_an_unreachable_scheduler_is_refused():
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ClusterError) as caught:
            connect(address, timeout=0.5)
    for part in (address, "0.5 s", "dask scheduler"):
        assert part in str(caught.value)
    with pytest.raises(ClusterError, match="not an address"):
        connect("not an address", timeout=0.5)


class StubClient:
    """A cluster that answers as told."""

    def __init__(self, answers, workers=1):
        self.answers, self.workers = answers, workers
        self.scheduler = SimpleNamespace(address="tcp://stub:8786")

    def wait_for_workers(self, n_workers, timeout):
        if self.workers < n_workers:
            raise TimeoutError(f"{self.workers} of {n_workers} after {timeout}")

    def run(self, function):
        ours = function()  # what travels must run here too
        return {address: {**ours, **answer} for address, answer in self.answers.items()}


def test_workers_with_the_same_software_are_accepted():
    check_workers(StubClient({"tcp://a:1": {}, "tcp://b:2": {}}), 0.1)


@pytest.mark.parametrize(
    ("answer", "parts"),
    [
        ({"torch": None}, ("tcp://b:2", "no torch", versions()["torch"])),
        ({"dadvi": None, "torch": None}, ("tcp://b:2", "no dadvi", versions()["dadvi"])),
        ({"dadvi": "0.0.9"}, ("tcp://b:2", "has dadvi 0.0.9", versions()["dadvi"])),
        ({"torch": "1.13.0"}, ("tcp://b:2", "has torch 1.13.0", versions()["torch"])),
        ({"python": "3.7"}, ("tcp://b:2", "has python 3.7", versions()["python"])),
    ],
)
def test_a_worker_with_other_software_is_refused(answer, parts):
    with pytest.raises(ClusterError) as caught:
        check_workers(StubClient({"tcp://a:1": {}, "tcp://b:2": answer}), 0.1)
    for part in parts:
        assert part in str(caught.value)


def test_a_worker_with_another_dadvi_than_the_coordinator_is_refused(thread_client, bound, data, monkeypatch):
    monkeypatch.setattr("dadvi.clients.versions", lambda: {**versions(), "dadvi": "9.9.9"})
    with pytest.raises(ClusterError, match=rf"has dadvi {versions()['dadvi']}; the coordinator has 9\.9\.9"):
        DaskExecutor(bound, data, thread_client)


def test_a_scheduler_without_workers_is_refused():
    with pytest.raises(ClusterError, match=r"tcp://stub:8786 has no workers after 0\.1 s.*dask worker"):
        check_workers(StubClient({}, workers=0), 0.1)


def test_a_real_scheduler_without_workers_is_refused(bound, data):
    with (
        local_client(n_workers=0, processes=False) as client,
        pytest.raises(ClusterError, match=r"has no workers after 0\.2 s"),
    ):
        DaskExecutor(bound, data, client, wait_seconds=0.2)


def test_workers_that_left_before_the_first_run_are_missed(bound, data):
    with local_client(n_workers=1, processes=False) as client, DaskExecutor(bound, data, client) as executor:
        client.cluster.scale(0)
        wait_until(lambda: not client.scheduler_info(n_workers=-1)["workers"])
        with pytest.raises(ClusterError, match="no workers for 7 shards"):
            executor.run(works()[0])
