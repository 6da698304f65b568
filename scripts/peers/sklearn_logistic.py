"""scikit-learn's LogisticRegression on rows in memory: the mode of the posterior under Normal(0, 1) priors.

C = 1 is the penalty of that prior; the intercept is a column of the predictors, and penalised as they are. Only
`fit` is timed.

usage: python sklearn_logistic.py DATA OUT SPEC, where SPEC is JSON: dtype, and arguments of LogisticRegression
"""

import json
import platform
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import sklearn
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression


def main() -> None:
    directory, out, spec = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    dtype = spec.pop("dtype")
    x = np.load(directory / "x.npy", mmap_mode="r").astype(dtype)
    y = np.load(directory / "y.npy")
    model = LogisticRegression(C=1.0, fit_intercept=False, **spec)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        start = time.perf_counter()
        model.fit(x, y)
        seconds = time.perf_counter() - start
    run = {
        "settings": {**spec, "dtype": dtype, "iterations": int(model.n_iter_[0])},
        "seconds": [seconds],
        "loc": model.coef_.astype(float).tolist(),
        "sd": None,
        "complaints": [str(each.message) for each in caught if issubclass(each.category, ConvergenceWarning)],
    }
    versions = {"python": platform.python_version(), "scikit-learn": sklearn.__version__}
    out.write_text(json.dumps({"versions": versions, "runs": [run]}))


if __name__ == "__main__":
    main()
