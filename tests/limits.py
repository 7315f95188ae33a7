"""How long tests wait for what should end by itself."""

from __future__ import annotations

# Seconds after which a test says that something hangs. It measures nothing: on a busy machine a
# process may need minutes for what takes it seconds on an idle one. Below ddp_timeout (1800), so
# that a process which waits for its timeout is told from one that notices earlier.
HANGS = 600.0
