"""Which rows make which batch: integers only, nothing is read."""
