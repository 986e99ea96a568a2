"""The `pd-deploy` command."""
