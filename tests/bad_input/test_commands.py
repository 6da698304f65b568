"""Bad input to commands, a row a mistake: what is said, with the value, the limit and the remedy.

Commands run in this process through `main`, in one directory of files that are wrong in every way; each must end with
exit code 2 and one line, and leave that directory as it was.
"""

import subprocess
import sys
from pathlib import Path
from subprocess import PIPE

import pytest
from bad_files import BAD_ROW
from command import dadvi, listing, unchanged

INGEST: dict[str, tuple[str, list[str]]] = {
    "file missing": (
        "nowhere.csv new.zarr",
        ["nowhere.csv does not exist, or holds no file of a known format", ".parquet"],
    ),
    "no file of the pattern": ("gone-*.csv new.zarr", ["gone-*.csv does not exist"]),
    "one of two missing": ("table.csv gone.csv new.zarr", ["gone.csv does not exist"]),
    "format unknown": ("notes.txt new.zarr", ["notes.txt is of unknown format; names must end in one of .parquet"]),
    "formats mixed": ("table.csv table.parquet new.zarr", ["several formats: csv, parquet; ingest one at a time"]),
    "file empty": ("empty.csv new.zarr", ["empty.csv cannot be read as csv"]),
    "rows none": ("header.csv new.zarr", ["empty data: 0 of 0 rows are left"]),
    "file damaged": ("damaged.parquet new.zarr", ["damaged.parquet cannot be read as parquet", "check the file"]),
    "column missing": ("table.csv new.zarr --fields y --fields z", ["has no column z; it has y, x, g"]),
    "column of a field missing": ("table.csv new.zarr --fields a=x,speed", ["has no column speed; it has y, x, g"]),
    "values missing": (
        "holes.csv new.zarr",
        ["missing values in x (2 of 4 rows)", "drop those rows with missing='drop' (--missing drop)"],
    ),
    "values all missing": ("nothing.parquet new.zarr --missing drop", ["empty data: 0 of 2 rows are left", "2 in x"]),
    "values infinite": ("infinite.parquet new.zarr", ["infinite values in x (2 values, the first in row 2)"]),
    "text as numbers": (
        "table.csv new.zarr --fields g",
        ["column 'g' is text; make it integer codes with g=g:category"],
    ),
    "dates": ("many.parquet new.zarr", ["column 'when' has type timestamp", "an hour or days since a date"]),
    "codes overflow": (
        "many.parquet new.zarr --fields g:category:int8",
        ["field 'g' has 300 categories, and the codes of int8 end at 127; use int16"],
    ),
    "integers overflow": (
        "many.parquet new.zarr --fields n:int8",
        ["column 'n' has the value 299, and int8 goes from -128 to 127; use a wider dtype for field 'n'"],
    ),
    "fractions as integers": (
        "holes.csv new.zarr --fields z:int32",
        ["column 'z' has the value 0.5, which is no int32"],
    ),
    "constant standardised": ("constant.csv new.zarr --fields x:standardize", ["column 'x' is constant (1.5)"]),
    "name a keyword": ("constant.csv new.zarr", ["must be Python identifiers; rename 'lambda'"]),
    "fields with a comma": (
        "table.csv new.zarr --fields y,x",
        ["'y,x' is not a field; separate fields by spaces ('y x'), or name what the columns are stacked into (x=y,x)"],
    ),
    "modifier unknown": (
        "table.csv new.zarr --fields x:normalise",
        ["'x:normalise' has the unknown modifier 'normalise'; there are category, standardize, and the dtypes float16"],
    ),
    "dtypes two": ("table.csv new.zarr --fields x:float32:float64", ["has the dtypes float32 and float64; give one"]),
    "category standardised": ("table.csv new.zarr --fields g:category:standardize", ["codes of categories cannot be"]),
    "category of two": ("table.csv new.zarr --fields c=g,y:category", ["2 columns cannot share codes"]),
    "category as float": ("table.csv new.zarr --fields g:category:float32", ["integers, not float32; use int32"]),
    "field without name": ("table.csv new.zarr --fields =x", ["'=x' is not a field; write NAME, NAME=COLUMN"]),
    "field twice": ("table.csv new.zarr --fields x --fields x=y", ["field 'x' is named 2 times"]),
    "chunk_rows zero": ("table.csv new.zarr --chunk-rows 0", ["chunk_rows=0 must be at least 1"]),
    "shard_rows no multiple": (
        "table.csv new.zarr --chunk-rows 100 --shard-rows 250",
        ["shard_rows=250 must be a multiple of chunk_rows=100; use 200 or 300"],
    ),
    "compression unknown": ("table.csv new.zarr --compression gzip", ["compression='gzip' is not known; use 'zstd'"]),
    "output exists": ("table.csv data.zarr", ["data.zarr exists; choose another output, or replace it", "--overwrite"]),
    "output is no data set": ("table.csv notes.txt --overwrite", ["notes.txt exists and is nothing that dadvi wrote"]),
    "output is a directory of others": ("table.csv run --overwrite", ["run exists and is nothing that dadvi wrote"]),
    "parent missing": (
        "table.csv no/new.zarr",
        ["cannot write to", "No such file or directory; create that directory"],
    ),
    "parent a file": ("table.csv notes.txt/new.zarr", ["cannot write to", "choose one that can be written"]),
    "shuffle": ("table.csv new.zarr --shuffle -1", ["--shuffle -1: a seed is a whole number, at least 0"]),
    "shuffle and not": (
        "table.csv new.zarr --shuffle 1 --keep-order",
        ["--shuffle and --keep-order exclude one another"],
    ),
}


