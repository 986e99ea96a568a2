"""`make demo`: a whole deployment on the lab, from nothing to a verified completion."""
