"""The runbooks: which step follows which."""