FIT: dict[str, tuple[str, list[str]]] = {
    "data missing": (
        "model.py:model gone.zarr",
        ["gone.zarr does not exist; check the path, or make it with `dadvi ing"],
    ),
    "data a file": ("model.py:model table.csv", ["table.csv is not a Zarr group, or cannot be read"]),
    "data a directory": (
        "model.py:model run",
        ["run is not a Zarr group, or cannot be read", "make one with `dadvi ing"],
    ),
    "data without arrays": ("model.py:model empty.zarr", ["has no arrays at its root, at least one is needed"]),
    "data without rows": ("model.py:model rowless.zarr", ["empty data: 0 rows, at least 1 is needed"]),
    "data of unequal length": (
        "model.py:model unequal.zarr",
        ["have unequal length: x has 5 rows, y has 7 rows; every field needs the same first axis"],
    ),
    "data newer": (
        "model.py:model newer.zarr",
        ["has format 7, and this version of dadvi reads formats up to 1; upgrade"],
    ),
    "data changed": ("model.py:model changed.zarr", ["metadata of", "have been changed since it was written"]),
    "data damaged": ("model.py:model damaged.zarr", ["field 'x', shard 0, chunk 0 (rows 0 to 99)", "is damaged"]),
    "data lost": ("model.py:model shard_lost.zarr", ["field 'x', shard 0, chunk 0", "is missing; restore it"]),
    "data a posterior": ("model.py:model run/posterior.zarr", ["run/posterior.zarr is a posterior, not a data set"]),
    "nan": (
        "model.py:model nan.zarr",
        ["field 'x' has 1 rows that are not finite, the first in row 5 (value nan)", "drop"],
    ),
    "nan in the middle": (
        "model.py:model nan_middle.zarr",
        [f"field 'x' has 1 rows that are not finite, the first in row {BAD_ROW} (value nan)", "drop or impute them"],
    ),
    "infinity in the middle": (
        "model.py:model infinite_middle.zarr",
        [f"field 'x' has 1 rows that are not finite, the first in row {BAD_ROW} (value -inf)"],
    ),
    "observed outside": (
        "model.py:model first.zarr",
        [
            "observed field 'y' has 1 rows outside the support of Bernoulli, the first in row 3 (value 2",
            "mend the data",
        ],
    ),
    "observed outside in the middle": (
        "model.py:model middle.zarr",
        [f"observed field 'y' has 1 rows outside the support of Bernoulli, the first in row {BAD_ROW} (value -1"],
    ),
    "field unknown": (
        "model.py:unknown_field data.zarr",
        ["the likelihood takes 'distance', which is neither a latent (a, b) nor a field of the data (m, x, y)"],
    ),
    "observed unknown": ("model.py:unknown_observed data.zarr", ["observed is 'late', which is neither a latent"]),
    "weight unknown": ("model.py:unknown_weight data.zarr", ["weight is 'w', which is neither a latent"]),
    "dims unknown": (
        "model.py:unknown_dims data.zarr",
        ["dims of 'e' name 'g', which is not a field of the data (y, x, m)"],
    ),
    "observed of wrong shape": ("model.py:observed_wide data.zarr", ["'x': (100,)", "'m': (100, 2)"]),
    "likelihood not by row": ("model.py:not_by_row data.zarr", ["the likelihood is not additive over rows"]),
    "likelihood a scalar": ("model.py:scalar data.zarr", ["the log-likelihood of 100 rows has shape ()", "(100,)"]),
    "likelihood not finite": (
        "model.py:not_finite data.zarr",
        ["the log-likelihood of row 0 is -inf at the starting point"],
    ),
    "likelihood raises": ("model.py:raises data.zarr", ["the likelihood failed on 100 rows", "(model.py in line 22)"]),
    "likelihood in NumPy": (
        "model.py:numpy data.zarr",
        ["it takes a latent to NumPy; keep the likelihood in torch, without .item(), .detach(), .numpy()", "in line 3"],
    ),
    "likelihood a tensor": (
        "model.py:tensor data.zarr",
        ["likelihood returned a Tensor; it must return a torch distribut"],
    ),
    "file missing": (
        "gone.py:model data.zarr",
        ["no model file 'gone.py'; give the path of a Python file and a name in it"],
    ),
    "name missing": ("model.py data.zarr", ["model 'model.py' is not of the form MODEL.py:NAME"]),
    "name empty": ("model.py: data.zarr", ["model 'model.py:' is not of the form MODEL.py:NAME"]),
    "file no Python": (
        "model.txt:model data.zarr",
        ["'model.txt' cannot be loaded as Python; its name must end in .py"],
    ),
    "file a directory": ("run:model data.zarr", ["no model file 'run'"]),
    "syntax": ("syntax.py:model data.zarr", ["syntax.py failed: SyntaxError: invalid syntax (syntax.py, line 2)"]),
    "name not in the file": (
        "model.py:modle data.zarr",
        [
            "model.py has no 'modle'; the models in it are: model, unknown",
            "; the functions, of which one may return a model: logistic, broken, in_numpy",
        ],
    ),
    "no model": ("model.py:number data.zarr", ["model.py:number is a int; it must be a dadvi.Model, or a function"]),
    "model refused": (
        "fails.py:model data.zarr",
        ["fails.py in line 3: Model needs either likelihood= with observed="],
    ),
    "function raises": ("model.py:broken data.zarr", ["model.py failed in line 28: AttributeError"]),
    "optimizer": ("model.py:model data.zarr --optimizer adamw", ["optimizer is 'adamw'; known are 'adam', 'sgd'"]),
    "schedule": (
        "model.py:model data.zarr --schedule linear",
        ["schedule is 'linear'; known are 'constant', 'cosine'"],
    ),
    "averaging": ("model.py:model data.zarr --averaging mean", ["averaging is 'mean'; known are 'polynomial', 'tail'"]),
    "estimator": ("model.py:model data.zarr --estimator iwae", ["unknown estimator 'iwae': use one of 'closed_form'"]),
    "estimator and optimizer": (
        "model.py:model data.zarr --estimator stl --optimizer proximal",
        ["optimizer 'proximal' takes the step of the entropy by itself, so estimator='stl' has no place in it"],
    ),
    "max_passes": ("model.py:model data.zarr --max-passes 0", ["max_passes=0.0: it must be positive and finite"]),
    "max_passes nan": ("model.py:model data.zarr --max-passes nan", ["max_passes=nan: it must be positive and finite"]),
    "tol": ("model.py:model data.zarr --tol -0.1", ["tol=-0.1: it must be positive and finite, in posterior sds"]),
    "seed": ("model.py:model data.zarr --seed -1", ["seed=-1: it must be a whole number, at least 0"]),
    "batch_rows": ("model.py:model data.zarr --batch-rows 0", ["batch_rows=0: at least 1 row is needed"]),
    "num_draws": ("model.py:model data.zarr --num-draws 0", ["num_draws=0", "must be even and at least 2"]),
    "num_draws odd": (
        "model.py:model data.zarr --num-draws 3",
        ["num_draws=3 with the 'antithetic' design: it must be even"],
    ),
    "learning_rate": (
        "model.py:model data.zarr --learning-rate 0",
        ["learning_rate=0.0: it must be positive and finite"],
    ),
    "workers": ("model.py:model data.zarr --workers 0", ["--workers 0: at least 1 is needed; --serial does without"]),
    "who works": (
        "model.py:model data.zarr --workers 2 --serial",
        ["--scheduler, --workers and --serial exclude one another"],
    ),
    "output a URL": (
        "model.py:model data.zarr --out nowhere://bucket/run",
        ["nowhere://bucket/run cannot be used (Protocol not known: nowhere); give a path, or a URL such as s3://"],
    ),
    "password in a URL": (
        "model.py:model ftp://me:hunter2@host/data.zarr",
        ["the URL ftp://...@host/data.zarr has a password in it; give credentials by the environment"],
    ),
    "verbose and quiet": ("model.py:model data.zarr --verbose", ["--verbose and --quiet exclude one another"]),
    "output a data set": (
        "model.py:model data.zarr --out data.zarr --overwrite",
        ["data.zarr exists and is nothing that"],
    ),
    "output exists": ("model.py:model data.zarr --out run", ["run exists; choose another output", "(--overwrite)"]),
    "output a file": ("model.py:model data.zarr --out notes.txt", ["notes.txt exists and is nothing that dadvi wrote"]),
    "parent missing": ("model.py:model data.zarr --out no/run", ["cannot write to", "/no; create that directory"]),
}


