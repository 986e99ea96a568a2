"""The deployment file, and what every other room knows of it.

Here belong its models, the types of its values, reading it with all that is wrong at once, the
profiles, and the value classes of a topology. Not here: whatever is derived from a deployment
(`planning`), and anything that knows an engine.
"""
