"""Files that other engines load, made from packed checkpoints, and readers of theirs.

`contract` says what an export is, `writing` lists and makes them, `checker` refuses what an engine
would not load or would load wrong, `packed` reads a packed checkpoint a matrix at a time.
"""
