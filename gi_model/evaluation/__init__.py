"""How close pictures and videos are to the truth, as the published evaluation measures it."""
