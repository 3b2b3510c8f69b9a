"""What can be chosen: formats, units, budgets, profiles, the space and its configurations."""
