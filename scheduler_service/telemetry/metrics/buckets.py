"""Bucket bounds of the scheduler's histograms."""

#: Seconds. From below a step of a small model on a GPU to a request that waits for minutes.
LATENCY_S = (
    *(0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
    *(1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0),
)
#: Tokens of a sequence or an iteration.
TOKENS = tuple(float(2**power) for power in range(18))
#: Completions of a request, up to the most that are allowed.
COMPLETIONS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
