"""Types of llama.cpp: its own code that quantizes to them, and ours that decodes them."""
