"""Recipes: a second Optuna study, of how the winner of a search is quantized."""
