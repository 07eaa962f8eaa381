"""Commands beside the method: the memory planner, the benchmark and the table of seeds."""
