"""GGUF files of llama.cpp as checkpoints: their header, their tensors, the converted folder."""
