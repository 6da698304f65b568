"""A fit whose scheduler and workers Dask starts over SSH on the machines named, and ends with the fit.

usage: python cluster/ssh/fit.py --hosts node1 node2 --workers 8 -- MODEL.py:NAME DATA.zarr --out RUN ...

What follows ``--`` are the arguments of ``dadvi fit``, whose exit code is that of the script. Keys, users and ports are
those of ~/.ssh/config, and a machine must be among those that ~/.ssh/known_hosts knows.
"""

import argparse
import os
import subprocess
import sys

from distributed import Client, SSHCluster


def main() -> int:
    """Start the cluster, run the fit on it, and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", nargs="+", required=True, help="the scheduler runs on the first")
    parser.add_argument("--workers", type=int, default=1, help="of one thread, on each machine [default: 1]")
    parser.add_argument("--python", default=sys.executable, help="on the machines [default: this one, %(default)s]")
    parser.add_argument("--interface", help="network to use, such as ib0")
    parser.add_argument("fit", nargs="+", help="arguments of dadvi fit, after --")
    options = parser.parse_args()
    network = {"interface": options.interface} if options.interface else {}
    with (
        SSHCluster(
            [options.hosts[0], *options.hosts],
            scheduler_options={**network, "dashboard_address": "127.0.0.1:0"},
            worker_options={**network, "nthreads": 1, "n_workers": options.workers},
            remote_python=options.python,
        ) as cluster,
        Client(cluster) as client,
    ):
        client.wait_for_workers(1, timeout=60)
        environment = {**os.environ, "DADVI_SCHEDULER": cluster.scheduler_address}
        return subprocess.run(["dadvi", "fit", *options.fit], env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
