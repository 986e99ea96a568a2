"""How a host is reached: SSH, files, the Docker engine through SSH, and facts."""
