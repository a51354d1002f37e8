"""Pipelines: where the steps of work stand, whoever runs them: ZeroG's own jobs, and jobs that run elsewhere."""
