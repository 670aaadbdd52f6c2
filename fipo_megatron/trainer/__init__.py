import os
import secrets

# Read by Ray when it is imported. Without the first it listens on the machine's public address, whatever address it is
# given; without the others, any user of the machine could run code through its loopback ports.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
