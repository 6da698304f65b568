"""P(a flight from New York is more than 15 minutes late), by hour, distance, month, carrier, origin and destination."""

import torch
from torch.distributions import Bernoulli, HalfNormal, Normal

import dadvi


def flights(data: dadvi.ShardedDataset) -> dadvi.Model:
    """Return the model for the data set: as many effects as there are months, carriers, origins and destinations."""
    size = {name: len(data.fields[name].categories or ()) for name in ("month", "carrier", "origin", "dest")}

    def likelihood(intercept, slope, by_month, by_carrier, by_origin, by_dest, x, month, carrier, origin, dest):
        logits = intercept + x @ slope + by_month[month] + by_carrier[carrier] + by_origin[origin] + by_dest[dest]
        return Bernoulli(logits=logits)

    return dadvi.Model(
        prior={
            "intercept": Normal(-1.0, 1.0),
            "slope": Normal(torch.zeros(2), 1.0),
            "by_month": Normal(torch.zeros(size["month"]), 0.5),
            "sd_carrier": HalfNormal(1.0),
            "by_carrier": lambda sd_carrier: Normal(torch.zeros(size["carrier"]), sd_carrier),
            "sd_origin": HalfNormal(1.0),
            "by_origin": lambda sd_origin: Normal(torch.zeros(size["origin"]), sd_origin),
            "sd_dest": HalfNormal(1.0),
            "by_dest": lambda sd_dest: Normal(torch.zeros(size["dest"]), sd_dest),
        },
        likelihood=likelihood,
        observed="late",
        dims={"slope": "x", "by_month": "month", "by_carrier": "carrier", "by_origin": "origin", "by_dest": "dest"},
    )
