"""Parts of the command `search`: what is asked, whose place it is, what comes of it."""
