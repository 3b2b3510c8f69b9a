"""Side constraints: what an assignment keeps besides the budget."""
