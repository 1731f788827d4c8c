"""Everything on one machine: `tuneyard up` and `tuneyard down`."""

from serve_app.embedded.lifetime import down, up

__all__ = ["down", "up"]
