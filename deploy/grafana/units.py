"""Names of units as Grafana knows them."""

SECONDS = "s"
#: A number between 0 and 1, shown in percent.
SHARE = "percentunit"
REQUESTS = "short"
REQUESTS_PER_S = "reqps"
TOKENS = "suffix: tok"
TOKENS_PER_S = "suffix: tok/s"
PER_S = "suffix:/s"
COUNT = "short"
BYTES = "bytes"
CORES = "suffix: cores"
