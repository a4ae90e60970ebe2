"""OpenAI's HTTP API in front of a `cluster.backend.Backend`: `cluster.http.app.build_app`."""
