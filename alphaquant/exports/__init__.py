"""Files that other engines load, made from packed checkpoints, and readers of theirs.

`contract` says what an export is, `writing` lists and makes them, `packed` reads a packed
checkpoint a matrix at a time. `checker` refuses a plan, and `file_checker` files, that an engine
would not load or would load wrong. `names` has the names of original checkpoints, `targets`
expressions for many of them, `shards` writes numbered files. An export is a file with its name.
"""
