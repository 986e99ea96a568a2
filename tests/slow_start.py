#!/usr/bin/python3
"""A program that needs some seconds before it does anything, as routers need for their imports:
`slow_start.py SECONDS PROGRAM ARGUMENT…`. Standard library."""

import os
import sys
import time

time.sleep(float(sys.argv[1]))
os.execvp(sys.argv[2], sys.argv[2:])
