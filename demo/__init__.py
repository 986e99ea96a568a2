"""`make demo`: the main job from nothing to a verified completion, on the lab."""
