"""From past results to the next assignment: solver, allocator knobs, samplers, Pareto fronts."""
