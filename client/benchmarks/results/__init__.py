"""What follows from a run's rows: summary.json, two runs on the same samples, a search's outcome, leaderboard files."""
