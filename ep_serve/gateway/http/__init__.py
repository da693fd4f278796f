"""HTTP/1.1 with clients: uvicorn's protocol, with bounds."""
