"""`make bench`: measure the control plane's own time, by part, on a lab of its own."""
