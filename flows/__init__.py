"""The runbooks: the order of steps, and what follows a failure."""
