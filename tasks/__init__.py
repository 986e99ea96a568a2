"""One verb per file: the retryable, observable steps of a run."""
