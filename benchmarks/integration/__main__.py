"""`python -m benchmarks.integration`."""

from benchmarks.integration.run import main

main()
