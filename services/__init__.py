"""Event Stream Orders: six thin services on orderbus. No service imports another; what they share is in `shared`."""
