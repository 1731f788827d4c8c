"""The service: HTTP in, jobs made durable, runs started, watched and recovered."""