JOB: dict[str, tuple[str, list[str]]] = {
    "file missing": ("gone.toml", ["cannot read the job file gone.toml: No such file or directory; give a TOML file"]),
    "file a directory": ("run", ["cannot read the job file run: Is a directory"]),
    "not TOML": ("broken.toml", ["the job file broken.toml is not TOML: Invalid value (at line 1, column 7)"]),
    "not UTF-8": ("latin.toml", ["cannot read the job file latin.toml: it is not UTF-8 text"]),
    "key unknown": ("unknown.toml", ["unknown.toml: unknown key 'max_pases'; the nearest option is 'max_passes'"]),
    "key like none": ("far.toml", ["far.toml: unknown key 'z'; the nearest option is "]),
    "in a table": ("table.toml", ["table.toml: unknown key 'fit'"]),
    "another job": ("itself.toml", ["itself.toml: unknown key 'config'"]),
    "key twice": ("twice.toml", ["twice.toml: 'max_passes' is given twice, with - and with _; drop one of them"]),
    "text for a number": ("text.toml", ["text.toml: tol = 'small': it must be a number"]),
    "truth for a number": ("truth.toml", ["truth.toml: tol = True: it must be a number"]),
    "fraction for a count": ("fraction.toml", ["fraction.toml: workers = 1.5: it must be a whole number"]),
    "number for text": ("number.toml", ["number.toml: model = 3: it must be text in quotes"]),
    "choice unknown": (
        "choice.toml",
        ["choice.toml: family = 'full': it must be one of 'mean_field', 'full_rank', 'low_rank'"],
    ),
    "text for a flag": ("flag.toml", ["flag.toml: serial = 'yes': it must be true or false"]),
    "list for a path": ("path.toml", ["path.toml: out = ['run']: it must be text in quotes"]),
    "out of range": ("range.toml model.py:model data.zarr --out new", ["tol=-1.0: it must be positive and finite"]),
    "output exists": ("whole.toml --out run", ["run exists; choose another output"]),
}


