"""The training loop and what it needs: schedules, metrics, and the decisions that all ranks take together."""
