"""`make bench`: what the control plane itself costs, by part, measured on a lab of its own."""
