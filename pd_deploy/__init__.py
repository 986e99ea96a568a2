"""Everything that needs no Prefect: the deployment, its hosts, and what is done to them."""
