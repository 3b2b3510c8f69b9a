"""Ways in which models keep routed experts, each a class of `ExpertsSite`."""
