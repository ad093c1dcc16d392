"""Load tests with locust: profiles, thresholds, a report; and what happens while a service is away."""
