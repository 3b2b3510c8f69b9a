"""GGUF files for llama.cpp: names of tensors, metadata, vocabulary, twins of our formats."""
