"""One function per command, over all rooms."""