DRY: dict[str, tuple[str, list[str]]] = {
    "output exists": ("model.py:model data.zarr --out run", ["run exists; choose another output"]),
    "parent missing": ("model.py:model data.zarr --out no/run", ["cannot write to", "/no; create that directory"]),
    "tol": ("model.py:model data.zarr --tol 0", ["tol=0.0: it must be positive and finite"]),
    "max_passes": ("model.py:model data.zarr --max-passes -1", ["max_passes=-1.0: it must be positive and finite"]),
    "seed": ("model.py:model data.zarr --seed -1", ["seed=-1: it must be a whole number, at least 0"]),
    "workers": ("model.py:model data.zarr --workers 0", ["--workers 0: at least 1 is needed"]),
    "model": ("model.py:not_by_row data.zarr", ["the likelihood is not additive over rows"]),
    "data": ("model.py:model gone.zarr", ["gone.zarr does not exist"]),
    "method": (
        "model.py:model data.zarr --method anchored --batch-rows 4",
        ["--batch-rows is a setting of stochastic ADVI and --method is anchored; drop one of them"],
    ),
    "the other method": (
        "model.py:model data.zarr --method advi --curvature data",
        ["--curvature is a setting of anchored rounds and --method is advi; drop one of them"],
    ),
    "both methods": (
        "model.py:model data.zarr --curvature data --rhat-max 1.2",
        ["--rhat-max is a setting of stochastic ADVI and --curvature is one of anchored rounds; drop one of them"],
    ),
    "rank": (
        "model.py:model data.zarr --rank 3",
        ["--rank is a setting of low_rank and --family is mean_field; drop one of them"],
    ),
}


