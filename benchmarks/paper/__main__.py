"""`python -m benchmarks.paper`: run the paper's tables.

Work for other processes may not stand here (see runner.py).
"""

from benchmarks.paper.runner import main

main()
