"""A judge in its own process or on its own machine: `serve` runs it, `ServiceReward` asks it over HTTP.

`wire` is the format of requests and answers, `png` the one for programs without safetensors, `queueing` packs the
samples of several requests into the judge's batches.
"""

from dancegrpo.rewards.service.client import ServiceReward
from dancegrpo.rewards.service.server import serve
from dancegrpo.rewards.service.token import read_token

__all__ = ["ServiceReward", "read_token", "serve"]
