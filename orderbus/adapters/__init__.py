"""The only places that import a driver; each is found by the scheme of its URL."""
