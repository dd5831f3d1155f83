"""Training: the loop, the tasks that it trains, their losses."""
