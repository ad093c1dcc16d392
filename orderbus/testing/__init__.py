"""What orderbus uses to test itself, for the tests of its users: virtual time on asyncio and trio."""
