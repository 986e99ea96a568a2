"""Everything that needs no Prefect: what a deployment is, what follows from it, how hosts are reached."""