RESUME: dict[str, tuple[str, list[str]]] = {
    "missing": ("gone", ["gone is not the directory of a run; give what a fit was told to write to"]),
    "a file": ("table.csv", ["table.csv is not the directory of a run"]),
    "a data set": ("data.zarr", ["data.zarr is not the directory of a run"]),
    "a posterior": ("run/posterior.zarr", ["run/posterior.zarr is not the directory of a run"]),
    "a URL": ("nowhere://bucket/run", ["nowhere://bucket/run cannot be used (Protocol not known: nowhere)"]),
    "begun in Python": ("python_run", ["python_run was not begun by `dadvi fit`; go on with dadvi.resume, in Python"]),
    "an object": ("optimizer_run", ["optimizer of the run was my.Optimizer, an object; give method="]),
    "version": ("version_run", ["the run was made by torch 1.0, and this is ", "; use that version"]),
    "model moved": (
        "model_moved_run",
        ["no model file '", "moved.py'; give the path of a Python file and a name in it"],
    ),
    "model changed": (
        "model_changed_run",
        [
            "later.py has changed since the run began: line 10 is 'return Bernoulli(logits=a - b * x)' and was",
            "'return Bernoulli(logits=a + b * x)'; restore it from the run's model.py, or fit anew",
        ],
    ),
    "prior changed": (
        "prior_changed_run",
        ["the model is not that of the run: they differ in the prior of 'b'; give the model of the run, or fit anew"],
    ),
    "data moved": ("data_moved_run", ["moved.zarr does not exist; check the path"]),
    "data shorter": (
        "data_shorter_run",
        ["shorter.zarr has 3993 rows, and the run's data had 4000; fit anew"],
    ),
    "data changed": (
        "data_changed_run",
        ["the metadata of ", "first.zarr have", "chunks, rows or origin differ; give the run's data, or fit anew"],
    ),
    "data in other chunks": ("data_chunked_run", ["the metadata of ", "fields, chunks, rows or origin differ"]),
    "settings empty": ("settings_empty_run", ["settings_empty_run/settings.json cannot be read", "or fit again"]),
    "settings cut": ("settings_cut_run", ["settings_cut_run/settings.json cannot be read", "or fit again"]),
    "settings a list": ("settings_list_run", ["settings_list_run/settings.json cannot be read", "or fit again"]),
    "settings little": ("settings_little_run", ["settings_little_run/settings.json cannot be read", "'data'"]),
    "max_passes": ("stopped --max-passes 0", ["max_passes=0.0: it must be positive and finite"]),
    "max_passes nan": ("stopped --max-passes nan", ["max_passes=nan: it must be positive and finite"]),
    "checkpoint_seconds": ("stopped --checkpoint-seconds -1", ["checkpoint_seconds=-1.0: it must be at least 0"]),
    "memory": ("stopped --max-passes 9 --memory much", ["'much'"]),
    "workers": ("stopped --workers 0", ["--workers 0: at least 1 is needed; --serial does without"]),
    "who works": ("stopped --workers 2 --serial", ["--scheduler, --workers and --serial exclude one another"]),
    "verbose and quiet": ("stopped --verbose", ["--verbose and --quiet exclude one another"]),
}


