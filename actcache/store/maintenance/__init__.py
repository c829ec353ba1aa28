"""What is done to a finished store: verify, repair, delete sites, export."""
