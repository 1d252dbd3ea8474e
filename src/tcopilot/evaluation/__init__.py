"""From predictions to evidence: metrics, what their differences are worth, and the `results.json` that keeps both."""
