"""One thread for each process: `make test` runs several side by side, and threads that wait for each other spin."""

import os

for library in ("OMP", "MKL", "OPENBLAS", "NUMEXPR"):  # read when torch and numpy are first imported, so before any test
    os.environ.setdefault(f"{library}_NUM_THREADS", "1")