CHECKPOINT: dict[str, tuple[str, list[str]]] = {
    "flipped": ("checkpoint_flipped_run", ["checkpoint_flipped_run/checkpoint is damaged", "its checksum does not"]),
    "cut": ("checkpoint_cut_run", ["checkpoint_cut_run/checkpoint is damaged", "its checksum does not agree"]),
    "other": ("checkpoint_other_run", ["checkpoint_other_run/checkpoint is damaged", "does not begin as checkpoints"]),
}


ENVIRONMENT: dict[str, tuple[dict[str, str], list[str]]] = {
    "number": ({"DADVI_TOL": "small"}, ["Invalid value for '--tol'"]),
    "count": ({"DADVI_WORKERS": "many"}, ["Invalid value for '--workers'"]),
    "choice": ({"DADVI_FAMILY": "full"}, ["Invalid value for '--family'", "'full_rank'"]),
    "flag": ({"DADVI_SERIAL": "perhaps"}, ["Invalid value for '--serial'"]),
}


SUMMARY: dict[str, tuple[str, list[str]]] = {
    "missing": ("gone", ["gone does not exist; give the directory that `dadvi fit --out` wrote, or a saved posterior"]),
    "a file": ("table.csv", ["there is no posterior at ", "table.csv; give what Posterior.save wrote"]),
    "a data set": (
        "data.zarr",
        ["data.zarr is a data set, not a posterior; as data it is opened by open_shards"],
    ),
    "newer": ("newer_run", ["has format 2; this version of dadvi reads up to 1: upgrade dadvi"]),
    "part lost": ("lost.zarr", ["lost.zarr has changed since it was written: its digest is"]),
}


USAGE: dict[str, tuple[str, list[str]]] = {
    "command": ("resme run", ["No such command 'resme'"]),
    "option": ("fit model.py:model data.zarr --out new --tolerance 1", ["No such option: --tolerance"]),
    "family": (
        "fit model.py:model data.zarr --out new --family full",
        ["'--family'", "'mean_field', 'full_rank', 'low_rank'"],
    ),
    "missing": (
        "ingest table.csv new.zarr --missing ignore",
        ["'--missing'", "'ignore' is not one of 'refuse', 'drop'"],
    ),
    "no number": ("fit model.py:model data.zarr --out new --tol small", ["Invalid value for '--tol'"]),
    "no output": ("fit model.py:model data.zarr", ["Missing option '--out'"]),
    "no data": ("fit model.py:model --out new", ["Missing argument 'DATA.zarr'"]),
    "no sources": ("ingest new.zarr", ["Missing argument 'SOURCE'"]),
}


def refuse(world: Path, arguments: str, fragments: list[str], options: tuple[str, ...] = ()) -> str:
    with unchanged(world):
        ran = dadvi(*arguments.split(), *options)
    assert ran.code == 2, ran
    assert ran.out == ""
    assert "Traceback" not in ran.err
    for fragment in fragments:
        assert fragment in ran.err, ran.err
    return ran.err


def one_line(text: str) -> None:
    assert text.startswith("error: ")
    assert text.endswith("\n")
    assert text.count("\n") == 1


@pytest.mark.parametrize("mistake", INGEST)
def test_ingest_refuses(here, mistake):
    arguments, fragments = INGEST[mistake]
    one_line(refuse(here, f"ingest {arguments}", fragments))


@pytest.mark.parametrize("mistake", FIT)
def test_fit_refuses(here, mistake):
    arguments, fragments = FIT[mistake]
    out = () if "--out" in arguments else ("--out", "new")
    where = () if "--workers" in arguments else ("--serial",)
    one_line(refuse(here, f"fit {arguments} --quiet", fragments, (*out, *where)))


