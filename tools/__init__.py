"""Commands beside the method: the memory planner, the benchmark, the ablations, variants of ADM."""
