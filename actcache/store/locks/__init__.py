"""Who may write a store: one writer alone, or several that share it."""
