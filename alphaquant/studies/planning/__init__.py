"""What a search will take, before it starts: work, speed of the machine, and the plan."""
