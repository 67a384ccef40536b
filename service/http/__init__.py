"""HTTP: routes, middleware and pages over the judge. The door is `app.create_app`, run by `uvicorn_server.Server`."""
