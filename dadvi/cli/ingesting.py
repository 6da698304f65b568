"""``dadvi ingest``: tables into a data set."""

from enum import StrEnum
from typing import Annotated

import typer

from dadvi.cli.options import Who, flat
from dadvi.cli.telling import say
from dadvi.errors import InputError
from dadvi.ingest import ingest as run_ingest


class Missing(StrEnum):
    """What to do with rows that have missing values."""

    REFUSE = "refuse"
    DROP = "drop"


@flat
def ingest(
    context: typer.Context,
    sources: Annotated[
        list[str],
        typer.Argument(metavar="SOURCE", help="Parquet, CSV or Arrow/Feather files, directories, globs or URLs."),
    ],
    out: Annotated[str, typer.Argument(metavar="OUT.zarr", help="Zarr group to write: a path or URL.")],
    *,
    fields: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME, NAME=COLUMN or NAME=COLUMN,COLUMN (stacked), each with :category, :standardize or :DTYPE; "
            "several in one string or by repeating the option. Default: every column.",
        ),
    ] = None,
    shuffle: Annotated[int | None, typer.Option(help="Seed of the global shuffle of rows. Default: 0.")] = None,
    keep_order: Annotated[bool, typer.Option("--keep-order", help="Do not shuffle.")] = False,
    missing: Annotated[Missing, typer.Option(help="Refuse rows with missing values, or drop them.")] = Missing.REFUSE,
    chunk_rows: Annotated[
        int | None, typer.Option(help="Rows of a chunk, the unit of sampling. Default: 8 MiB, less on small data.")
    ] = None,
    shard_rows: Annotated[
        int | None, typer.Option(help="Rows of a shard, a multiple of a chunk's. Default: 128 MiB, less on small data.")
    ] = None,
    compression: Annotated[str | None, typer.Option(help="zstd. Default: none.")] = None,
    who: Who,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing data set.")] = False,
) -> None:
    """Write tables as a shuffled Zarr data set, in bounded memory. Prints where it is.

    Without --scheduler, --workers or --serial, files up to 256 MiB are read in this process, larger ones by one worker
    process per core. The data set is the same.
    """
    client, num_workers = who.works(context, otherwise=None)
    if shuffle is not None and shuffle < 0:
        raise InputError(f"--shuffle {shuffle}: a seed is a whole number, at least 0")
    if keep_order and shuffle is not None:
        raise InputError("--shuffle and --keep-order exclude one another; give one of them")
    data = run_ingest(
        sources,
        out,
        " ".join(fields) if fields else None,
        client=client,
        num_workers=num_workers,
        shuffle=None if keep_order else shuffle or 0,
        missing=missing.value,
        chunk_rows=chunk_rows,
        shard_rows=shard_rows,
        compression=compression,
        overwrite=overwrite,
    )
    dropped = data.manifest.made["rows_dropped"]
    say(f"{data!r}; {dropped} of {data.num_rows + dropped} rows dropped for missing values" if dropped else repr(data))
    typer.echo(str(data.location))
