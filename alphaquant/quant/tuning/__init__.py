"""Tuning what a quantization leaves free, on the original's predictions."""
