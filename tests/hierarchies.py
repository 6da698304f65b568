"""Models with effects of groups, and rows of them."""

import numpy as np
import torch
from torch.distributions import Bernoulli, HalfNormal, Normal

import dadvi


def many_groups(centred, num_groups=60, num_rows=1_500, seed=0):
    """Return fields and a logistic hierarchy: 25 rows a group, an intercept, a scale, and two slopes."""
    rng = np.random.default_rng(seed)
    group = rng.integers(0, num_groups, num_rows)
    x = rng.standard_normal((num_rows, 2))
    logits = 0.3 + 0.8 * rng.standard_normal(num_groups)[group] + x @ [0.7, -0.4]
    fields = {"group": group, "x": x, "y": rng.binomial(1, 1 / (1 + np.exp(-logits)))}
    common = {
        "mu": Normal(torch.tensor(0.0), 2.0),
        "tau": HalfNormal(torch.tensor(1.0)),
        "slope": Normal(torch.zeros(2), 2.0),
    }
    if centred:
        model = dadvi.Model(
            prior={**common, "effect": lambda mu, tau: Normal(mu, tau).expand([num_groups])},
            likelihood=lambda slope, effect, group, x: Bernoulli(logits=effect[group] + x @ slope),
            observed="y",
        )
    else:
        model = dadvi.Model(
            prior={**common, "raw": Normal(torch.zeros(num_groups), 1.0)},
            likelihood=lambda mu, tau, slope, raw, group, x: Bernoulli(logits=mu + tau * raw[group] + x @ slope),
            observed="y",
        )
    return model, fields


def crossed(num_rows=1_500, seed=0):
    """Return fields and a model of 60 users and 20 items."""
    rng = np.random.default_rng(seed)
    user, item = rng.integers(0, 60, num_rows), rng.integers(0, 20, num_rows)
    y = 0.5 + rng.normal(0, 0.8, 60)[user] + rng.normal(0, 0.5, 20)[item] + rng.standard_normal(num_rows)
    model = dadvi.Model(
        prior={
            "mu": Normal(torch.tensor(0.0), 2.0),
            "tau": HalfNormal(torch.tensor(1.0)),
            "sigma": HalfNormal(torch.tensor(1.0)),
            "item": lambda sigma: Normal(torch.tensor(0.0), sigma).expand([20]),
            "user": lambda tau: Normal(torch.tensor(0.0), tau).expand([60]),
        },
        likelihood=lambda mu, item, user, i, u: Normal(mu + item[i] + user[u], 1.0),
        observed="y",
    )
    return model, {"u": user, "i": item, "y": y}
