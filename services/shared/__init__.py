"""What the services agree on: their events, the database schema, the settings of the demo."""
