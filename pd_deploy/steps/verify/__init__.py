"""Proving that a service serves: what it is asked, what its answers and counters say of it.

Here belongs whatever judges a running service by what it answers. Waiting until a server is ready
does not (see `pd_deploy.steps.readiness`), nor does anything that changes a host.

    requests   what is asked (pure)
    answers    asking, and reading what comes back
    metrics    counters in Prometheus' text format (pure)
    servers    the API servers, each reached directly, with their counters
    handover   prefill and decode, asked directly: which pairs, and whose KV decode used
    verdict    what the answers of all pairs say together (pure)
    smoke      the smoke test: all of it in its order
"""
