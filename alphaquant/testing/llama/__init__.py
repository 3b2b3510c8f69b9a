"""llama.cpp as a client of our files, and tiny checkpoints to write such files of."""
