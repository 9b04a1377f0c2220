"""Settings of the whole suite."""

import os

# Before torch is imported, here and in child processes. The models are tiny, and the threads of
# several processes would spend their time waiting for each other on a machine with few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
