"""An object store over HTTP: moto's, a server that speaks S3 on the loopback, behind a gate that can fail or wait."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import TIMEOUT_MAX, Event, Lock, Thread
from typing import Any, NamedTuple

import pytest
import s3fs
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

KEY, SECRET = "AKIAQ7ZX3EXAMPLE", "uT5rWq9secretX0example"
BUCKET = "s3://bucket"


class Gate:
    """What stands before the object store: fails every n-th reading of a chunk, or waits; or fails some requests."""

    def __init__(self, app: Callable[..., Any]) -> None:
        self._app, self._lock, self._over = app, Lock(), Event()
        self.reset()

    def reset(self, every: int = 0, wait: float = 0.0, refused: str = "", only: int = 0) -> None:
        """Fail every so many readings of a chunk, wait at each, fail requests of which METHOD PATH begins as told.

        With `only` just the reading of that number waits. A wait that is to last longer than the tests ends here.
        """
        self._over.set()
        self._over = Event()
        self.every, self.wait, self.refused, self.only, self.reads, self.failed = every, wait, refused, only, 0, 0

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        chunk = method == "GET" and "/c/" in path
        with self._lock:
            self.reads += chunk
            fails = chunk and self.every and self.reads % self.every == 0
            fails = fails or (self.refused and f"{method} {path}".startswith(self.refused))
            self.failed += bool(fails)
            waits, over = chunk and self.only in (0, self.reads), self._over
        if fails:
            start_response("500 Internal Server Error", [("Content-Type", "application/xml")])
            return [b"<Error><Code>InternalError</Code><Message>try again</Message></Error>"]
        if waits:
            over.wait(min(self.wait, TIMEOUT_MAX))
        return self._app(environ, start_response)


class Server(NamedTuple):
    """An object store, and where it is."""

    gate: Gate
    url: str


@contextmanager
def object_store() -> Iterator[Server]:
    """Run an object store. One for all tests: s3fs keeps its connections, and moto its objects."""
    gate = Gate(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, gate, threaded=True)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield Server(gate, f"http://127.0.0.1:{server.server_port}")
    server.shutdown()
    thread.join()
    server.server_close()


@contextmanager
def reached(server: Server) -> Iterator[Gate]:
    """Make a bucket, and set the environment in which it is reached, for child processes too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", server.url)
        patch.setenv("AWS_ACCESS_KEY_ID", KEY)
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_RETRY_MODE", "standard")
        patch.setenv("AWS_MAX_ATTEMPTS", "3")
        patch.setenv("NO_PROXY", "127.0.0.1")
        system().mkdir("bucket")
        yield server.gate
        server.gate.reset()
        system().rm("bucket", recursive=True)


def system() -> s3fs.S3FileSystem:
    """Return a view of the object store beside the package's own, without its cached listings."""
    return s3fs.S3FileSystem(use_listings_cache=False)


def objects(below: str = "bucket") -> Iterator[bytes]:
    """Yield the content of every object."""
    for name in system().find(below):
        yield system().cat_file(name)
