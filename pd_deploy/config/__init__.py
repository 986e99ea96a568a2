"""The deployment file: what every other room knows of it.

Here belong its models, the types of its values, reading it and reporting all of its problems at
once, the profiles, and the value classes of a topology. Not here: what is derived from a deployment
(`planning`), and anything that knows an engine.
"""
