"""A checkpoint as layers: layouts of experts, sites, loading, the walk through decoder layers."""
