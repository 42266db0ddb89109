"""The command `itop-prune`, which puts the runner's commands under one name."""
