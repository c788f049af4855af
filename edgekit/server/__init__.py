"""``edgekit serve``: one session behind OpenAI's HTTP interface.

`ask` reads requests, `worker` runs them one after the other on the session, `answer` writes what
goes back, `app` is the application (ASGI) that joins them, `listen` runs it.
"""
