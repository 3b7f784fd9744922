"""An OpenAI-compatible server over an `Engine`, and replicas of it on Ray Serve.

A request's way: `guard` (key, size, time) → `app` (routes) → `schema` (what is accepted) → `service` (prompt, engine,
answer) → `events` and `app` (SSE or one JSON). `conversations` keeps finished rows; `ray` puts services into replicas.
"""
