"""A fit whose workers are Slurm jobs of their own, which dask-jobqueue submits and cancels.

usage: python cluster/slurm/jobqueue.py --workers 8 -- MODEL.py:NAME DATA.zarr --out RUN ...

What follows ``--`` are the arguments of ``dadvi fit``, whose exit code is that of the script. Runs where jobs may be
submitted from and workers can connect to, for as long as the fit.
"""

import argparse
import os
import subprocess
import sys

from dask_jobqueue import SLURMCluster
from distributed import Client


def main() -> int:
    """Start the cluster, run the fit on it, and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=8, help="jobs of one worker with one thread [default: 8]")
    parser.add_argument("--memory", default="2GiB", help="of a worker [default: 2GiB]")
    parser.add_argument("--walltime", default="04:00:00", help="of a job [default: 04:00:00]")
    parser.add_argument("--partition", help="[default: Slurm's]")
    parser.add_argument("--interface", help="network to use, such as ib0")
    parser.add_argument("--wait", type=float, default=3600, help="seconds to wait for the first worker [default: 3600]")
    parser.add_argument("fit", nargs="+", help="arguments of dadvi fit, after --")
    options = parser.parse_args()
    with (
        SLURMCluster(
            cores=1,
            processes=1,
            memory=options.memory,
            walltime=options.walltime,
            queue=options.partition,
            interface=options.interface,
            scheduler_options={"dashboard_address": "127.0.0.1:0"},
        ) as cluster,
        Client(cluster) as client,
    ):
        cluster.scale(jobs=options.workers)
        client.wait_for_workers(1, timeout=options.wait)
        environment = {**os.environ, "DADVI_SCHEDULER": cluster.scheduler_address}
        return subprocess.run(["dadvi", "fit", *options.fit], env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
