"""The arithmetic: grids and packing, and the kernels that compute with packed weights."""
