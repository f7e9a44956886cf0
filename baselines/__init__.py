"""All other routers; a file here is a router."""
