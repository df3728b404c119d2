"""`lbdt bench`: kernels and the hook timed against baselines, beside the least time that the machine allows.

`runner.run` measures, `timing_table.lines` prints; `benchmarks/` times the same cases under pytest-benchmark.
"""
