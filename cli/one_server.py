"""Settings of a Prefect server that is one process. Imported before Prefect, which reads them."""

SETTINGS = {
    # Of each step it records three states. By default each is a transaction of its own, which is
    # half the work that a run is for the server. This way they are recorded together: as soon as
    # there are 50, and once a second. Not for servers that share a Redis, which has by then
    # forgotten what a server that is killed had not recorded.
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "50",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
}