@pytest.mark.parametrize("mistake", JOB)
def test_job_files_are_refused(here, mistake):
    arguments, fragments = JOB[mistake]
    one_line(refuse(here, f"fit --config {arguments} --serial", fragments))


@pytest.mark.parametrize("mistake", DRY)
@pytest.mark.parametrize("as_json", [(), ("--json",)], ids=["", "json"])
def test_a_dry_run_refuses_what_the_fit_would(here, mistake, as_json):
    arguments, fragments = DRY[mistake]
    out = () if "--out" in arguments else ("--out", "new")
    one_line(refuse(here, f"fit {arguments} --dry-run", fragments, (*out, *as_json)))


@pytest.mark.parametrize("mistake", RESUME)
def test_resume_refuses(here, mistake):
    arguments, fragments = RESUME[mistake]
    where = () if "--workers" in arguments else ("--serial",)
    one_line(refuse(here, f"resume {arguments} --quiet", fragments, where))


@pytest.mark.parametrize("mistake", CHECKPOINT)
def test_resume_refuses_a_damaged_checkpoint(here, mistake):
    """That is seen when the run has been opened, for which its settings are written again, as they were."""
    arguments, fragments = CHECKPOINT[mistake]
    before = {path: path.read_bytes() for path in (here / arguments).iterdir()}
    ran = dadvi("resume", arguments, "--serial", "--quiet")
    assert (ran.code, ran.out) == (2, "")
    one_line(ran.err)
    for fragment in fragments:
        assert fragment in ran.err
    assert {path: path.read_bytes() for path in (here / arguments).iterdir()} == before


def test_resume_refuses_a_run_that_another_process_works_in(here):
    program = (
        "import fcntl, sys\n"
        "lock = open('stopped/lock', 'w')\n"
        "fcntl.flock(lock, fcntl.LOCK_EX)\n"
        "print('held', file=lock, flush=True)\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdin=PIPE, stdout=PIPE, text=True) as holder:
        try:
            assert holder.stdout.readline() == "held\n"
            fragments = ["stopped is in use by another process (held); wait for it to end, or choose another directory"]
            one_line(refuse(here, "resume stopped --max-passes 9 --serial --quiet", fragments))
        finally:
            holder.kill()
    (here / "stopped" / "lock").unlink()


@pytest.mark.parametrize("mistake", ENVIRONMENT)
def test_environment_variables_are_refused(here, monkeypatch, mistake):
    variables, fragments = ENVIRONMENT[mistake]
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    text = refuse(here, "fit model.py:model data.zarr --out new", fragments)
    assert text.splitlines()[-1].startswith("Error: ")


def test_the_tables_hold_at_least_sixty_mistakes_each_told_in_its_own_words():
    """Of the command line alone, and counting once what is told alike in several places."""
    tables = (INGEST, FIT, JOB, DRY, RESUME, CHECKPOINT, ENVIRONMENT, SUMMARY, USAGE)
    told = {tuple(fragments) for table in tables for _, fragments in table.values()}
    assert len(told) >= 60
    assert all(fragment for fragments in told for fragment in fragments)


@pytest.mark.parametrize("mistake", SUMMARY)
def test_summary_refuses(here, mistake):
    arguments, fragments = SUMMARY[mistake]
    one_line(refuse(here, f"summary {arguments}", fragments))
    assert refuse(here, f"summary {arguments} --json", fragments)


@pytest.mark.parametrize("mistake", USAGE)
def test_usage_is_told(here, mistake):
    arguments, fragments = USAGE[mistake]
    text = refuse(here, arguments, fragments)
    assert text.startswith("Usage: dadvi ")
    assert text.splitlines()[-1].startswith("Error: ")


def test_the_listing_sees_what_is_left(tmp_path):
    """What the tests above rest on."""
    before = listing(tmp_path)
    (tmp_path / ".hidden").mkdir()
    assert listing(tmp_path) != before
    with pytest.raises(AssertionError), unchanged(tmp_path):
        (tmp_path / ".hidden" / "file").touch()
